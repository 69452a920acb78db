"""OpenVINO: the answers of ONNX Runtime in f32, borders of feature maps included, and a line for what it cannot do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
import threading
import types
from dataclasses import replace

import numpy as np
import pytest
from backend_inputs import IDS, error_of, feed
from parity_data import ROOT
from selection import slow, slowly
from simulated_tensorrt import SimulatedDeviceArray
from tiny_glip import HIDDEN

from glip_deploy import Bundle, Detector, load_image
from glip_deploy.backends import BACKENDS, open_backend, openvino
from glip_deploy.backends.compiled import CompiledCache
from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.backends.openvino import OpenVINOBackend, Precision, openvino_absence, read_graph
from glip_deploy.errors import BackendError, ClosedError, FrameError, MissingPackage, OptionError
from glip_deploy.frames.device import device_canvas

SCENES = ROOT / "tests" / "data" / "nano"


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def backend(bundle, cache):
    opened = open_backend("openvino", bundle, None, cache_dir=cache)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def reference(bundle):
    return open_backend("onnxruntime", bundle, None)


@pytest.mark.parametrize(("batch", "height", "width", "tokens", "classes"), [(1, 64, 96, 4, 2), (2, 96, 64, 7, 3)])
def test_it_agrees_with_onnxruntime_at_any_size_and_batch(backend, reference, batch, height, width, tokens, classes):
    inputs = feed(batch, height, width, tokens, classes)
    found, wanted = backend.detect(inputs), reference.detect(inputs)
    for name in ("boxes", "scores", "labels"):
        here, there = getattr(found, name), getattr(wanted, name)
        assert here.shape == there.shape and here.dtype == there.dtype
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
    np.testing.assert_allclose(backend.encode_text(IDS), reference.encode_text(IDS), atol=1e-5)
    assert backend.encode_text(IDS).shape == (4, HIDDEN)


def deform_graph(bias, mask):
    """A deformable convolution whose samples lie on both sides of the border, as a serialized graph, and its inputs."""
    from onnx import TensorProto, helper

    rng = np.random.default_rng(3)
    shapes = {"X": (2, 4, 6, 7), "W": (3, 4, 3, 3), "offset": (2, 18, 6, 7), "B": (3,), "mask": (2, 9, 6, 7)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["offset"] *= 3
    if not bias:
        del arrays["B"]
    if not mask:
        del arrays["mask"]
    inputs = ["X", "W", "offset", "B" if bias else "", *(["mask"] if mask else [])]
    node = helper.make_node("DeformConv", inputs, ["Y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], offset_group=1)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in arrays.items()]
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, [2, 3, 6, 7])
    graph = helper.make_graph([node], "deform", values, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString(), arrays


@pytest.mark.parametrize(("bias", "mask"), [(True, True), (True, False)])
def test_samples_at_the_border_are_those_of_onnx(bias, mask):
    import openvino

    model, arrays = deform_graph(bias, mask)
    (wanted,) = open_session(model).run(None, arrays)
    compiled = openvino.Core().compile_model(read_graph(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled(arrays)[0], wanted, atol=1e-5)


def test_those_samples_depend_on_how_the_border_is_interpolated(monkeypatch):
    """OpenVINO's default, with which the test above would fail."""
    import openvino
    from openvino import opset8

    model, arrays = deform_graph(bias=True, mask=True)
    (wanted,) = open_session(model).run(None, arrays)
    exact = opset8.deformable_convolution
    monkeypatch.setattr(
        opset8,
        "deformable_convolution",
        lambda *inputs, **options: exact(*inputs, **{**options, "bilinear_interpolation_pad": False}),
    )
    compiled = openvino.Core().compile_model(read_graph(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert np.abs(compiled(arrays)[0] - wanted).max() > 0.1


def same(found, wanted):
    assert len(found) == len(wanted)
    np.testing.assert_array_equal(found.labels, wanted.labels)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes, wanted.boxes, atol=0.01)


def test_glip_nano_finds_the_same_things_in_its_scenes(nano_bundle):
    options = {"shortest_side": 224, "cache_dir": None}
    entries = json.loads((SCENES / "scenes.json").read_text())[::5]
    with (
        Detector.open(nano_bundle, backend="openvino", **options) as detector,
        Detector.open(nano_bundle, **options) as reference,
    ):
        for entry in entries:
            arguments = load_image(SCENES / entry["file"]), entry["prompt"], 0.1
            wanted = reference.detect(*arguments, color="rgb")
            assert len(wanted) > 3
            same(detector.detect(*arguments, color="rgb"), wanted)


def test_bf16_or_the_reason_why_not(bundle, backend):
    reason = openvino_absence(Precision.BF16)
    if reason is not None:
        assert "has no instructions for it: use f32 or auto" in reason
        assert open_backend("openvino", bundle, None, precision="auto").precision == "f32"
        return
    rounded = open_backend("openvino", bundle, None, precision="auto")
    assert (backend.precision, rounded.precision) == ("f32", "bf16")
    inputs = feed()
    difference = np.abs(rounded.detect(inputs).scores - backend.detect(inputs).scores).max()
    assert 1e-7 < difference < 0.1


def test_a_cpu_without_bf16(bundle, monkeypatch):
    core = types.SimpleNamespace(get_property=lambda device, name: ["FP32"] if name.startswith("OPT") else "Old CPU")
    monkeypatch.setattr("glip_deploy.backends.openvino._core", lambda: core)
    message = error_of(lambda: open_backend("openvino", bundle, None, precision="bf16"), kind=OptionError)
    assert message == 'precision is "bf16"; this CPU (Old CPU) has no instructions for it: use f32 or auto'


def test_an_unknown_precision_and_one_for_another_backend(bundle):
    message = error_of(lambda: open_backend("openvino", bundle, None, precision="int4"), kind=OptionError)
    assert message == 'precision is "int4"; backend openvino takes f32, bf16, auto'
    for name in BACKENDS:
        if name != "openvino":
            message = error_of(lambda name=name: open_backend(name, bundle, None, precision="bf16"), kind=OptionError)
            assert f"which backend {name} cannot choose; use backend openvino" in message


def test_openvino_that_is_not_installed(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    message = error_of(open_backend, "openvino", bundle, None, kind=MissingPackage)
    assert message == "OpenVINO is not installed; pip install 'glip-deploy[openvino]'" == openvino_absence()


@pytest.mark.parametrize("version", ["2025.4.1-20426-82bbf0292c5-releases/2025/4", "2022.3.0"])
def test_openvino_that_is_too_old(bundle, monkeypatch, version):
    import openvino

    monkeypatch.setattr(openvino, "__version__", version)
    message = error_of(open_backend, "openvino", bundle, None, kind=BackendError)
    assert version in message and "pip install -U 'openvino>=2026.0'" in message


@pytest.mark.parametrize("content", [b"", b"not a graph"])
def test_a_graph_it_cannot_load(bundle, tmp_path, content):
    (tmp_path / "image.onnx").write_bytes(content)
    message = error_of(open_backend, "openvino", Bundle(tmp_path, bundle.manifest), None, kind=BackendError)
    assert f"cannot load {tmp_path / 'image.onnx'}" in message and "export the bundle again" in message
    assert "src/" not in message


def test_what_the_graph_refuses_is_named_with_its_shapes(backend):
    inputs = feed()
    short = replace(inputs, text_embedding=inputs.text_embedding[..., :-1])
    message = error_of(backend.detect, short, kind=BackendError)
    assert "OpenVINO failed on" in message and f"text_embedding (1, 4, {HIDDEN - 1})" in message
    backend.detect(inputs)  # and goes on


def test_frames_in_gpu_memory_are_refused(backend):
    canvas = device_canvas([SimulatedDeviceArray(np.zeros((64, 64, 3), np.uint8))], color="rgb")
    assert "in GPU memory" in error_of(backend.detect, replace(feed(), frames=canvas), kind=FrameError)


def test_clones_share_the_compiled_graphs_and_close_apart(bundle, cache, backend):
    opened = open_backend("openvino", bundle, None, cache_dir=cache)
    twin = opened.clone()
    before = opened.detect(feed())
    assert twin._graphs.image is opened._graphs.image
    opened.close()
    opened.close()
    for call in (lambda: opened.detect(feed()), lambda: opened.encode_text(IDS), opened.clone):
        assert "is closed" in error_of(call, kind=ClosedError)
    np.testing.assert_array_equal(twin.detect(feed()).scores, before.scores)
    twin.close()


def two_prompts(**size):
    """The same frames with prompts of two lengths."""
    first = feed(tokens=4, classes=2, **size)
    second = feed(tokens=7, classes=3, **size)
    return [first, replace(second, frames=first.frames)]


@pytest.mark.parametrize("batch", [1, 2])
def test_several_prompts_run_the_backbone_once_and_agree_with_onnxruntime(bundle, cache, reference, monkeypatch, batch):
    opened = open_backend("openvino", bundle, None, cache_dir=cache)
    given, runs = two_prompts(batch=batch), []
    infer = opened._infer

    def counted(compiled, inputs):
        runs.append(sorted(inputs)[0] if "frames" not in inputs else "frames")
        return infer(compiled, inputs)

    monkeypatch.setattr(opened, "_infer", counted)
    found = opened.detect_prompts(given)
    assert runs.count("frames") == 1 and len(runs) == 3
    for ours, theirs in zip(found, reference.detect_prompts(given), strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-2)
        np.testing.assert_array_equal(np.sort(ours.labels), np.sort(theirs.labels))  # classes of `feed` are tied
    opened.close()


def test_the_parts_take_the_place_of_the_whole_in_clones_too(bundle, cache, backend):
    opened = open_backend("openvino", bundle, None, cache_dir=cache)
    twin, given = opened.clone(), two_prompts()
    alone = [twin.detect(one) for one in given]
    whole = opened._graphs.image
    together = opened.detect_prompts(given)
    assert opened._graphs.image is None and whole is not None
    for one, ours, apart in zip(given, together, alone, strict=True):
        for again in (ours, twin.detect(one), opened.detect(one)):
            np.testing.assert_allclose(again.scores, apart.scores, atol=1e-6)
            np.testing.assert_allclose(again.boxes, apart.boxes, atol=1e-3)
    assert whole not in twin._requests
    assert opened.detect_prompts([]) == []
    opened.close()
    with pytest.raises(ClosedError):
        opened.detect_prompts(given)


def test_a_bundle_without_parts_runs_whole_and_says_so_once(tiny_bundle, cache, tmp_path, caplog):
    shutil.copytree(tiny_bundle, tmp_path / "glip")
    manifest = json.loads((tmp_path / "glip" / "manifest.json").read_text())
    for name in ("backbone.onnx", "head.onnx"):
        (tmp_path / "glip" / name).unlink()
        del manifest["files"][name]
    (tmp_path / "glip" / "manifest.json").write_text(json.dumps(manifest))
    opened, given = open_backend("openvino", Bundle.open(tmp_path / "glip"), None, cache_dir=cache), two_prompts()
    for _ in range(2):
        together = opened.detect_prompts(given)
    assert caplog.text.count("lacks backbone.onnx and head.onnx") == 1
    for ours, one in zip(together, given, strict=True):
        np.testing.assert_array_equal(ours.scores, opened.detect(one).scores)


@slowly
def test_parts_that_cannot_be_loaded_leave_the_whole(bundle, monkeypatch):
    opened, given = open_backend("openvino", bundle, None, cache_dir=None), two_prompts()
    wanted = opened.detect(given[0])
    read = openvino.read_graph

    def without_head(file):
        if "head" in str(file):
            raise BackendError("no memory for the head")
        return read(file)

    monkeypatch.setattr(openvino, "read_graph", without_head)
    assert "no memory for the head" in error_of(opened.detect_prompts, given, kind=BackendError)
    np.testing.assert_array_equal(opened.detect(given[0]).scores, wanted.scores)
    monkeypatch.undo()
    assert len(opened.detect_prompts(given)) == 2


def test_results_stay_when_the_next_frame_comes_and_threads_do_not_mix_them(backend):
    inputs = {height: feed(height=height) for height in (64, 96)}
    wanted = {height: backend.detect(one).scores.copy() for height, one in inputs.items()}
    first = backend.detect(inputs[64])
    backend.detect(replace(inputs[64], frames=inputs[64].frames[:, ::-1].copy()))
    np.testing.assert_array_equal(first.scores, wanted[64])
    wrong = []

    def work(height):
        for _ in range(5):
            if not np.array_equal(backend.detect(inputs[height]).scores, wanted[height]):
                wrong.append(height)

    threads = [threading.Thread(target=work, args=(height,)) for height in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_are_passed_on(bundle, cache):
    one = OpenVINOBackend.open(bundle, threads=1, cache_dir=cache)
    assert one._graphs.image.get_property("INFERENCE_NUM_THREADS") == 1


def test_a_compiled_graph_is_loaded_again_unless_it_is_damaged(bundle, backend, cache, monkeypatch):
    monkeypatch.setattr("glip_deploy.backends.openvino.read_graph", lambda *_: pytest.fail("compiled again"))
    again = open_backend("openvino", bundle, None, cache_dir=cache)
    np.testing.assert_array_equal(again.detect(feed()).scores, backend.detect(feed()).scores)
    for damage in (lambda raw: raw[: len(raw) // 2], lambda raw: raw[:5000] + bytes(100) + raw[5100:], lambda raw: b""):
        for file in (cache / "openvino").iterdir():
            file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(pytest.fail.Exception, match="compiled again"):
            open_backend("openvino", bundle, None, cache_dir=cache)
    monkeypatch.undo()
    folder = CompiledCache(cache)
    folder.put(again._graphs._key("image.onnx"), b"whole, but of no graph")
    np.testing.assert_array_equal(
        open_backend("openvino", bundle, None, cache_dir=cache).detect(feed()).scores, backend.detect(feed()).scores
    )


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("again", [pytest.param(False, id="compiled", marks=slow), pytest.param(True, id="loaded")])
def test_prompts_of_other_lengths_and_frames_of_other_sizes_keep_no_memory(tiny_bundle, tmp_path, again):
    """OpenVINO and oneDNN inside it would keep what they prepare for every shape: 8 MB for each of these."""
    code = f"""
    import os, numpy as np
    from glip_deploy import Detector

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def look(number):
        frame = np.full((64, 64 + 32 * (number % 2), 3), number, np.uint8)
        detector.detect(frame, " ".join(["cat"] * number) + ". dog", 0.1, color="rgb")

    options = {{"backend": "openvino", "cache_dir": {str(tmp_path)!r}, "shortest_side": 64}}
    with Detector.open({str(tiny_bundle)!r}, **options) as detector:
        look(1)
        for number in range(2, 6):
            look(number)
        before = resident()
        for number in range(6, 26):
            look(number)
        print(resident() - before, os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY"))
    """
    for _ in range(2 if again else 1):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    grown, variable = done.stdout.split()
    assert float(grown) < 40
    assert variable == "None"


def test_the_cache_of_compiled_graphs_is_limited_and_never_an_error(tmp_path):
    cache = CompiledCache(tmp_path, limit=3000)
    for index in range(5):
        cache.put(f"key{index}", bytes(900))
    assert sum(file.stat().st_size for file in (tmp_path / "openvino").iterdir()) <= 3000
    assert cache.get("key4") == bytes(900) and cache.get("key0") is None
    cache.put("large", bytes(4000))
    assert cache.get("large") is None and cache.get("key4") is not None
    (tmp_path / "file").write_bytes(b"")
    blocked = CompiledCache(tmp_path / "file")
    blocked.put("key", b"data")
    assert blocked.get("key") is None and not CompiledCache(None).keeps


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send a signal to one process alone")
def test_ctrl_c_after_detectors_were_opened_and_closed(tiny_bundle):
    """The CPU plugin changes the thread's signal stack, which must not be gone when a signal comes."""
    code = f"""
        import signal
        from glip_deploy import Detector

        for _ in range(2):
            first, second = (Detector.open({str(tiny_bundle)!r}, backend="openvino") for _ in range(2))
            first.close()
            del first
            second.close()
            del second
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            print("interrupted")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
