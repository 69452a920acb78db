"""Are the candidates of an exported graph those of torch? Compared as selection sees them, not by their final scores.

Selection has two hard limits: a class score must exceed a threshold *before* centerness, and only the best of every
level are kept. A location within rounding of a limit may be on either side of it, whatever its final score, which is
the root of class score times centerness: 0.22 where the two are 0.05 and 1. `compare` therefore works out, from torch's
raw outputs, which candidates must be there whatever the rounding and which may be, and pairs them one to one with those
that were found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.bundle.contract import IMAGE_GRAPH, Candidates, ImageInputs
from glip_deploy.errors import ParityError
from glip_deploy.frames.geometry import ceil_div
from glip_export.model.config import HeadConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["BOX_TOLERANCE", "SCORE_TOLERANCE", "Comparison", "RawOutputs", "compare"]

BOX_TOLERANCE = 0.1
"""Pixels of the network's input."""
SCORE_TOLERANCE = 1e-3
ROWS = 256
"""Of candidates whose distances are computed at once."""
STRONG = 0.05
"""Score above which candidates are compared."""


@dataclass(frozen=True)
class RawOutputs:
    """Torch's head outputs for one picture, levels one after another.

    Attributes:
        logits: (N, T) float32.
        deltas: (N, 4) float32.
        centerness: (N,) float32, before the sigmoid.
    """

    logits: Array
    deltas: Array
    centerness: Array


@dataclass(frozen=True)
class Comparison:
    """Largest differences over all pairs; infinite where a candidate has no counterpart at all, or is not a number.

    Attributes:
        count: torch's candidates that were looked for.
        box: pixels.
        score: absolute.
    """

    count: int
    box: float
    score: float


@dataclass(frozen=True)
class _Set:
    """Candidates of one level."""

    boxes: Array
    scores: Array
    labels: Array

    def __getitem__(self, which: Array) -> _Set:
        return _Set(self.boxes[which], self.scores[which], self.labels[which])

    def __len__(self) -> int:
        return len(self.scores)


def compare(
    found: Candidates, raw: RawOutputs, inputs: ImageInputs, config: HeadConfig, logit_error: float
) -> Comparison:
    """Compare a graph's candidates for one picture with what torch's selection may give.

    Args:
        found: of the graph, batch of one.
        raw: of torch, for the same inputs.
        inputs: batch of one.
        config: thresholds and strides.
        logit_error: largest difference of a logit or of centerness that counts as rounding; it says how close to a
            limit of the selection a candidate may be on either side.

    Raises:
        ParityError: the graph has another number of slots than torch.
    """
    assert isinstance(inputs.frames, np.ndarray)
    height, width = inputs.frames.shape[1:3]
    sizes = [(ceil_div(height, stride), ceil_div(width, stride)) for stride in config.strides]
    classes = inputs.class_map.shape[1]
    slots = [min(config.candidates_per_level, classes * h * w) for h, w in sizes]
    if found.scores.shape[1] != sum(slots):
        raise ParityError(f"{IMAGE_GRAPH}: {found.scores.shape[1]} candidates, torch gives {sum(slots)}")
    if not _finite(found):
        return Comparison(0, np.inf, np.inf)  # NaN would compare as neither a large difference nor a small one
    count, pairs = 0, [(0.0, 0.0)]
    start = first = 0
    for stride, (rows, columns), kept in zip(config.strides, sizes, slots, strict=True):
        here, taken = slice(start, start + rows * columns), slice(first, first + kept)
        start, first = here.stop, taken.stop
        possible, certain = _possible(
            RawOutputs(raw.logits[here], raw.deltas[here], raw.centerness[here]),
            columns,
            stride,
            inputs,
            config,
            logit_error,
        )
        level = _Set(found.boxes[0, taken], found.scores[0, taken], found.labels[0, taken])
        level = level[level.scores > 0]
        expected = possible[certain & (possible.scores > STRONG)]
        count += len(expected)
        pairs += _pair(expected, level)
        pairs += _pair(level[level.scores > STRONG], possible)
    return Comparison(count, max(box for box, _ in pairs), max(score for _, score in pairs))


def _possible(
    raw: RawOutputs, columns: int, stride: int, inputs: ImageInputs, config: HeadConfig, logit_error: float
) -> tuple[_Set, Array]:
    """Return what may be selected of one level, and which of it must be (as in `model.head.select_candidates`).

    A sigmoid is at most a quarter as wrong as its logit, so a class score, their mean, by a quarter of `logit_error`
    and its product with centerness by a half.
    """
    import torch

    from glip_export.model.head import decode

    score = inputs.class_map[0] @ _sigmoid(raw.logits).T  # (C, locations)
    rank = (score * _sigmoid(raw.centerness)).ravel()
    score = score.ravel()
    likely = score > config.score_threshold - logit_error / 4
    sure = score > config.score_threshold + logit_error / 4
    # How many are ranked before each, counting every doubt against it and then for it; likely ones count themselves.
    before_at_most = _count_above(rank[likely], rank - logit_error) - likely
    before_at_least = _count_above(rank[sure], rank + logit_error)
    chosen = np.flatnonzero(likely & (before_at_least < config.candidates_per_level))
    certain = (sure & (before_at_most < config.candidates_per_level))[chosen]
    labels, locations = np.divmod(chosen, len(raw.centerness))
    row, column = np.divmod(locations, columns)
    deltas, x, y = (torch.from_numpy(a.astype(np.float32)) for a in (raw.deltas[locations], column, row))
    boxes = decode(deltas, x, y, stride).numpy()
    limit = np.tile(inputs.image_sizes[0, ::-1] - 1, 2)
    boxes = np.minimum(np.maximum(boxes, 0), limit)
    return _Set(boxes, np.sqrt(rank[chosen]), labels), certain


def _finite(found: Candidates) -> bool:
    """Return whether all scores are numbers, and all boxes that have one; slots without a candidate score 0."""
    return bool(np.isfinite(found.scores).all() and np.isfinite(found.boxes[found.scores != 0]).all())


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x.astype(np.float64)))


def _count_above(values: Array, limits: Array) -> Array:
    return len(values) - np.searchsorted(np.sort(values), limits, side="right")


def _pair(left: _Set, right: _Set) -> list[tuple[float, float]]:
    """Pair every one of `left` with one of `right` of its own within tolerance; return their differences.

    One that cannot be paired gives its differences from the nearest of its label, or infinity where there is none or
    another has more right to it.
    """
    options: list[Sequence[int]] = [()] * len(left)
    nearest = [(np.inf, np.inf)] * len(left)
    for label in np.unique(left.labels):
        ours, theirs = np.flatnonzero(left.labels == label), np.flatnonzero(right.labels == label)
        if not len(theirs):
            continue
        for some in np.array_split(ours, ceil_div(len(ours), ROWS)):
            box = np.abs(right.boxes[theirs] - left.boxes[some, None]).max(axis=2)
            score = np.abs(right.scores[theirs] - left.scores[some, None])
            distance = np.maximum(box / BOX_TOLERANCE, score / SCORE_TOLERANCE)
            fits = (box <= BOX_TOLERANCE) & (score <= SCORE_TOLERANCE)
            row, column = np.nonzero(fits)
            order = np.lexsort((distance[row, column], row))
            bounds = np.searchsorted(row, np.arange(1, len(some)))  # rows stay in their order
            fitting = np.split(theirs[column[order]], bounds)
            for i, index in enumerate(some):
                options[index] = fitting[i].tolist()
                if not options[index]:
                    closest = np.argmin(distance[i])
                    nearest[index] = float(box[i, closest]), float(score[i, closest])
    partner = _match(options)
    return [
        nearest[i]
        if i not in partner
        else (
            float(np.abs(right.boxes[partner[i]] - left.boxes[i]).max()),
            float(abs(right.scores[partner[i]] - left.scores[i])),
        )
        for i in range(len(left))
    ]


def _match(options: Sequence[Sequence[int]]) -> dict[int, int]:
    """Give as many as possible one of their options each, no option twice (augmenting paths, best options first)."""
    owner: dict[int, int] = {}
    owned: dict[int, int] = {}
    for i in range(len(options)):
        reached_by: dict[int, int] = {}
        waiting, free = [i], None
        while waiting and free is None:
            one = waiting.pop(0)
            for option in options[one]:
                if option not in reached_by:
                    reached_by[option] = one
                    if option not in owner:
                        free = option
                        break
                    waiting.append(owner[option])
        while free is not None:  # each on the path takes the option by which it was passed, and gives up its own
            one = reached_by[free]
            given_up = owned.get(one)
            owner[free], owned[one] = one, free
            free = given_up
    return owned
