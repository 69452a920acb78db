"""COCO's average precision of boxes with names, by pycocotools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from glip_bench.quality.coco import Picture, Set, xywh
from glip_bench.quality.coco import average_precision as coco_average_precision
from numpy.typing import NDArray

__all__ = ["Found", "Precision", "average_precision"]


@dataclass(frozen=True)
class Found:
    """Detections of one picture, or, with scores of one, what is really there."""

    boxes: NDArray[np.float64]
    """(N, 4) x1 y1 x2 y2, the last pixel inclusive."""
    names: tuple[str, ...]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Precision:
    """Means over the classes that occur in the truth, 0 to 100; nan where none does."""

    ap: float
    """Mean over IoU 0.5 to 0.95."""
    ap50: float


def average_precision(detected: Sequence[Found], truth: Sequence[Found]) -> Precision:
    """Return COCO's box AP; detections under a name that is nowhere in the truth do not count.

    Args:
        detected: per picture, at most 100 detections.
        truth: per picture, all objects of the classes that were asked for.

    Raises:
        MissingPackage: pycocotools is not installed.
    """
    names = sorted({name for one in truth for name in one.names})
    if not names:
        return Precision(float("nan"), float("nan"))
    numbers = {name: number for number, name in enumerate(names)}
    objects = [
        {**row, "id": number, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        for number, row in enumerate(_rows(truth, numbers), 1)
    ]
    pictures = tuple(Picture(number, Path()) for number in range(len(truth)))
    data = Set(pictures, tuple((number, name) for name, number in numbers.items()), tuple(objects))
    figures = coco_average_precision(data, _rows(detected, numbers)).figures
    return Precision(figures["AP"], figures["AP50"])


def _rows(found: Sequence[Found], numbers: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"image_id": picture, "category_id": numbers[name], "bbox": xywh(box.tolist()), "score": float(score)}
        for picture, one in enumerate(found)
        for box, name, score in zip(one.boxes, one.names, one.scores, strict=True)
        if name in numbers
    ]
