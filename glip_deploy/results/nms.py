"""Non-maximum suppression within each class, in numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.results.boxes import areas, iou

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["class_wise_nms"]


def class_wise_nms(
    boxes: NDArray[Any],
    scores: NDArray[Any],
    labels: NDArray[Any],
    iou_threshold: float = 0.6,
    max_detections: int | None = 100,
) -> NDArray[np.int64]:
    """Suppress overlapping boxes within each class, over all levels at once, and keep the best `max_detections`.

    The rule of the official GPU branch (`csrc/cuda/ml_nms.cu`, `boxlist_ml_nms`, and the top 100 of
    `ATSSPostProcessor.select_over_all_levels`): a box is removed when its IoU with a better box of its own class is
    **strictly** above the threshold (see `glip_deploy.results.boxes`); equal scores are visited in the order given;
    every box that ties with the last one kept is kept too, so the result may be longer than `max_detections`.

    Only as many boxes are visited as are needed: once `max_detections` are kept, no lower score can matter.

    Args:
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels (network or original: any one picture's).
        scores: (N,) float32, higher is better, no NaN.
        labels: (N,) integer class of each box.
        iou_threshold: in [0, 1].
        max_detections: at least 1; None keeps all survivors.

    Returns:
        (K,) int64 indices into the input, by descending score.

    Raises:
        ValueError: lengths that do not match, or a limit out of range.
    """
    corners = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    values = np.asarray(scores, dtype=np.float32).reshape(-1)
    classes = np.asarray(labels).reshape(-1)
    if not len(corners) == len(values) == len(classes):
        raise ValueError(f"{len(corners)} boxes, {len(values)} scores and {len(classes)} labels; one of each is needed")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; it must be in [0, 1]")
    if max_detections is not None and max_detections < 1:
        raise ValueError(f"max_detections is {max_detections}; it must be at least 1, or None for no limit")
    count = len(values)
    if count == 0:
        return np.zeros(0, dtype=np.int64)

    by_score = np.argsort(-values, kind="stable")
    # Laid out class by class, best first, the boxes that a kept box may suppress are the contiguous slice after it, so
    # the loop needs no gather.
    by_class = np.argsort(classes[by_score], kind="stable")
    order = by_score[by_class]
    place = np.empty(count, dtype=np.int64)  # rank by score -> position in the class-major layout
    place[by_class] = np.arange(count)
    grouped = classes[order]
    ends = np.searchsorted(grouped, grouped, side="right")

    corners = corners[order]
    area = areas(corners)
    columns = np.ascontiguousarray(corners.T)
    limit = np.float32(iou_threshold)
    alive = np.ones(count, dtype=bool)
    ranked_scores = values[by_score]

    kept: list[int] = []
    with np.errstate(invalid="ignore"):  # two boxes of no area: 0 / 0, above no threshold
        for rank in range(count):
            if max_detections is not None and len(kept) >= max_detections:
                last = by_score[kept[max_detections - 1]]
                if ranked_scores[rank] < values[last]:
                    break
            at = place[rank]
            if not alive[at]:
                continue
            kept.append(rank)
            rest = slice(at + 1, ends[at])
            if rest.start >= rest.stop:
                continue
            alive[rest] &= ~(iou(columns[:, at], columns[:, rest], area[at], area[rest]) > limit)
    return by_score[np.asarray(kept, dtype=np.int64)].astype(np.int64)
