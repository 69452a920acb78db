"""The facade, on a real (tiny) exported GLIP."""

from __future__ import annotations

import concurrent.futures
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny_glip import CLASSES, HIDDEN

from glip_deploy import Caption, ClassName, Detector, GlipError
from glip_deploy.errors import BundleError, OptionError, PromptError

FRAME = np.random.default_rng(7).integers(0, 256, (90, 120, 3), dtype=np.uint8)
SIDE = 128


@pytest.fixture(scope="module")
def detector(tiny_bundle):
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=None) as opened:
        yield opened


@pytest.fixture
def count_text_runs(monkeypatch):
    """Count how often the text branch runs, in every detector."""
    from glip_deploy.backends.onnxruntime import OnnxRuntimeBackend

    runs = []
    plain = OnnxRuntimeBackend.encode_text

    def counted(self, input_ids):
        runs.append(len(input_ids))
        return plain(self, input_ids)

    monkeypatch.setattr(OnnxRuntimeBackend, "encode_text", counted)
    return runs


def same(a, b):
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.phrases == b.phrases


def inside(found, frame):
    """Officially clipped to the resized size minus one, then scaled: below the frame's size, by less than a pixel."""
    height, width = frame.shape[:2]
    assert (found.boxes >= 0).all() and (found.boxes < [width, height, width, height]).all()


def test_eight_lines_of_use(tiny_bundle):
    detector = Detector.open(f"{tiny_bundle}/", shortest_side=SIDE, longest_side=1333, cache_dir=None)
    prompt = detector.encode(["person", "traffic light"])
    detections = detector.detect(FRAME, prompt, threshold=0.3, color="bgr")
    assert prompt.phrases == ("person", "traffic light") and prompt.embedding.shape == (6, HIDDEN)
    n = len(detections)
    assert 0 < n <= 100
    assert detections.boxes.shape == (n, 4) and detections.boxes.dtype == np.float32
    assert detections.scores.dtype == np.float32 and (np.diff(detections.scores) <= 0).all()
    assert detections.scores.min() > 0.3
    assert set(detections.labels) <= {0, 1}
    assert detections.phrases == [prompt.phrases[label] for label in detections.labels]
    inside(detections, FRAME)
    assert (detections.boxes[:, 2:] > detections.boxes[:, :2]).all()


def test_color_says_which_channel_is_first(detector):
    blue_first = detector.detect(FRAME, CLASSES, 0.2, color="bgr")
    same(blue_first, detector.detect(FRAME[..., ::-1], CLASSES, 0.2, color="rgb"))
    other = detector.detect(FRAME, CLASSES, 0.2, color="rgb")
    assert not np.array_equal(blue_first.scores, other.scores)
    with pytest.raises(GlipError, match="bgr"):
        detector.detect(FRAME, CLASSES, color="grb")


def test_the_text_branch_runs_once_per_prompt(tiny_bundle, tmp_path, count_text_runs):
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=tmp_path) as first:
        for _ in range(3):
            first.detect(FRAME, ["person", "dog"], color="bgr")
        first.encode("person. dog")  # the same caption, so the same embedding
        assert len(count_text_runs) == 1
        embedding = first.encode(["dog"]).embedding
        assert len(count_text_runs) == 2
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=tmp_path) as second:
        np.testing.assert_array_equal(second.encode(["dog"]).embedding, embedding)
        second.encode(["person", "dog"])
    assert len(count_text_runs) == 2
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=None) as third:
        third.encode(["dog"])
    assert len(count_text_runs) == 3


def test_embeddings_of_changed_bytes_never_reach_the_good_bundle(tiny_bundle, tmp_path):
    """With verify=False a damaged text graph runs; what it makes must not be read by those who verify."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    options = {"shortest_side": SIDE, "cache_dir": tmp_path / "cache"}
    weights = bundle / "text.onnx.data"
    good = weights.read_bytes()
    values = np.frombuffer(good, np.float32).copy()
    weights.write_bytes((values * 1.5).tobytes())
    with Detector.open(bundle, verify=False, **options) as changed:
        wrong = changed.encode(CLASSES).embedding
    weights.write_bytes(good)
    with Detector.open(bundle, **options) as verified:
        right = verified.encode(CLASSES).embedding
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=None) as reference:
        np.testing.assert_array_equal(right, reference.encode(CLASSES).embedding)
    assert not np.array_equal(wrong, right)


def test_a_bundle_that_is_replaced_is_an_error_not_a_mixture(tiny_bundle, tmp_path):
    """The text graph is loaded at the first prompt; by then another bundle may be at the path."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with Detector.open(bundle, shortest_side=SIDE, cache_dir=tmp_path / "cache") as detector:
        values = np.frombuffer((bundle / "text.onnx.data").read_bytes(), np.float32)
        (bundle / "text.onnx.data").write_bytes((values * 1.5).tobytes())
        with pytest.raises(
            BundleError, match=r"text\.onnx\.data was changed since the bundle was opened; open it again"
        ):
            detector.encode(CLASSES)
    assert not list((tmp_path / "cache").rglob("*.embedding"))


ENCODE = """
import sys
from glip_deploy import Detector
with Detector.open(sys.argv[1], cache_dir=sys.argv[2]) as detector:
    for i in range(40):
        detector.encode(["person", "cat " * (i % 20) + "dog"])
    print(float(detector.encode(["dog"]).embedding.sum()))
"""


def test_two_processes_share_one_cache(tiny_bundle, tmp_path):
    command = [sys.executable, "-c", ENCODE, str(tiny_bundle), str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], answers
    assert answers[0] == answers[1] and answers[0][1] == ""


def test_a_batch_of_equal_frames_is_each_alone(detector):
    other = FRAME[::-1].copy()
    batch = detector.detect_batch([FRAME, other, FRAME], CLASSES, 0.2, color="bgr")
    single = [detector.detect(frame, CLASSES, 0.2, color="bgr") for frame in (FRAME, other)]
    for found, alone in zip(batch, [*single, single[0]], strict=True):
        assert found.phrases == alone.phrases
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-2)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-4)
    assert detector.detect_batch([], CLASSES, color="bgr") == []


def test_frames_of_unequal_size_have_boxes_in_their_own_pixels(detector):
    small = FRAME[:40, :50].copy()
    found = detector.detect_batch([FRAME, small], CLASSES, 0.2, color="bgr")
    assert all(len(one) for one in found)
    inside(found[0], FRAME)
    inside(found[1], small)


@pytest.mark.parametrize(
    "frame",
    [
        np.full((1, 1, 3), 128, np.uint8),
        FRAME[..., 0],
        FRAME[..., :1],
        np.dstack([FRAME, FRAME[..., :1]]),
        FRAME.astype(np.uint16) * 257,
        FRAME[:, ::-1],
        np.asfortranarray(FRAME),
        FRAME[:1],
        FRAME[:, :1],
    ],
    ids=[
        "1x1",
        "gray",
        "gray with an axis",
        "alpha",
        "16 bit",
        "mirrored view",
        "Fortran order",
        "one row",
        "one column",
    ],
)
def test_frames_of_other_forms(detector, frame):
    found = detector.detect(frame, CLASSES, 0.1, color="bgr")
    inside(found, frame)


def test_16_bit_and_layout_change_nothing(detector):
    plain = detector.detect(FRAME, CLASSES, 0.2, color="bgr")
    same(plain, detector.detect(FRAME.astype(np.uint16) * 257, CLASSES, 0.2, color="bgr"))
    same(plain, detector.detect(np.asfortranarray(FRAME), CLASSES, 0.2, color="bgr"))


def test_a_picture_of_20000_by_20000_is_one_clear_error(detector):
    huge = np.broadcast_to(np.uint8(7), (20_000, 20_000, 3))  # takes no memory
    with pytest.raises(GlipError, match=r"20000, 20000.*400000000 pixels"):
        detector.detect(huge, CLASSES, color="bgr")


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (FRAME / 255.0, "float64"),
        (FRAME.astype(np.float32), "float32"),
        (FRAME.astype(np.int64), "int64"),
        (FRAME > 9, "bool"),
        (FRAME[0, 0], "(3,)"),
        (np.zeros((0, 5, 3), np.uint8), "at least 1 pixel"),
        (FRAME[None], "one picture at a time"),
        (FRAME.transpose(2, 0, 1), "channels come last"),
        ("street.jpg", "not str"),
        (None, "not NoneType"),
    ],
)
def test_what_is_not_a_frame(detector, frame, said):
    with pytest.raises(GlipError) as caught:
        detector.detect(frame, CLASSES, color="bgr")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "no words"),
        ([], "empty list"),
        (" . .. ", "no words"),
        (["dog", "dog"], "dog"),
        (["dog", ""], "class 1"),
        ("a [] hat", "[]"),
    ],
)
def test_malformed_prompts(detector, prompt, said):
    with pytest.raises(PromptError) as caught:
        detector.encode(prompt)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompt_beyond_256_tokens_says_how_many_and_where(detector):
    classes = [*[f"dog {letter} {other}" for letter in "abcdefgh" for other in "ijklmnop"][:63], "red dog", "cat"]
    with pytest.raises(PromptError) as caught:
        detector.encode(". ".join(classes))  # a list is divided
    message = str(caught.value)
    assert "258" in message and "256" in message and "cat" in message
    assert len(detector.encode(classes[:-1]).prompt.input_ids) == 256


@pytest.mark.parametrize("prompt", ["собака", "犬", "🐕", "chien méchant"])
def test_words_the_vocabulary_lacks_are_warned_about_not_refused(detector, caplog, prompt):
    with caplog.at_level(logging.WARNING, "glip_deploy"):
        encoded = detector.encode([prompt, "dog"])
    assert encoded.phrases == (prompt, "dog")
    if prompt != "chien méchant":
        assert prompt in caplog.text
    assert len(detector.detect(FRAME, encoded, 0.2, color="bgr")) > 0


def test_every_form_of_prompt(detector):
    text = "a man with a green hat"
    forms = {
        "brackets": detector.encode("a man with a [green hat]"),
        "spans": detector.encode(Caption(text, spans=[(13, 22)])),
    }
    assert forms["brackets"].prompt == forms["spans"].prompt
    assert forms["spans"].phrases == ("green hat",)
    assert detector.encode([ClassName("dog", suffix=", a red one")]).phrases == ("dog",)
    assert detector.encode("dog . cat . ").phrases == ("dog", "cat")


def test_thresholds_in_every_form(detector):
    everything = detector.detect(FRAME, CLASSES, 0.0, color="bgr")
    assert len(everything) == 100
    prompt = detector.encode(list(CLASSES))
    for threshold in ([0.9, 0.3, 0.3], {"person": 0.9, "red car": 0.3, "dog": 0.3}):
        found = detector.detect(FRAME, prompt, threshold, color="bgr")
        assert "person" not in found.phrases and len(found)
    strict = detector.detect(FRAME, prompt, 0.999, color="bgr")
    assert len(strict) == 0 and strict.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        (1.5, "1.5"),
        (-0.1, "-0.1"),
        (float("nan"), "nan"),
        ([0.5], "3 classes"),
        ([0.5, 0.5, 2], "class 2"),
        ({"horse": 0.5}, "'horse'"),
        ({"persn": 0.5}, "did you mean 'person'"),
        ("high", "'high'"),
        (None, "None"),
        (True, "True"),
    ],
)
def test_thresholds_that_cannot_be(detector, threshold, said):
    with pytest.raises(GlipError) as caught:
        detector.detect(FRAME, CLASSES, threshold, color="bgr")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_threshold_only_takes_away(detector):
    """What is above a threshold is the same whatever lower one it was found with."""
    loose = detector.detect(FRAME, CLASSES, 0.3, color="bgr")
    limit = float(np.median(loose.scores))
    strict = detector.detect(FRAME, CLASSES, limit, color="bgr")
    kept = loose.scores > limit
    assert 0 < kept.sum() == len(strict) < len(loose)
    np.testing.assert_array_equal(loose.scores[kept], strict.scores)
    np.testing.assert_array_equal(loose.boxes[kept], strict.boxes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "tflite"}, "tflite"),
        ({"resize": "bicubic"}, '"exact" or "fast" or "gpu"'),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 3000}, "threads is 3000; it must be a whole number of at least 1 and at most 512"),
        ({"shortest_side": 0}, "shortest_side is 0"),
        ({"longest_side": -1}, "longest_side is -1"),
        ({"shortest_side": 800.5}, "shortest_side is 800.5; it must be a whole number"),
        ({"longest_side": 64_000_001}, "at most 64000000"),
    ],
)
def test_options_out_of_range(tiny_bundle, options, said):
    with pytest.raises(OptionError, match=said):
        Detector.open(tiny_bundle, **options)


def test_several_threads_get_what_one_gets(detector):
    frames = [np.roll(FRAME, i, axis=1) for i in range(8)]
    alone = [detector.detect(frame, CLASSES, 0.2, color="bgr") for frame in frames]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda frame: detector.detect(frame, CLASSES, 0.2, color="bgr"), frames))
    for a, b in zip(alone, together, strict=True):
        same(a, b)


def test_several_threads_may_encode(tiny_bundle):
    prompts = [["dog", "cat " * (i % 4) + "person"] for i in range(16)]
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=None) as detector:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            together = list(pool.map(detector.encode, prompts))
        with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=None) as other:
            for prompt, encoded in zip(prompts, together, strict=True):
                np.testing.assert_array_equal(encoded.embedding, other.encode(prompt).embedding)


def test_an_embedding_cannot_be_changed_by_accident(detector):
    for _ in range(2):  # the second time it comes from the cache
        encoded = detector.encode(["dog", "a green hat"])
        with pytest.raises(ValueError, match="read-only"):
            encoded.embedding[0] = 0


def test_a_closed_detector_says_so(tiny_bundle):
    detector = Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=None)
    detector.close()
    with pytest.raises(GlipError, match="closed"):
        detector.detect(FRAME, CLASSES, color="bgr")
    with pytest.raises(GlipError, match="closed"):
        detector.encode(["a prompt it has not seen"])


def test_an_embedding_of_another_model_is_one_clear_error(detector):
    from dataclasses import replace

    encoded = detector.encode(["dog"])
    foreign = replace(encoded, embedding=np.zeros((3, HIDDEN + 1), np.float32))
    with pytest.raises(GlipError, match="text_embedding"):
        detector.detect(FRAME, foreign, color="bgr")


def test_the_fast_resize_is_near_the_exact_one(tiny_bundle, detector):
    large = np.kron(FRAME[::2, ::2], np.ones((6, 6, 1), np.uint8))
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=None, resize="fast") as fast:
        a, b = (d.detect(large, CLASSES, 0.2, color="bgr") for d in (fast, detector))
    assert abs(float(a.scores[0]) - float(b.scores[0])) < 0.1


def test_a_text_given_with_every_frame_is_read_once(detector, monkeypatch):
    from glip_deploy import detector as module

    read = []
    for name in ("parse_prompt", "parse_chunks"):
        parse = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda text, *rest, parse=parse, **kw: read.append(text) or parse(text, *rest, **kw)
        )
    names = ["owl", "red kite"]
    frame = np.zeros((32, 32, 3), np.uint8)
    for _ in range(3):
        detector.detect(frame, names, color="bgr")
        detector.detect(frame, "owl. red kite", color="bgr")
    assert read == [["owl", "red kite"], "owl. red kite"]
    names[1] = "kestrel"  # the list itself is not what is remembered
    assert detector.encode(names).phrases == ("owl", "kestrel")
    assert detector.encode("owl. red kite", phrases="dots") is not detector.encode("owl. red kite")
    with pytest.raises(PromptError):
        detector.encode(["owl", ["red"]])
