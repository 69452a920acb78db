"""COCO's average precision, and recall@1 for phrases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["COCO_OVERLAPS", "Found", "Precision", "average_precision", "overlaps"]

COCO_OVERLAPS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Found:
    """Detections of one picture, or, with scores of one, what is really there."""

    boxes: NDArray[np.float64]
    """(N, 4) xyxy, last pixel inclusive."""
    names: tuple[str, ...]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Precision:
    """Means over classes, 0 to 100."""

    ap: float
    """Over overlaps 0.5 to 0.95."""
    ap50: float
    classes: int
    """That occur in the truth; others do not count."""
    ap50_by_class: dict[str, float]


def overlaps(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (A, B) intersections over unions."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.clip(high - low + 1, 0, None).prod(-1)
    areas = [(x[:, 2:] - x[:, :2] + 1).prod(-1) for x in (a, b)]
    return common / (areas[0][:, None] + areas[1][None] - common)


def average_precision(detected: Sequence[Found], truth: Sequence[Found]) -> Precision:
    """Return COCO's box AP: greedy matching by score, 101-point interpolation, mean over the classes that occur.

    Args:
        detected: per picture, at most 100 detections (COCO's limit; not enforced here).
        truth: per picture, all objects of the classes asked for.
    """
    names = sorted({name for one in truth for name in one.names})
    table = np.array([_one_class(name, detected, truth) for name in names]).reshape(len(names), len(COCO_OVERLAPS))
    if not names:
        return Precision(float("nan"), float("nan"), 0, {})
    return Precision(
        ap=float(100 * table.mean()),
        ap50=float(100 * table[:, 0].mean()),
        classes=len(names),
        ap50_by_class={name: round(float(100 * row[0]), 1) for name, row in zip(names, table, strict=True)},
    )


def _one_class(name: str, detected: Sequence[Found], truth: Sequence[Found]) -> list[float]:
    scores, hits, total = [], [], 0
    for found, real in zip(detected, truth, strict=True):
        mine = np.array([own == name for own in found.names], bool)
        true = real.boxes[np.array([own == name for own in real.names], bool)]
        total += len(true)
        if not mine.any():
            continue
        order = np.argsort(-found.scores[mine], kind="stable")
        scores.append(found.scores[mine][order])
        hits.append(_match(overlaps(found.boxes[mine][order], true)))
    if not scores:
        return [0.0] * len(COCO_OVERLAPS)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hit = np.concatenate(hits)[order]  # (detections, overlaps)
    right = hit.cumsum(0)
    recall = right / total
    precision = right / np.arange(1, len(hit) + 1)[:, None]
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    out = []
    for column in range(len(COCO_OVERLAPS)):
        place = np.searchsorted(recall[:, column], RECALLS, side="left")
        padded = np.append(precision[:, column], 0.0)
        out.append(float(padded[place].mean()))
    return out


def _match(overlap: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Best detection first, each takes the free object it overlaps most; (detections, overlaps) True for a hit."""
    hits = np.zeros((len(overlap), len(COCO_OVERLAPS)), bool)
    for column, limit in enumerate(COCO_OVERLAPS):
        free = np.ones(overlap.shape[1], bool)
        for row, values in enumerate(overlap):
            candidates = np.where(free, values, -1.0)
            if len(candidates) and candidates.max() >= limit:
                free[candidates.argmax()] = False
                hits[row, column] = True
    return hits
