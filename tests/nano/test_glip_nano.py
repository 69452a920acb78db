"""GLIP-nano as it is shipped: exported, and right about a small fixed set of scenes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from nano.average_precision import Found, average_precision
from nano.subjects import rounded_copy
from parity_data import ROOT
from selection import slowly

from glip_deploy import Detector, load_image
from glip_deploy.results.boxes import pairwise_iou

CHECKPOINT = ROOT / "examples" / "nano" / "glip_nano.pth"
SCENES = ROOT / "tests" / "data" / "nano"
SIDE = 224


@pytest.fixture(scope="module")
def detector(nano_bundle):
    with Detector.open(nano_bundle, shortest_side=SIDE, cache_dir=None) as opened:
        yield opened


@pytest.fixture(scope="module")
def rounding_detector(nano_bundle, tmp_path_factory):
    """Every fp16 value rounded: what an fp16 engine gives at worst."""
    copy = rounded_copy(nano_bundle, "fp16", tmp_path_factory.mktemp("rounded") / "glip_nano")
    with Detector.open(copy, shortest_side=SIDE, cache_dir=None) as opened:
        yield opened


def test_it_is_small_enough_to_travel():
    assert CHECKPOINT.stat().st_size <= 25e6


def entries(kind):
    return [entry for entry in json.loads((SCENES / "scenes.json").read_text()) if entry["kind"] == kind]


def run(detector, kind):
    found, truth = [], []
    for entry in entries(kind):
        seen = detector.detect(load_image(SCENES / entry["file"]), entry["prompt"], 0.0, color="rgb")
        found.append(Found(seen.boxes.astype(float), tuple(seen.phrases), seen.scores.astype(float)))
        boxes = np.array([thing["box"] for thing in entry["things"]], float)
        truth.append(Found(boxes, tuple(thing["name"] for thing in entry["things"]), np.ones(len(boxes))))
    return average_precision(found, truth)


@pytest.mark.parametrize(("kind", "floor"), [("trained", 88.0), ("held_out", 15.0)])
def test_accuracy_does_not_fall(detector, kind, floor):
    """Floors a little below what was measured when the weights were committed."""
    assert run(detector, kind).ap50 >= floor


def test_a_whole_caption_grounds_each_of_its_phrases(detector):
    """One red apple, left of two dogs; the prompt says just that, without brackets."""
    entry = json.loads((SCENES / "caption.json").read_text())
    assert entry["prompt"] == "a red apple left of two dogs"
    seen = detector.detect(load_image(SCENES / entry["file"]), entry["prompt"], 0.5, color="rgb")
    assert sorted(seen.phrases) == ["a red apple", "two dogs", "two dogs"]
    phrase_of = {"red apple": "a red apple", "dog": "two dogs"}
    for thing in entry["things"]:
        same = [box for box, phrase in zip(seen.boxes, seen.phrases, strict=True) if phrase == phrase_of[thing["name"]]]
        assert pairwise_iou(np.array([thing["box"]], np.float32), np.array(same)).max() > 0.7, thing


@pytest.mark.parametrize("kind", ["trained", "held_out"])
def test_fp16_costs_at_most_a_tenth_of_a_point(detector, rounding_detector, kind):
    full, half = run(detector, kind), run(rounding_detector, kind)
    assert abs(full.ap - half.ap) <= 0.1
    assert abs(full.ap50 - half.ap50) <= 0.1


@slowly
def test_fp16_finds_the_same_things(detector, rounding_detector):
    """Of what scores 0.3 or more, 99% come back: same label, IoU 0.95, score within 0.01."""
    total = same = 0
    for entry in entries("trained") + entries("held_out"):
        picture = load_image(SCENES / entry["file"])
        full = detector.detect(picture, entry["prompt"], 0.3, color="rgb")
        half = rounding_detector.detect(picture, entry["prompt"], 0.25, color="rgb")
        for box, label, score in zip(full.boxes, full.labels, full.scores, strict=True):
            near = (half.labels == label) & (np.abs(half.scores - score) <= 0.01)
            total += 1
            if near.any():
                same += bool(pairwise_iou(box[None].astype(float), half.boxes[near].astype(float)).max() >= 0.95)
    assert total > 100
    assert same >= 0.99 * total, (same, total)


def test_the_boxes_of_the_demo_are_right(detector):
    picture = load_image(ROOT / "examples" / "nano" / "media" / "scene.jpg")
    true = {"dog": 1, "red apple": 2, "bicycle": 1, "guitar": 1, "penguin": 1, "owl": 1}
    found = detector.detect(picture, list(true), 0.6, color="rgb")
    counts = {name: found.phrases.count(name) for name in true}
    assert sum(min(counts[name], true[name]) for name in true) >= 6, counts
    assert len(found) <= 9, counts
    for name, box in (("dog", [302.0, 174, 409, 287]), ("penguin", [221.0, 101, 292, 202])):
        best = found.boxes[found.phrases.index(name)].astype(float)
        assert pairwise_iou(best[None], np.array([box])).item() > 0.6, name


def test_a_thing_that_is_not_there_is_not_found(detector):
    picture = load_image(ROOT / "examples" / "nano" / "media" / "scene.jpg")
    found = detector.detect(picture, ["airplane", "watermelon", "elephant"], 0.6, color="rgb")
    assert len(found) == 0, found.phrases
