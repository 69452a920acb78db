"""From the candidates of the image branch to detections: NMS, thresholds, pixels of the original frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import BackendError
from glip_deploy.results.detections import Detections
from glip_deploy.results.nms import class_wise_nms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy.bundle.contract import Candidates

__all__ = ["select", "select_batch"]


def select(
    boxes: NDArray[Any],
    scores: NDArray[Any],
    labels: NDArray[Any],
    *,
    thresholds: NDArray[Any],
    phrases: Sequence[str],
    image_size: tuple[int, int],
    original_size: tuple[int, int],
    nms_threshold: float = 0.6,
    max_detections: int = 100,
) -> Detections:
    """Turn one picture's candidates into detections: NMS, the best hundred, thresholds, original pixels.

    Officially (`ATSSPostProcessor`, then `GLIPDemo.select_top_predictions`) the thresholds come last. Here, a candidate
    at or below **every** class's threshold is dropped before NMS, with the same result: NMS goes by descending score,
    so such a candidate can neither suppress a better one nor take its place among the best hundred. The thresholds of
    single classes are applied last: a box of a class with a high threshold takes its place in the hundred before it is
    rejected, as officially.

    Args:
        boxes: (K, 4) float32, x1 y1 x2 y2 in network pixels, as the image graph gives them.
        scores: (K,) float32; 0 marks an empty slot.
        labels: (K,) integer class, 0-based.
        thresholds: (C,) float32, per class; a score must be **above** it.
        phrases: C class names.
        image_size: (height, width) of the resized picture, without padding.
        original_size: (height, width) of the frame.
        nms_threshold: IoU above which the box with the lower score is removed, within a class; 0.6 officially.
        max_detections: 100 officially; ties with the last one are kept.

    Returns:
        Detections in pixels of the frame. Scaling is the official `BoxList.resize`: each axis times
        original / resized.

    Raises:
        ValueError: shapes that do not match, or a class that the prompt does not have.
    """
    corners = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    values = np.asarray(scores, dtype=np.float32).reshape(-1)
    classes = np.asarray(labels).reshape(-1)
    limits = np.asarray(thresholds, dtype=np.float32)
    if limits.shape != (len(phrases),):
        raise ValueError(f"thresholds have shape {limits.shape}; {len(phrases)} phrases need ({len(phrases)},)")
    if not len(corners) == len(values) == len(classes):
        raise ValueError(f"{len(corners)} boxes, {len(values)} scores and {len(classes)} labels do not match")
    # An empty slot has a score of 0, so no threshold, however low, may let it through.
    lowest = max(limits.min(initial=np.float32(np.inf)), np.float32(0))
    candidates = np.flatnonzero(values > lowest)
    corners, values, classes = corners[candidates], values[candidates], classes[candidates]
    if len(classes) and not (classes.min() >= 0 and classes.max() < len(phrases)):
        raise ValueError(f"labels run from {classes.min()} to {classes.max()}; the prompt has {len(phrases)} classes")
    keep = class_wise_nms(corners, values, classes, nms_threshold, max_detections)
    keep = keep[values[keep] > limits[classes[keep]]]
    (height, width), (original_height, original_width) = image_size, original_size
    ratio = np.array([original_width / width, original_height / height] * 2, dtype=np.float32)
    return Detections(
        boxes=corners[keep] * ratio,
        scores=values[keep],
        labels=classes[keep],
        phrases=[phrases[label] for label in classes[keep]],
    )


def select_batch(
    found: Candidates,
    image_sizes: NDArray[np.int64],
    original_sizes: NDArray[np.int64],
    *,
    thresholds: NDArray[Any],
    phrases: Sequence[str],
    nms_threshold: float = 0.6,
    max_detections: int = 100,
) -> list[Detections]:
    """Turn the candidates of a batch into the detections of each picture; see `select`.

    Args:
        found: the candidates of B pictures.
        image_sizes: (B, 2) integer, (height, width) of each resized picture, without padding.
        original_sizes: (B, 2) integer, (height, width) of each frame.
        thresholds: (C,) float32, per class.
        phrases: C class names.
        nms_threshold: IoU above which the box with the lower score is removed, within a class.
        max_detections: per picture; ties with the last one are kept.

    Raises:
        BackendError: candidates that no GLIP graph gives, such as boxes that are not finite or unknown classes.
    """
    try:
        return [
            select(
                found.boxes[i],
                found.scores[i],
                found.labels[i],
                thresholds=thresholds,
                phrases=phrases,
                image_size=(int(image_sizes[i, 0]), int(image_sizes[i, 1])),
                original_size=(int(original_sizes[i, 0]), int(original_sizes[i, 1])),
                nms_threshold=nms_threshold,
                max_detections=max_detections,
            )
            for i in range(len(found))
        ]
    except (ValueError, IndexError) as error:
        raise BackendError(
            f"the image branch gave candidates that cannot be right ({error});"
            " try another backend or precision, or export the bundle again"
        ) from error
