"""The model that Triton runs, against a stand-in for Triton's module: grouping, outputs, errors of single requests."""

import base64
import importlib
import io
import json
import sys

import numpy as np
import pytest
import triton_stand_in
from PIL import Image
from triton_stand_in import Request, arguments

from glip_deploy import Detector, load_image
from glip_deploy.errors import OptionError
from glip_deploy.frames.load import decode_image
from glip_deploy.triton_model import INPUTS, OUTPUTS, PARAMETERS, GlipModel, Settings

SMALL = {"shortest_side": "96", "longest_side": "160", "threshold": "0.2", "cache_dir": ""}
PROMPT = "cat. dog. traffic light"


@pytest.fixture(scope="module")
def pictures():
    """JPEG bytes: two of one size, one of another."""
    noise = np.random.default_rng(5)
    sizes = [(60, 80), (60, 80), (90, 70)]
    return [jpeg(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture
def triton(monkeypatch):
    module = triton_stand_in.as_module()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return module


@pytest.fixture
def folder(tiny_bundle, tmp_path):
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    return tmp_path


@pytest.fixture
def model(triton, folder):
    made = opened(folder, SMALL)
    yield made
    made.finalize()


@pytest.fixture(scope="module")
def detector(tiny_bundle):
    with Detector.open(tiny_bundle, shortest_side=96, longest_side=160, cache_dir=None) as opened:
        yield opened


def opened(folder, parameters, **options):
    made = type("TritonPythonModel", (GlipModel,), {"folder": folder})()
    made.initialize(arguments(parameters, **options))
    return made


def jpeg(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=92)
    return file.getvalue()


def expected(detector, picture, prompt=PROMPT, threshold=0.2):
    return detector.detect(decode_image(picture), prompt, threshold, color="rgb")


def assert_row(arrays, row, found):
    count = len(found)
    assert count == arrays["COUNT"][row, 0]
    np.testing.assert_allclose(arrays["BOXES"][row, :count], found.boxes, atol=1e-3)
    np.testing.assert_allclose(arrays["SCORES"][row, :count], found.scores, atol=1e-5)
    assert arrays["LABELS"][row, :count].tolist() == found.labels.tolist()
    assert [phrase.decode() for phrase in arrays["PHRASES"][row, :count]] == found.phrases
    assert not arrays["BOXES"][row, count:].any() and not arrays["SCORES"][row, count:].any()
    assert set(arrays["LABELS"][row, count:].tolist()) <= {-1}
    assert set(arrays["PHRASES"][row, count:].tolist()) <= {b""}
    told = json.loads(arrays["DETECTIONS"][row, 0])
    assert [one["label"] for one in told] == found.phrases
    assert [one["score"] for one in told] == pytest.approx(found.scores.tolist(), abs=1e-5)
    assert all(list(one["box"]) == ["xmin", "ymin", "xmax", "ymax"] for one in told)


def test_a_request_gets_what_the_detector_finds(model, detector, pictures):
    [answer] = model.execute([Request(pictures[:1], [PROMPT])])
    arrays = answer.arrays()
    assert list(arrays) == [one.name for one in OUTPUTS]
    found = expected(detector, pictures[0])
    assert len(found) > 5
    assert_row(arrays, 0, found)
    assert arrays["BOXES"].shape == (1, len(found), 4) and arrays["BOXES"].dtype == np.float32
    assert arrays["LABELS"].dtype == np.int64 and arrays["COUNT"].dtype == np.int32


def test_requests_together_get_what_each_gets_alone(model, detector, pictures):
    requests = [
        Request([pictures[0]], [PROMPT]),
        Request([pictures[2], pictures[1]], [PROMPT, "sofa"]),
        Request([pictures[1]], [PROMPT], [[0.4]]),
        Request([pictures[1], pictures[0]], [PROMPT, PROMPT], [[0.2, 0.9, 0.3], [0.9, 0.2, 0.2]]),
    ]
    together = [answer.arrays() for answer in model.execute(requests)]
    assert_row(together[0], 0, expected(detector, pictures[0]))
    assert_row(together[1], 0, expected(detector, pictures[2]))
    assert_row(together[1], 1, expected(detector, pictures[1], "sofa"))
    assert_row(together[2], 0, expected(detector, pictures[1], threshold=0.4))
    assert_row(together[3], 0, expected(detector, pictures[1], threshold=[0.2, 0.9, 0.3]))
    assert_row(together[3], 1, expected(detector, pictures[0], threshold=[0.9, 0.2, 0.2]))


def test_pictures_of_one_size_and_prompt_are_run_at_once(model, pictures, monkeypatch):
    runs = []
    whole = model._detector.detect_batch

    def counted(frames, *arguments, **options):
        runs.append(len(frames))
        return whole(frames, *arguments, **options)

    monkeypatch.setattr(model._detector, "detect_batch", counted)
    model.execute([Request([pictures[i]], [PROMPT]) for i in (0, 1, 2, 0)] + [Request([pictures[0]], ["sofa"])])
    assert sorted(runs) == [1, 1, 3]
    runs.clear()
    model._max_batch = 2
    model.execute([Request([pictures[0]], [PROMPT]) for _ in range(5)])
    assert runs == [2, 2, 1]


def test_only_what_is_asked_for_is_made(model, pictures):
    [answer] = model.execute([Request([pictures[0]], [PROMPT], wanted=("DETECTIONS",))])
    assert list(answer.arrays()) == ["DETECTIONS"]


def test_nothing_found_gives_empty_arrays(model, pictures):
    [answer] = model.execute([Request([pictures[0]], [PROMPT], [[1.0]])])
    arrays = answer.arrays()
    assert arrays["BOXES"].shape == (1, 0, 4) and arrays["PHRASES"].shape == (1, 0)
    assert arrays["COUNT"].tolist() == [[0]] and arrays["DETECTIONS"].tolist() == [[b"[]"]]


@pytest.mark.parametrize("prompt", ['["cat", "dog", "traffic light"]', "[cat] near a [dog] at a [traffic light]"])
def test_lists_and_captions(model, detector, pictures, prompt):
    [answer] = model.execute([Request([pictures[0]], [prompt])])
    wanted = json.loads(prompt) if prompt.startswith('["') else prompt
    assert_row(answer.arrays(), 0, expected(detector, pictures[0], wanted))


def test_a_data_url(model, detector, pictures):
    url = b"data:image/jpeg;base64," + base64.b64encode(pictures[0])
    [answer] = model.execute([Request([url], [PROMPT])])
    assert_row(answer.arrays(), 0, expected(detector, pictures[0]))


def test_what_is_wrong_with_a_request_is_its_own_error(model, detector, pictures, tmp_path):
    bad = {
        "picture is empty (0 bytes); give the bytes of a JPEG or PNG file": Request([b""], [PROMPT]),
        "picture is not in a format Pillow can read; convert it to JPEG or PNG": Request([b"text"], [PROMPT]),
        "picture 2 of 2 cannot be decoded": Request([pictures[0], pictures[0][:600]], [PROMPT, PROMPT]),
        "picture is a data URL that cannot be read": Request([b"data:image/jpeg,AAAA"], [PROMPT]),
        "the prompt '' has no words; name what to detect": Request([pictures[0]], [""]),
        "the prompt is not UTF-8 (invalid start byte at byte 0); send it as UTF-8": Request([pictures[0]], [b"\xff"]),
        "threshold of all classes is 2.0; it must be a number in [0, 1]": Request([pictures[0]], [PROMPT], [[2.0]]),
        "the prompt has 3 classes": Request([pictures[0]], [PROMPT], [[0.5, 0.5]]),
    }
    good = Request([pictures[0]], [PROMPT])
    answers = model.execute([good, *bad.values(), good])
    for message, answer in zip(bad, answers[1:-1], strict=True):
        assert answer.error is not None and message in answer.error.text, answer.error and answer.error.text
        assert answer.error.kind == "invalid" and "\n" not in answer.error.text
    for answer in (answers[0], answers[-1]):
        assert_row(answer.arrays(), 0, expected(detector, pictures[0]))
    # The words are those of the command line.
    (tmp_path / "text.jpg").write_bytes(b"text")
    with pytest.raises(Exception, match="is not in a format Pillow can read; convert it to JPEG or PNG"):
        load_image(tmp_path / "text.jpg")


def test_a_fault_of_the_model_is_an_error_of_its_requests_alone(model, pictures, triton, monkeypatch):
    whole = model._detector.detect_batch

    def fails(frames, *arguments, **options):
        if frames[0].shape[0] == 90:
            raise RuntimeError("out of\nmemory")
        return whole(frames, *arguments, **options)

    monkeypatch.setattr(model._detector, "detect_batch", fails)
    good, bad = model.execute([Request([pictures[0]], [PROMPT]), Request([pictures[2]], [PROMPT])])
    assert good.error is None
    assert (bad.error.text, bad.error.kind) == ("RuntimeError: out of memory", "internal")
    assert any("out of" in line for line in triton.logged)


def test_a_request_that_was_canceled_is_not_run(model, pictures, monkeypatch):
    monkeypatch.setattr(model._detector, "detect_batch", lambda *_, **__: pytest.fail("it was run"))
    [answer] = model.execute([Request([pictures[0]], [PROMPT], canceled=True)])
    assert answer.error.kind == "canceled"


def test_a_prompt_is_encoded_once(model, pictures, monkeypatch):
    encoded = []
    whole = model._detector.backend.encode_text
    monkeypatch.setattr(model._detector.backend, "encode_text", lambda ids: encoded.append(1) or whole(ids))
    model._detector._cache._root = None
    for _ in range(3):
        model.execute([Request([pictures[0]], ["a word that is new"]) for _ in range(2)])
    assert encoded == [1]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"thread": "2"}, "parameter 'thread' is unknown; legal is backend, precision, engines, threads"),
        ({"threads": "two"}, "parameter threads is 'two'; it must be a whole number"),
        ({"threads": "0"}, "threads is 0"),
        ({"threshold": "50"}, "parameter threshold is '50'; it must be a number in [0, 1]"),
        ({"backend": "torch"}, 'backend "torch" is unknown; legal is onnxruntime'),
        ({"resize": "nearest"}, "resize is 'nearest'"),
    ],
)
def test_a_parameter_that_is_not_legal(triton, folder, parameters, message):
    with pytest.raises(triton_stand_in.TritonModelException) as raised:
        opened(folder, SMALL | parameters)
    assert message in str(raised.value)


def test_a_bundle_that_is_missing(triton, tmp_path):
    with pytest.raises(triton_stand_in.TritonModelException, match=r"bundle .* does not exist"):
        opened(tmp_path, SMALL)


def test_parameters():
    settings = Settings.of({"longest_side": "0", "max_detections": " 7 ", "EXECUTION_ENV_PATH": "/env.tar.gz"})
    assert settings.options["longest_side"] is None and settings.options["shortest_side"] == 800
    assert settings.max_detections == 7 and settings.threshold == 0.5 and "cache_dir" not in settings.options
    assert Settings.of(PARAMETERS) == Settings.of({})
    with pytest.raises(OptionError):
        Settings.of({"max_detections": "many"})


def test_max_detections(triton, folder, pictures):
    model = opened(folder, SMALL | {"max_detections": "3"})
    [answer] = model.execute([Request([pictures[0]], [PROMPT])])
    assert answer.arrays()["COUNT"].tolist() == [[3]]
    model.finalize()


def test_an_instance_sees_its_own_gpu_only(triton, folder, monkeypatch):
    for seen, device, expected_value in (("", "1", "1"), ("4,6", "1", "6"), ("GPU-ab", "0", "GPU-ab")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        made = type("TritonPythonModel", (GlipModel,), {"folder": folder})()
        made.initialize(arguments(SMALL) | {"model_instance_kind": "GPU", "model_instance_device_id": device})
        import os

        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected_value
        made.finalize()


def test_the_module_needs_no_triton():
    assert "triton_python_backend_utils" not in sys.modules
    assert importlib.import_module("glip_deploy.triton_model").INPUTS is INPUTS
