"""Candidates of a graph against torch's: rounding at the limits of the selection is none of its faults, all else is."""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from glip_export.candidates import BOX_TOLERANCE, SCORE_TOLERANCE, RawOutputs, compare
from glip_export.model.glip import ImageBranch
from glip_export.model.head import HeadOutputs, LevelOutputs, select_candidates
from tiny_glip import HIDDEN, tiny_model

from glip_deploy.bundle.contract import Candidates, ImageInputs
from glip_deploy.errors import ParityError

HEIGHT, WIDTH = 96, 128
SIZES = ((12, 16), (6, 8), (3, 4), (2, 2), (1, 1))
LOGIT_ERROR = 1e-3


class Case:
    """A tiny model's outputs for noise and three classes; at most 60 candidates a level, so that ranks matter."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        model = tiny_model(seed)
        self.config = replace(model.config.head, candidates_per_level=60)
        self.inputs = ImageInputs.of(
            rng.integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8),
            np.array([[90, 120]]),
            rng.normal(size=(7, HIDDEN)).astype(np.float32),
            np.repeat(np.eye(3, dtype=np.float32), (2, 2, 3), axis=1) / np.array([[2], [2], [3]], np.float32),
        )
        with torch.inference_mode():
            outputs = ImageBranch(model)(*(torch.from_numpy(a.copy()) for a in self.inputs.feed().values()))
        self.raw = RawOutputs(*(array[0].numpy().copy() for array in outputs[-3:]))
        # Most class scores near the threshold: nothing else tests the limits.
        self.raw = replace(self.raw, logits=self.raw.logits - self.raw.logits.mean() - 2.9)

    def select(self, raw: RawOutputs | None = None) -> Candidates:
        """What the model's own selection makes of raw outputs."""
        raw = raw or self.raw
        levels, start = [], 0
        for rows, columns in SIZES:
            here = slice(start, start := start + rows * columns)
            parts = (raw.logits[here], raw.deltas[here], raw.centerness[here, None])
            levels.append(LevelOutputs(*(torch.from_numpy(part.T.copy())[None] for part in parts), width=columns))
        classes, sizes = torch.from_numpy(self.inputs.class_map.copy()), torch.from_numpy(self.inputs.image_sizes)
        found = select_candidates(HeadOutputs(levels, torch.zeros(1)), classes, sizes, self.config)
        return Candidates(found.boxes.numpy(), found.scores.numpy(), found.labels.numpy())

    def rounded(self, seed: int, size: float) -> RawOutputs:
        """The raw outputs, each changed by up to `size`, box deltas by a tenth of it."""
        rng = np.random.default_rng(seed)

        def near(array, size=size):
            return (array + rng.uniform(-size, size, array.shape)).astype(np.float32)

        return RawOutputs(near(self.raw.logits), near(self.raw.deltas, size / 10), near(self.raw.centerness))

    def compare(self, found: Candidates):
        return compare(found, self.raw, self.inputs, self.config, LOGIT_ERROR)

    def agrees(self, found: Candidates) -> bool:
        result = self.compare(found)
        return result.box <= BOX_TOLERANCE and result.score <= SCORE_TOLERANCE


def case_of(seed: int) -> Case:
    """A case that may be changed; its outputs are computed once."""
    return copy.copy(_computed(seed))


@functools.cache
def _computed(seed: int) -> Case:
    return Case(seed)


@pytest.fixture
def case():
    return case_of(0)


def agree_by_final_score(found: Candidates, torchs: Candidates) -> bool:
    """How candidates used to be compared: the nearest of the same label for every final score above 0.05."""
    for box, score, label in zip(torchs.boxes[0], torchs.scores[0], torchs.labels[0], strict=True):
        if score > 0.05:
            same = np.flatnonzero((found.labels[0] == label) & (found.scores[0] > 0))
            distance = np.abs(found.boxes[0, same] - box).max(axis=1)
            place = np.flatnonzero(distance <= distance.min() + BOX_TOLERANCE)
            if distance.min() > BOX_TOLERANCE or np.abs(found.scores[0, same[place]] - score).min() > SCORE_TOLERANCE:
                return False
    return True


@pytest.mark.parametrize("seed", range(4))
def test_the_models_own_selection_agrees_with_itself(seed):
    case = case_of(seed)
    result = case.compare(case.select())
    assert result.count > 50
    assert result.box < 1e-4 and result.score < 1e-5


def test_both_limits_of_the_selection_are_at_work(case):
    found, start = case.select(), 0
    full = []
    for rows, columns in SIZES:
        slots = slice(start, start := start + min(60, 3 * rows * columns))
        full.append(bool((found.scores[0, slots] > 0).all()) and 3 * rows * columns > 60)
    assert any(full) and (found.scores == 0).any()


def test_rounding_at_a_limit_is_no_difference():
    """By their final scores many of these would differ: a candidate at a limit has one of 0.1 or 0.2, or none."""
    refused = 0
    for seed in range(4):
        case = case_of(seed)
        case.raw = replace(case.raw, logits=case.raw.logits * 0.05 - 2.8)  # around a class score of 0.05
        for change in range(10):
            found = case.select(case.rounded(change, 6e-4))
            assert case.agrees(found), (seed, change, case.compare(found))
            refused += not agree_by_final_score(found, case.select())
    assert refused >= 8


@pytest.mark.parametrize("seed", range(4))
def test_rounding_at_the_last_rank_of_a_level_is_no_difference(seed):
    """All class scores far above the threshold and almost equal: only ranks decide, and rounding decides ranks."""
    case = case_of(seed)
    spread = np.random.default_rng(seed).uniform(-2e-3, 2e-3, case.raw.logits.shape)
    case.raw = replace(case.raw, logits=spread.astype(np.float32), centerness=case.raw.centerness * 1e-3)
    torchs, exchanged, refused = case.select(), 0, 0
    for change in range(10):
        found = case.select(case.rounded(change, 6e-4))
        assert case.agrees(found), (change, case.compare(found))
        exchanged += not same_places(found, torchs)
        refused += not agree_by_final_score(found, torchs)
    assert exchanged == 10 and refused >= 5


def same_places(found: Candidates, torchs: Candidates) -> bool:
    """Whether every candidate of one has one of its label nearby in the other."""
    return all(
        (np.abs(found.boxes[0, found.labels[0] == label] - box).max(axis=1) <= BOX_TOLERANCE).any()
        for box, label in zip(torchs.boxes[0], torchs.labels[0], strict=True)
    )


def test_more_than_rounding_is_a_difference(case):
    assert not any(case.agrees(case.select(case.rounded(change, 0.05))) for change in range(10))


def changed(found: Candidates, **parts) -> Candidates:
    copy = Candidates(found.boxes.copy(), found.scores.copy(), found.labels.copy())
    for name, (slot, value) in parts.items():
        getattr(copy, name)[0, slot] = value
    return copy


def strong_slots(case: Case, found: Candidates) -> list[int]:
    """Slots whose candidates are at no limit: well above the threshold, and well above the last of a full level."""
    slots, start = [], 0
    for rows, columns in SIZES:
        here = slice(start, start := start + min(60, 3 * rows * columns))
        scores = found.scores[0, here]
        least = scores.min() + 0.01 if 3 * rows * columns > 60 else 0.0
        # A class score of 0.06 or more: with less, centerness cannot give this final score.
        slots += [here.start + int(i) for i in np.flatnonzero((scores > least) & (scores > 0.06**0.5))]
    return slots


def test_a_missing_candidate_is_seen(case):
    found = case.select()
    slots = strong_slots(case, found)
    assert len(slots) > 10
    for slot in slots:
        assert not case.agrees(changed(found, scores=(slot, 0.0))), slot


def test_a_missing_candidate_is_seen_where_another_is_there_twice(case):
    found = case.select()
    slots = strong_slots(case, found)
    for slot, other in itertools.pairwise(slots):
        twice = changed(
            found,
            boxes=(slot, found.boxes[0, other]),
            scores=(slot, found.scores[0, other]),
            labels=(slot, found.labels[0, other]),
        )
        assert not case.agrees(twice), slot


@pytest.mark.parametrize("corner", range(4))
def test_a_moved_candidate_is_seen(case, corner):
    found = case.select()
    for slot in strong_slots(case, found):
        box = found.boxes[0, slot].copy()
        box[corner] += 0.15
        moved = changed(found, boxes=(slot, box))
        assert not case.agrees(moved), slot
        assert case.compare(moved).box > 0.14, slot


def test_a_changed_score_or_label_is_seen(case):
    found = case.select()
    for slot in strong_slots(case, found):
        assert not case.agrees(changed(found, scores=(slot, found.scores[0, slot] + 0.002))), slot
        assert not case.agrees(changed(found, labels=(slot, (found.labels[0, slot] + 1) % 3))), slot


def test_a_candidate_too_many_is_seen(case):
    found = case.select()
    empty = int(np.flatnonzero(found.scores[0] == 0)[0])
    assert not case.agrees(changed(found, scores=(empty, 0.3), boxes=(empty, (1, 2, 30, 40)), labels=(empty, 1)))


def test_a_candidate_that_takes_the_place_of_the_last_of_a_full_level_is_seen(case):
    """One far down the ranks instead of the one at the limit: the limit explains who left, not who came."""
    found, start = case.select(), 0
    replaced = 0
    for rows, columns in SIZES:
        slots = slice(start, start := start + min(60, 3 * rows * columns))
        if 3 * rows * columns <= 60 or not (found.scores[0, slots] > 0).all():
            continue
        last = slots.start + int(found.scores[0, slots].argmin())
        everyone = case_of(0)
        everyone.config = replace(case.config, candidates_per_level=3 * rows * columns, score_threshold=0.0)
        every = everyone.select()
        first = sum(3 * r * c for r, c in SIZES[: SIZES.index((rows, columns))])
        other = first + int(np.argsort(-every.scores[0, first : first + 3 * rows * columns])[100])
        assert every.scores[0, other] > 0.05
        exchanged = changed(
            found,
            boxes=(last, every.boxes[0, other]),
            scores=(last, every.scores[0, other]),
            labels=(last, every.labels[0, other]),
        )
        assert not case.agrees(exchanged)
        replaced += 1
    assert replaced


MUTATIONS = {
    "a box moved by a pixel": lambda box, score, label: (box + np.array([1, 0, 1, 0], np.float32), score, label),
    "a box grown by a pixel": lambda box, score, label: (box + np.array([0, 0, 1, 1], np.float32), score, label),
    "corners exchanged": lambda box, score, label: (box[[2, 3, 0, 1]], score, label),
    "a score too high": lambda box, score, label: (box, score + 2 * SCORE_TOLERANCE, label),
    "a score too low": lambda box, score, label: (box, score - 2 * SCORE_TOLERANCE, label),
    "no root taken": lambda box, score, label: (box, score**2, label),
    "dropped": lambda box, score, label: (box, 0.0, label),
    "another label": lambda box, score, label: (box, score, (label + 1) % 3),
    "a label of no class": lambda box, score, label: (box, score, 3),
    "a negative label": lambda box, score, label: (box, score, -1),
    "NaN for a score": lambda box, score, label: (box, np.nan, label),
    "infinite score": lambda box, score, label: (box, np.inf, label),
    "NaN in a box": lambda box, score, label: (np.array([np.nan, *box[1:]], np.float32), score, label),
    "infinite box": lambda box, score, label: (np.array([*box[:3], np.inf], np.float32), score, label),
}


def mutated(found: Candidates, slot: int, mutation: str) -> Candidates:
    box, score, label = MUTATIONS[mutation](found.boxes[0, slot].copy(), found.scores[0, slot], found.labels[0, slot])
    return changed(found, boxes=(slot, box), scores=(slot, score), labels=(slot, label))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_of_a_real_candidate_is_seen(case, mutation):
    found = case.select()
    slots = strong_slots(case, found)[::3]
    assert len(slots) > 10
    for slot in slots:
        assert not case.agrees(mutated(found, slot, mutation)), slot


@pytest.fixture(scope="module")
def borderline():
    """A case with most class scores at the threshold, its candidates, and the slots of those that rounding may drop."""
    case = case_of(0)
    case.raw = replace(case.raw, logits=case.raw.logits * 0.05 - 2.8)
    found = case.select()
    slots = [int(slot) for slot in np.flatnonzero(found.scores[0] > 0)]
    slots = [slot for slot in slots if case.agrees(changed(found, scores=(slot, 0.0)))]
    assert len(slots) > 5
    return case, found, slots


@pytest.mark.parametrize("mutation", [name for name in MUTATIONS if "NaN" in name or "infinite" in name])
def test_values_that_are_no_numbers_are_seen_in_borderline_candidates_too(borderline, mutation):
    """Rounding may take such a candidate away, but it does not make it NaN."""
    case, found, slots = borderline
    for slot in slots:
        assert not case.agrees(mutated(found, slot, mutation)), slot


def test_a_candidate_of_a_level_far_below_its_threshold_is_no_borderline_case(case):
    """Only what is within rounding of the limit may come or go."""
    lowered = replace(case.config, score_threshold=case.config.score_threshold - 0.005)
    more = case_of(0)
    more.config = lowered
    assert not case.agrees(more.select())


def test_rank_does_not_matter(case):
    found = case.select()
    order = np.arange(found.scores.shape[1])
    order[[0, 3, 5]] = order[[5, 0, 3]]
    shuffled = Candidates(found.boxes[:, order], found.scores[:, order], found.labels[:, order])
    assert case.compare(shuffled) == case.compare(found)


def test_many_equal_candidates_are_paired(case):
    """Clipped boxes with equal scores: each has as many counterparts as there are, and all are needed."""
    same = replace(
        case.raw,
        logits=np.full_like(case.raw.logits, 2.0),
        centerness=np.zeros_like(case.raw.centerness),
        deltas=np.tile(np.array([0, 0, 20, 20], np.float32), (len(case.raw.deltas), 1)),
    )
    found = case.select(same)
    result = compare(found, same, case.inputs, case.config, LOGIT_ERROR)
    assert (result.box, result.score) == (0, pytest.approx(0, abs=1e-6))
    gone = compare(changed(found, scores=(-1, 0.0)), same, case.inputs, case.config, LOGIT_ERROR)
    assert gone.box == float("inf")  # the smallest level keeps all of its candidates


def test_another_number_of_slots_is_an_error(case):
    found = case.select()
    fewer = Candidates(found.boxes[:, :-1], found.scores[:, :-1], found.labels[:, :-1])
    count = found.scores.shape[1]
    with pytest.raises(ParityError, match=rf"image\.onnx: {count - 1} candidates, torch gives {count}"):
        case.compare(fewer)
