"""More classes than a prompt has room for, and several prompts in one frame, through the facade."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from split_bundle import unsplit

from glip_deploy import ChunkedPrompt, Detector
from glip_deploy.detector import FrameStep
from glip_deploy.errors import OptionError, PromptError

FRAME = np.random.default_rng(7).integers(0, 256, (90, 120, 3), dtype=np.uint8)
SIDE = 128
WORDS = ("person", "red car", "dog", "traffic light", "cat")
NAMES = [f"{word} with a {letter}" for letter in "bcdefghijklmnopqrstu" for word in WORDS]


@pytest.fixture(scope="module")
def detector(tiny_bundle):
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=None) as opened:
        yield opened


@pytest.fixture
def runs(monkeypatch):
    """Names of the graphs that ran, in order."""
    from glip_deploy.backends import onnxruntime

    graphs, plain = [], onnxruntime._run

    def run(session, outputs, feed):
        graphs.append("text" if "input_ids" in feed else "backbone" if len(feed) == 2 else "head")
        graphs[-1] = "image" if {"frames", "class_map"} <= set(feed) else graphs[-1]
        return plain(session, outputs, feed)

    monkeypatch.setattr(onnxruntime, "_run", run)
    return graphs


def same(a, b, atol=0.0):
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=atol, rtol=0)
    assert a.phrases == b.phrases


def test_a_long_list_is_its_chunks_run_by_hand(detector, runs):
    prompt = detector.encode(NAMES)
    assert isinstance(prompt, ChunkedPrompt) and prompt.phrases == tuple(NAMES) and len(prompt.chunks) > 2
    assert len({len(chunk.embedding) for chunk in prompt.chunks}) > 1
    runs.clear()
    found = detector.detect(FRAME, prompt, 0.2, color="bgr", max_detections=9000)
    assert runs == ["backbone"] + ["head"] * len(prompt.chunks)
    # By hand: every chunk is a prompt of its own, and its labels follow those of the chunks before it.
    by_label, first = {}, 0
    for chunk in prompt.chunks:
        alone = detector.encode([*chunk.phrases])
        for one in detector.detect(FRAME, alone, 0.2, color="bgr", max_detections=9000):
            by_label.setdefault(one.label + first, []).append(one)
        first += len(chunk.phrases)
    assert len(found) == sum(map(len, by_label.values())) > 50
    for label, expected in by_label.items():
        ours = [detection for detection in found if detection.label == label]
        assert [d.phrase for d in ours] == [NAMES[label]] * len(expected)
        np.testing.assert_allclose([d.score for d in ours], [d.score for d in expected], atol=1e-5)
        np.testing.assert_allclose([d.box for d in ours], [d.box for d in expected], atol=1e-2)


def test_the_limit_is_over_all_chunks(detector):
    prompt = detector.encode(NAMES)
    everything = detector.detect(FRAME, prompt, 0.2, color="bgr", max_detections=9000)
    assert len(everything) > 300
    for limit, kept in ((None, 100), (300, 300), (7, 7)):
        found = detector.detect(FRAME, prompt, 0.2, color="bgr", max_detections=limit)
        assert len(found) >= kept  # ties with the last one are kept
        same(found, everything[: len(found)])
        assert len(found) == kept or found.scores[kept - 1] == found.scores[-1]
    with pytest.raises(OptionError, match="max_detections is 0"):
        detector.detect(FRAME, prompt, color="bgr", max_detections=0)


def test_thresholds_reach_every_chunk(detector):
    prompt = detector.encode(NAMES)
    last = NAMES[-1]
    found = detector.detect(FRAME, prompt, dict.fromkeys(NAMES, 1.0) | {last: 0.1}, color="bgr")
    assert len(found) and set(found.labels) == {len(NAMES) - 1} and set(found.phrases) == {last}
    with pytest.raises(PromptError, match="threshold is given for 'boat'"):
        detector.detect(FRAME, prompt, {"boat": 0.3}, color="bgr")
    with pytest.raises(OptionError, match=f"the prompt has {len(NAMES)} classes"):
        detector.detect(FRAME, prompt, [0.5] * 3, color="bgr")


def test_each_chunk_is_cached(tiny_bundle, tmp_path, runs):
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=tmp_path) as first:
        chunks = len(first.encode(NAMES).chunks)
        assert runs.count("text") == chunks
        first.encode([*NAMES[:50], "dog with a green hat", *NAMES[51:]])
        assert runs.count("text") == chunks + 1
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=tmp_path) as second:
        second.encode(NAMES)
    assert runs.count("text") == chunks + 1


def test_a_warning_says_once_that_scores_are_not_calibrated(tiny_bundle, caplog):
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=None) as opened, caplog.at_level(logging.WARNING):
        opened.encode(["dog"])
        assert not caplog.records
        opened.encode(NAMES)
        opened.encode(NAMES[1:])
        opened.clone().encode(NAMES)
    assert ["not calibrated" in record.message for record in caplog.records] == [True]


def test_the_parts_take_the_place_of_the_whole_graph(tiny_bundle, runs):
    """No weight is held twice: the parts are opened by the first frame that needs them, and serve all from then on."""
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=None) as opened:
        sessions = opened.backend._sessions
        before = opened.detect(FRAME, ["dog"], 0.2, color="bgr")
        assert runs == ["text", "image"] and sessions._parts is None
        opened.detect(FRAME, NAMES, 0.2, color="bgr")
        assert sessions.image is None and sessions.parts is not None
        runs.clear()
        after = opened.detect(FRAME, ["dog"], 0.2, color="bgr")
        assert runs == ["backbone", "head"]
        same(after, before, atol=1e-3)


def test_a_bundle_of_before_runs_its_image_graph_for_every_chunk(tiny_bundle, tmp_path, detector, runs, caplog):
    with Detector.open(unsplit(tiny_bundle, tmp_path / "old"), shortest_side=SIDE, cache_dir=None) as old:
        prompt = old.encode(NAMES)
        runs.clear()
        caplog.clear()
        for _ in range(2):
            found = old.detect(FRAME, prompt, 0.2, color="bgr")
        assert runs == ["image"] * 2 * len(prompt.chunks)
        assert ["export it again with glip-export" in record.message for record in caplog.records] == [True]
    same(found, detector.detect(FRAME, prompt, 0.2, color="bgr"), atol=1e-3)


def test_several_frames_with_many_classes(detector):
    frames = [FRAME, FRAME[::-1].copy()]
    prompt = detector.encode(NAMES)
    for found, frame in zip(detector.detect_batch(frames, prompt, 0.2, color="bgr"), frames, strict=True):
        same(found, detector.detect(frame, prompt, 0.2, color="bgr"), atol=1e-2)


def test_a_caption_is_not_divided(detector):
    with pytest.raises(PromptError, match="give a list of names, which may have any length"):
        detector.encode("a [dog] " * 200)
    with pytest.raises(OptionError, match="classes_per_prompt is 40, but the prompt is no list"):
        detector.encode("dog. cat", classes_per_prompt=40)
    assert [len(chunk.phrases) for chunk in detector.encode(NAMES[:9], classes_per_prompt=4).chunks] == [4, 4, 1]
    with pytest.raises(AttributeError, match="each of its 3 chunks has one"):
        detector.encode(NAMES[:9], classes_per_prompt=4).embedding  # noqa: B018


# -- several prompts ------------------------------------------------------------------------------------------------


def test_several_prompts_run_the_backbone_once(detector, runs):
    prompts = [detector.encode(["person", "dog"]), detector.encode(NAMES), detector.encode("a man with a [green hat]")]
    runs.clear()
    timings = {}
    found = detector.detect_prompts(FRAME, prompts, 0.2, color="bgr", timings=timings)
    assert runs == ["backbone"] + ["head"] * sum(len(prompt.chunks) for prompt in prompts)
    assert set(timings) == set(FrameStep)
    assert len(found) == 3
    for one, prompt in zip(found, prompts, strict=True):
        same(one, detector.detect(FRAME, prompt, 0.2, color="bgr"), atol=1e-3)


def test_prompts_that_are_not_encoded_yet_and_thresholds_of_their_own(detector):
    first, second = detector.detect_prompts(FRAME, [["dog", "cat"], "person"], [{"dog": 0.3}, 0.1], color="bgr")
    same(first, detector.detect(FRAME, ["dog", "cat"], {"dog": 0.3}, color="bgr"), atol=1e-3)
    same(second, detector.detect(FRAME, "person", 0.1, color="bgr"), atol=1e-3)


@pytest.mark.parametrize(
    ("prompts", "threshold", "kind", "said"),
    [
        ([], 0.5, PromptError, "empty list of prompts; give at least one"),
        ("person. dog", 0.5, PromptError, "put the prompt into a list"),
        (["person", "dog"], [0.5], OptionError, "1 thresholds are given for 2 prompts"),
        (["person", "dog"], {"dog": 0.4}, OptionError, "one entry for each prompt"),
    ],
)
def test_prompts_it_cannot_take(detector, prompts, threshold, kind, said):
    with pytest.raises(kind, match=said):
        detector.detect_prompts(FRAME, prompts, threshold, color="bgr")
