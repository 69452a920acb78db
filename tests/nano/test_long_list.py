"""GLIP-nano and all the objects it knows: 290 names in one list, through the two parts of the image branch."""

from __future__ import annotations

import json

import numpy as np
import pytest
from parity_data import ROOT

from glip_deploy import Detector, load_image
from glip_deploy.prompts import read_prompt_file

NAMES = read_prompt_file(ROOT / "benchmarks" / "classes" / "glip_nano.txt")
SCENES = ROOT / "tests" / "data" / "nano"
SIDE = 224
BOX, SCORE = 0.1, 1e-3
"""Tolerances of the parity report."""


@pytest.fixture(scope="module")
def detectors(nano_bundle):
    """One that runs the image graph, and one that has its two parts open."""
    with (
        Detector.open(nano_bundle, shortest_side=SIDE, cache_dir=None) as whole,
        Detector.open(nano_bundle, shortest_side=SIDE, cache_dir=None) as parts,
    ):
        parts.detect_prompts(np.zeros((32, 32, 3), np.uint8), ["dog", "cat"], color="rgb")
        assert parts.backend._sessions.image is None
        yield whole, parts


@pytest.fixture(scope="module")
def scene():
    entry = next(one for one in json.loads((SCENES / "scenes.json").read_text()) if one["kind"] == "trained")
    return load_image(SCENES / entry["file"]), entry


def by_label(found):
    """Scores and boxes of each class, best first."""
    return {label: (found.scores[found.labels == label], found.boxes[found.labels == label]) for label in found.labels}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for label, (scores, boxes) in theirs.items():
        np.testing.assert_allclose(ours[label][0], scores, atol=SCORE)
        np.testing.assert_allclose(ours[label][1], boxes, atol=BOX)


def test_the_list_is_the_catalog():
    from nano.objects import CATALOG, EXTRA

    assert [name for name, thing in CATALOG.items() if thing.category != EXTRA] == NAMES and len(NAMES) == 290


def test_290_names_are_their_chunks_by_hand(detectors, scene):
    whole, parts = detectors
    picture, entry = scene
    prompt = parts.encode(NAMES)
    assert len(prompt.chunks) > 2
    found = parts.detect(picture, prompt, 0.3, color="rgb", max_detections=5000)
    expected, first = {}, 0
    for chunk in prompt.chunks:
        alone = whole.detect(picture, list(chunk.phrases), 0.3, color="rgb", max_detections=5000)
        expected |= {label + first: of_class for label, of_class in by_label(alone).items()}
        first += len(chunk.phrases)
    assert whole.backend._sessions.image is not None
    assert_same(by_label(found), expected)
    assert {thing["name"] for thing in entry["things"]} & {NAMES[label] for label in found.labels}


def test_a_single_prompt_is_the_same_both_ways(detectors, scene):
    whole, parts = detectors
    picture, entry = scene
    ours, theirs = (one.detect(picture, entry["prompt"], 0.2, color="rgb") for one in (parts, whole))
    assert len(theirs)
    assert_same(by_label(ours), by_label(theirs))
