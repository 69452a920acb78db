"""Detections as a value, and candidates to detections as the official post-processor does it."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glip_deploy.bundle.contract import Candidates
from glip_deploy.errors import BackendError, MissingPackage, OptionError
from glip_deploy.results.detections import Detection, Detections
from glip_deploy.results.nms import class_wise_nms
from glip_deploy.results.postprocess import select, select_batch

PARITY = Path(__file__).parents[4] / "shared" / "parity" / "goldens"


def three():
    return Detections(
        boxes=np.array([[0, 0, 9, 19], [1, 2, 3, 4], [5, 5, 6, 6]], np.float32),
        scores=np.array([0.25, 0.75, 0.5], np.float32),
        labels=np.array([1, 0, 1]),
        phrases=["dog", "cat", "dog"],
    )


# --- the value ---


def test_sorted_by_score_with_all_fields_together():
    found = three()
    assert found.scores.tolist() == [0.75, 0.5, 0.25]
    assert found.boxes[:, 0].tolist() == [1, 5, 0]
    assert found.labels.tolist() == [0, 1, 1] and found.labels.dtype == np.int64
    assert found.phrases == ["cat", "dog", "dog"]
    assert [one.score for one in found] == [0.75, 0.5, 0.25]


def test_single_elements():
    assert three()[0] == Detection(box=(1.0, 2.0, 3.0, 4.0), score=0.75, label=0, phrase="cat")
    assert three()[np.int64(-1)].phrase == "dog"
    with pytest.raises(IndexError):
        three()[3]


@pytest.mark.parametrize(
    ("index", "scores"),
    [
        (slice(0, 2), [0.75, 0.5]),
        (slice(None, None, -1), [0.75, 0.5, 0.25]),
        (np.array([True, False, True]), [0.75, 0.25]),
        ([False, True, False], [0.5]),
        ([2, 0], [0.75, 0.25]),
        ([], []),
        (np.zeros(3, bool), []),
    ],
)
def test_parts_stay_sorted(index, scores):
    part = three()[index]
    assert isinstance(part, Detections)
    assert part.scores.tolist() == scores and part.boxes.shape == (len(scores), 4)
    assert len(part.phrases) == len(scores)


def test_empty():
    nothing = Detections.empty()
    assert len(nothing) == 0 and nothing.boxes.shape == (0, 4)
    assert (nothing.boxes.dtype, nothing.scores.dtype, nothing.labels.dtype) == (
        np.float32,
        np.float32,
        np.int64,
    )
    assert nothing.to_dicts() == [] and nothing.to_coco(1) == [] and list(nothing) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"boxes": np.zeros((1, 5))}, r"boxes have shape \(1, 5\)"),
        ({"boxes": np.zeros(4)}, r"boxes have shape \(4,\)"),
        ({"scores": np.zeros(2)}, r"scores of shape \(2,\)"),
        ({"labels": np.zeros((1, 1), int)}, r"labels of shape \(1, 1\)"),
        ({"phrases": []}, "0 phrases"),
        ({"phrases": [3]}, "phrases must be str"),
        ({"scores": np.array([np.nan])}, "must be finite"),
        ({"boxes": np.full((1, 4), np.inf)}, "must be finite"),
        ({"labels": np.array([0.5])}, "dtype float64"),
        ({"labels": np.array([-1])}, "label -1 is negative"),
        ({"track": np.array([1, 2])}, r"track has shape \(2,\)"),
        ({"track": np.array([0.5])}, "dtype float64; an integer per box"),
        ({"track": np.array([-2])}, "track -2 is negative"),
    ],
)
def test_arrays_that_do_not_match_are_refused(change, match):
    good = {"boxes": np.zeros((1, 4)), "scores": np.ones(1), "labels": np.zeros(1, int), "phrases": ["x"]}
    Detections(**good)
    with pytest.raises(ValueError, match=match):
        Detections(**{**good, **change})


def test_tracks_go_with_their_boxes():
    untracked = three()
    assert untracked.track.tolist() == [-1, -1, -1] and untracked.track.dtype == np.int64
    assert Detections.empty().track.shape == (0,) and Detections.empty().track.dtype == np.int64
    assert [one.track for one in untracked] == [None] * 3
    tracked = replace(untracked, track=np.array([7, -1, 0]))
    assert [one.track for one in tracked] == [7, None, 0]
    assert tracked[[2, 0]].track.tolist() == [7, 0] and tracked[1:].track.tolist() == [-1, 0]
    assert Detections.joined([tracked, untracked], [2, 2]).track.tolist() == [7, -1, -1, -1, 0, -1]
    given = {"boxes": np.zeros((2, 4)), "labels": np.zeros(2, int), "phrases": ["x", "x"], "track": [3, 4]}
    assert Detections(scores=np.array([0.2, 0.9]), **given).track.tolist() == [4, 3]  # sorted by score, as all else


# --- adapters ---


def test_dicts_are_strict_json():
    rows = json.loads(json.dumps(three().to_dicts(), allow_nan=False))
    assert rows[0] == {
        "score": 0.75,
        "label": "cat",
        "box": {"xmin": 1.0, "ymin": 2.0, "xmax": 3.0, "ymax": 4.0},
    }
    assert [row["score"] for row in rows] == [0.75, 0.5, 0.25]


def test_coco_widths_count_the_last_pixel():
    rows = json.loads(json.dumps(three().to_coco(42), allow_nan=False))
    assert rows[2] == {"image_id": 42, "category_id": 2, "bbox": [0.0, 0.0, 10.0, 20.0], "score": 0.25}
    assert [row["category_id"] for row in three().to_coco(42, [17, 90])] == [17, 90, 90]
    with pytest.raises(OptionError, match="1 category ids, but class 1 was found"):
        three().to_coco(42, [17])


def test_tracks_in_every_form(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=lambda **fields: fields))
    tracked = replace(three(), track=np.array([7, -1, 0]))
    assert [row.get("track", "none") for row in tracked.to_dicts()] == [7, "none", 0]
    assert [row.get("track_id", "none") for row in tracked.to_coco(1)] == [7, "none", 0]
    assert tracked.to_supervision()["tracker_id"].tolist() == [7, -1, 0]
    assert three().to_supervision()["tracker_id"] is None
    assert not any("track" in row for row in three().to_dicts())
    assert not any("track_id" in row for row in three().to_coco(1))


def test_supervision_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingPackage, match="pip install supervision"):
        three().to_supervision()


def test_supervision_fields(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=lambda **fields: fields))
    fields = three().to_supervision()
    np.testing.assert_array_equal(fields["xyxy"], three().boxes)
    assert fields["class_id"].tolist() == [0, 1, 1]
    assert fields["data"]["class_name"].tolist() == ["cat", "dog", "dog"]


# --- candidates to detections ---


def official_order(boxes, scores, labels, thresholds, limit):
    """NMS over every candidate, the best `limit`, and only then the thresholds."""
    filled = np.flatnonzero(scores > 0)
    keep = filled[class_wise_nms(boxes[filled], scores[filled], labels[filled], 0.6, limit)]
    return keep[scores[keep] > thresholds[labels[keep]]]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 60),
    levels=st.sampled_from([4, 20, 1000]),
    limit=st.sampled_from([1, 5, 100]),
    one_threshold=st.booleans(),
)
def test_thresholding_early_changes_nothing(seed, count, levels, limit, one_threshold):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 15, (count, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 15, (count, 2))], axis=1).astype(np.float32)
    scores = (rng.integers(0, levels + 1, count) / levels).astype(np.float32)  # zeros are empty slots
    labels = rng.integers(0, 3, count)
    thresholds = (rng.integers(0, 5, 3) / 4).astype(np.float32)
    if one_threshold:
        thresholds[:] = thresholds[0]
    found = select(
        boxes,
        scores,
        labels,
        thresholds=thresholds,
        phrases="abc",
        image_size=(32, 32),
        original_size=(32, 32),
        max_detections=limit,
    )
    keep = official_order(boxes, scores, labels, thresholds, limit)
    np.testing.assert_array_equal(found.boxes, boxes[keep])
    np.testing.assert_array_equal(found.scores, scores[keep])
    np.testing.assert_array_equal(found.labels, labels[keep])
    assert found.phrases == ["abc"[label] for label in labels[keep]]


def select_x(boxes, scores, labels, *, threshold=0.0, image_size=(64, 64), original_size=(64, 64)):
    """Select for a prompt of one class, "x"."""
    return select(
        boxes,
        scores,
        labels,
        thresholds=np.array([threshold], np.float32),
        phrases=["x"],
        image_size=image_size,
        original_size=original_size,
    )


def test_a_score_at_the_threshold_is_not_above_it():
    boxes = np.array([[0, 0, 9, 9], [50, 50, 59, 59]], np.float32)
    scores = np.array([0.5, np.nextafter(np.float32(0.5), np.float32(1))], np.float32)
    found = select_x(boxes, scores, np.zeros(2, int), threshold=0.5)
    assert found.boxes[:, 0].tolist() == [50]


def test_empty_slots_never_appear():
    found = select_x(np.zeros((5, 4)), np.zeros(5), np.full(5, -1))
    assert len(found) == 0


def test_each_axis_is_scaled_by_its_own_ratio():
    boxes = np.array([[10, 10, 20, 40]], np.float32)
    found = select_x(boxes, np.ones(1), np.zeros(1, int), image_size=(50, 100), original_size=(25, 300))
    np.testing.assert_allclose(found.boxes, [[30, 5, 60, 20]])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"thresholds": np.zeros(2)}, r"thresholds have shape \(2,\)"),
        ({"labels": np.array([1])}, "from 1 to 1; the prompt has 1"),
        ({"scores": np.ones(2)}, "1 boxes, 2 scores"),
    ],
)
def test_select_refuses_arrays_that_do_not_match(change, match):
    good = {
        "boxes": np.zeros((1, 4)),
        "scores": np.ones(1),
        "labels": np.zeros(1, int),
        "thresholds": np.zeros(1),
    }
    with pytest.raises(ValueError, match=match):
        select(**{**good, **change}, phrases=["x"], image_size=(9, 9), original_size=(9, 9))


@pytest.mark.parametrize("change", [{"boxes": np.full((1, 1, 4), np.nan)}, {"labels": np.array([[7]])}])
def test_impossible_candidates_are_one_error(change):
    good = {"boxes": np.zeros((1, 1, 4)), "scores": np.ones((1, 1)), "labels": np.zeros((1, 1), int)}
    sizes = np.array([[9, 9]])

    def detections(**arrays):
        return select_batch(Candidates(**arrays), sizes, sizes, thresholds=np.zeros(1), phrases=["x"])

    assert len(detections(**good)[0]) == 1
    with pytest.raises(BackendError, match="candidates that cannot be right") as caught:
        detections(**{**good, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "A_od",
        "B_caption",
        "L_od",
        "T_od",
        "T_odlist",
        "T_caption",
        "T_coco80",
        "T_resize_demo",
        "T_resize_eval",
        "T_few",
    ],
)
def test_equals_the_official_post_processor(name):
    file = PARITY / f"glip_{name}.npz"
    if not file.is_file():
        pytest.skip(f"the full reference set is not beside this checkout ({PARITY})")
    with np.load(file) as golden:
        data = {key: golden[key] for key in golden.files if key.startswith(("pre_", "final_", "image"))}
    size = tuple(data["image_sizes"].reshape(-1, 2)[0])
    classes = [str(i) for i in range(data["pre_labels"].max())]
    found = select(
        data["pre_boxes"],
        data["pre_scores"],
        data["pre_labels"] - 1,
        thresholds=np.zeros(len(classes), np.float32),
        phrases=classes,
        image_size=size,
        original_size=data["image"].shape[:2],
    )
    assert len(found) == len(data["final_scores"])
    order = np.lexsort((data["final_boxes"][:, 0], -data["final_scores"]))
    ours = np.lexsort((found.boxes[:, 0], -found.scores))
    np.testing.assert_array_equal(found.scores[ours], data["final_scores"][order])
    np.testing.assert_array_equal(found.labels[ours] + 1, data["final_labels"][order])
    np.testing.assert_allclose(found.boxes[ours], data["final_boxes"][order], atol=1e-3)
