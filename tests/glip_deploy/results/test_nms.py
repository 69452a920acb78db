"""Class-wise NMS against the official kernel's answers and against a reference with two plain loops."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glip_deploy.results.nms import class_wise_nms

GOLDEN = Path(__file__).parents[2] / "data" / "goldens" / "unit_ml_nms.npz"
f32 = np.float32


def slow_nms(boxes, scores, labels, threshold, limit):
    """O(n^2), one pair at a time, then the official top-k that keeps ties."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept = []
    for i in order:
        for j in kept:
            if labels[i] != labels[j]:
                continue
            a, b = boxes[j], boxes[i]
            w = max(f32(min(a[2], b[2]) - max(a[0], b[0]) + f32(1)), f32(0))
            h = max(f32(min(a[3], b[3]) - max(a[1], b[1]) + f32(1)), f32(0))
            area_a = f32(a[2] - a[0] + f32(1)) * f32(a[3] - a[1] + f32(1))
            area_b = f32(b[2] - b[0] + f32(1)) * f32(b[3] - b[1] + f32(1))
            if f32(w * h) / f32(f32(area_a + area_b) - f32(w * h)) > f32(threshold):
                break
        else:
            kept.append(i)
    if limit is not None and len(kept) > limit:
        last = scores[kept[limit - 1]]
        kept = [i for i in kept if scores[i] >= last]
    return kept


@pytest.mark.parametrize("case", ["random", "tied_scores", "one_label", "threshold"])
def test_equals_the_official_kernel(case):
    with np.load(GOLDEN) as golden:
        arrays = [golden[f"{case}_{name}"] for name in ("boxes", "scores", "labels", "keep")]
    boxes, scores, labels, expected = arrays
    keep = class_wise_nms(boxes, scores, labels, 0.6, max_detections=None)
    assert keep.dtype == np.int64
    np.testing.assert_array_equal(np.sort(keep), expected)
    assert (np.diff(scores[keep]) <= 0).all()


@st.composite
def candidates(draw):
    count = draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    corner = rng.integers(0, 12, (count, 2))
    size = rng.integers(0, 12, (count, 2))
    boxes = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
    if draw(st.booleans()):
        boxes += rng.random((count, 4), dtype=np.float32)
    levels = draw(st.sampled_from([3, 10, 1000]))  # few levels: many ties
    scores = (rng.integers(1, levels + 1, count) / levels).astype(np.float32)
    labels = rng.integers(0, draw(st.sampled_from([1, 3, 9])), count)
    return boxes, scores, labels


@settings(max_examples=150, deadline=None)
@given(candidates(), st.sampled_from([0.0, 0.3, 0.5, 0.6, 1.0]), st.sampled_from([None, 1, 3, 10]))
def test_equals_two_plain_loops(arrays, threshold, limit):
    keep = class_wise_nms(*arrays, threshold, limit)
    assert keep.tolist() == slow_nms(*arrays, threshold, limit)


def test_iou_exactly_at_the_threshold_survives():
    # 10x10 and 10x5 counting the last pixel: IoU is 50/100 exactly.
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 4]], np.float32)
    scores, labels = np.array([0.9, 0.8], np.float32), np.array([0, 0])
    assert class_wise_nms(boxes, scores, labels, 0.5).tolist() == [0, 1]
    assert class_wise_nms(boxes, scores, labels, 0.4999).tolist() == [0]


def test_other_classes_are_never_suppressed():
    boxes = np.zeros((3, 4), np.float32)
    keep = class_wise_nms(boxes, np.array([0.1, 0.3, 0.2], np.float32), np.array([7, 8, 7]))
    assert keep.tolist() == [1, 2]


def test_ties_with_the_last_one_are_all_kept():
    boxes = np.stack([np.arange(6) * 100] * 4, axis=1).astype(np.float32)
    scores = np.array([0.5, 0.9, 0.5, 0.5, 0.4, 0.8], np.float32)
    assert class_wise_nms(boxes, scores, np.zeros(6, int), max_detections=3).tolist() == [1, 5, 0, 2, 3]


def test_boxes_of_no_area_are_kept_without_a_warning():
    boxes = np.array([[5, 5, 4, 4], [5, 5, 4, 4]], np.float32)
    with np.errstate(all="raise"):
        keep = class_wise_nms(boxes, np.array([0.2, 0.1], np.float32), np.array([0, 0]))
    assert keep.tolist() == [0, 1]


def test_no_boxes():
    keep = class_wise_nms(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    assert keep.shape == (0,) and keep.dtype == np.int64


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"iou_threshold": 1.5}, "iou_threshold is 1.5"), ({"max_detections": 0}, "max_detections is 0")],
)
def test_limits_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        class_wise_nms(np.zeros((1, 4)), np.ones(1), np.zeros(1), **kwargs)


def test_lengths_must_match():
    with pytest.raises(ValueError, match="2 boxes, 1 scores"):
        class_wise_nms(np.zeros((2, 4)), np.ones(1), np.zeros(2))
