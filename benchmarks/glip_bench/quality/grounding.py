"""Phrase grounding as on Flickr30K Entities: how often the best boxes of a phrase overlap the objects that it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glip_bench.quality.coco import read_json
from glip_deploy.errors import OptionError
from glip_deploy.prompts.syntax import Caption
from glip_deploy.results.boxes import pairwise_iou

__all__ = ["Picture", "read_phrases", "recall"]

LEAST_IOU = 0.5
RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Picture:
    """One picture, its caption, and the objects that each phrase names."""

    file: Path
    caption: Caption
    boxes: tuple[NDArray[np.float64], ...]
    """(N, 4) xyxy in pixels, N of 1 or more, for every phrase."""
    kinds: tuple[tuple[str, ...], ...] = ()
    """Of every phrase, what it names in general (people, vehicles, ...); empty where the file does not say."""


def read_phrases(annotations: Path, images: Path, limit: int | None = None) -> list[Picture]:
    """Read grounded captions.

    The file is a JSON list of {"image": file name, "caption": text, "phrases": [{"span": [start, end] or a list of
    such pairs, "boxes": [[x1, y1, x2, y2], ...]}]}; positions count characters, end exclusive.

    Args:
        annotations: the file.
        images: folder the names are relative to.
        limit: the first so many captions only.

    Raises:
        OptionError: not readable, not of this form, a phrase without a box, or a picture is missing.
    """
    content = read_json(annotations)
    if not isinstance(content, list) or not content:
        raise OptionError(f"{annotations} is no list of captions; see glip_bench.quality.grounding for its form")
    if not images.is_dir():
        raise OptionError(f"--images {images} is not a folder; name the one with the set's pictures")
    pictures = []
    for number, one in enumerate(content[:limit]):
        try:
            pictures.append(_picture(one, images))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise OptionError(
                f"{annotations}, caption {number}: {reason}; see glip_bench.quality.grounding for its form"
            ) from None
    for picture in pictures:
        if not picture.file.is_file():
            raise OptionError(f"{picture.file} is missing; {annotations} names it; check --images {images}")
    return pictures


def _picture(one: Mapping[str, Any], images: Path) -> Picture:
    spans, boxes = [], []
    for phrase in one["phrases"]:
        span = phrase["span"]
        pairs = [span] if span and isinstance(span[0], int) else span
        spans.append([(int(start), int(end)) for start, end in pairs])
        outside = next((pair for pair in spans[-1] if not 0 <= pair[0] < pair[1] <= len(str(one["caption"]))), None)
        if outside is not None:
            raise ValueError(f"span {list(outside)} is not in a caption of {len(str(one['caption']))} characters")
        array = np.asarray(phrase["boxes"], np.float64)
        if array.ndim != 2 or array.shape[1] != 4 or not len(array):
            raise ValueError(f"boxes of shape {array.shape}, (N, 4) with N of 1 or more is needed")
        boxes.append(array)
    if not spans:
        raise ValueError("there are no phrases")
    return Picture(images / str(one["image"]), Caption(str(one["caption"]), spans), tuple(boxes))


def recall(pictures: Sequence[Picture], rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return recall@1, 5 and 10, in percent, by the two protocols of the official evaluation; recall@1 by kind too.

    "any": one of the k best boxes of a phrase overlaps one of its objects by half or more (as GLIP reports it).
    "merged": the smallest box around all its objects is what must be overlapped.

    The overlap is that of the official `maskrcnn_benchmark/data/datasets/evaluation/flickr/flickr_eval.py` (`box_iou`,
    from MDETR and before it torchvision), in which a width is x2 - x1. Everywhere else GLIP counts the last pixel.

    Args:
        pictures: the set.
        rows: by position of the caption: boxes, scores and labels (position of the phrase).
    """
    hits = {(protocol, rank): 0 for protocol in ("any", "merged") for rank in RANKS}
    total = 0
    by_kind: dict[str, list[bool]] = {}
    for number, picture in enumerate(pictures):
        row = rows[str(number)]
        boxes = np.asarray(row["boxes"], np.float64).reshape(-1, 4)
        scores, labels = np.asarray(row["scores"]), np.asarray(row["labels"])
        for label, truth in enumerate(picture.boxes):
            total += 1
            mine = np.flatnonzero(labels == label)
            best = boxes[mine[np.argsort(-scores[mine], kind="stable")]]
            union = np.concatenate([truth[:, :2].min(axis=0), truth[:, 2:].max(axis=0)])[None]
            for protocol, target in (("any", truth), ("merged", union)):
                right = np.asarray((_iou(best, target) >= LEAST_IOU).any(axis=1))
                for rank in RANKS:
                    hits[protocol, rank] += bool(right[:rank].any())
                if protocol == "any":
                    for kind in picture.kinds[label] if picture.kinds else ():
                        by_kind.setdefault(kind, []).append(bool(right[:1].any()))
    figures = {
        f"R@{rank}" + (" merged" if protocol == "merged" else ""): round(100 * count / total, 4)
        for (protocol, rank), count in hits.items()
    }
    kinds = {kind: round(100 * sum(rows) / len(rows), 4) for kind, rows in sorted(by_kind.items())}
    return {"figures": figures, **({"R@1 by kind": kinds} if kinds else {})}


def _iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the (A, B) overlaps of boxes whose last pixel does not belong to them; see `recall`."""
    last_pixel = (0, 0, 1, 1)
    return pairwise_iou(a - last_pixel, b - last_pixel)
