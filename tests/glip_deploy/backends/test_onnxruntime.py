"""ONNX Runtime: one way to open a graph, and one line for whatever it cannot do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import types
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from backend_inputs import IDS, error_of, feed
from simulated_tensorrt import SimulatedDeviceArray
from tiny_glip import HIDDEN

from glip_deploy import Bundle
from glip_deploy.backends import BACKENDS, PROVIDERS, open_backend
from glip_deploy.backends.onnxruntime import CPU, _rtx_devices, open_session
from glip_deploy.bundle.contract import text_inputs
from glip_deploy.errors import BackendError, BundleError, ClosedError, FrameError, MissingPackage, OptionError
from glip_deploy.frames.device import device_canvas


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.fixture
def backend(bundle):
    opened = open_backend("onnxruntime", bundle, None)
    yield opened
    opened.close()


def test_shapes_and_dtypes(backend):
    embedding = backend.encode_text(IDS)
    assert embedding.shape == (4, HIDDEN) and embedding.dtype == np.float32
    found = backend.detect(feed(batch=2))
    boxes, scores, labels = found.boxes, found.scores, found.labels
    assert boxes.shape == (*scores.shape, 4) and scores.shape == labels.shape and len(boxes) == 2
    assert (boxes.dtype, scores.dtype, labels.dtype) == (np.float32, np.float32, np.int64)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_result(bundle, backend, threads):
    other = open_backend("onnxruntime", bundle, threads)
    np.testing.assert_allclose(other.encode_text(IDS), backend.encode_text(IDS), atol=1e-6)
    for session in (other._sessions.image, other._sessions.text):
        assert session.get_session_options().intra_op_num_threads == threads


def test_threads_rest_after_a_run(bundle):
    """Decoding, drawing or another detector get the cores at once."""
    opened, spent = open_backend("onnxruntime", bundle, 4), []
    for _ in range(5):
        opened.detect(feed())
        before = time.process_time()
        time.sleep(0.03)
        spent.append(time.process_time() - before)
    opened.close()
    assert statistics.median(spent) < 0.01


@pytest.mark.parametrize(("given", "wanted"), [(None, "1"), ("0", "0")])
def test_nothing_is_reported_to_the_maker_of_onnxruntime(tiny_bundle, tmp_path, given, wanted):
    """It would keep an identifier, `.ses`, in the folder for temporary files; who sets the variable decides."""
    code = f"import os; from glip_deploy import Detector; Detector.open({str(tiny_bundle)!r}, cache_dir=None)"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    command = [sys.executable, "-c", f"{code}; print(os.environ['ORT_DISABLE_TELEMETRY'])"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{wanted}\n"
    if given is None:
        assert list(tmp_path.iterdir()) == []


def test_an_unknown_engine(bundle):
    message = error_of(open_backend, "tflite", bundle, None, kind=OptionError)
    assert '"tflite" is unknown' in message and all(name in message for name in BACKENDS)


def test_an_engine_that_is_not_installed(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = error_of(open_backend, "onnxruntime", bundle, None, kind=MissingPackage)
    assert "is not installed; pip install" in message


@pytest.mark.parametrize("version", ["1.24.4", "1.9.0", "0.99"])
def test_an_engine_that_is_too_old(bundle, monkeypatch, version):
    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(__version__=version))
    message = error_of(open_backend, "onnxruntime", bundle, None, kind=BackendError)
    assert version in message and "pip install -U 'onnxruntime>=1.25'" in message


@pytest.mark.parametrize("content", [b"", b"not a graph", bytes(range(256)) * 40])
def test_a_graph_it_cannot_load(tiny_bundle, tmp_path, content):
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (copy / "image.onnx").write_bytes(content)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["image.onnx"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    message = error_of(open_backend, "onnxruntime", Bundle.open(copy), None, kind=BackendError)
    assert f"cannot load {copy / 'image.onnx'}" in message and "export the bundle again" in message
    assert "cannot load a graph in memory" in error_of(open_session, content, kind=BackendError)


GPU_BACKENDS = [name for name in PROVIDERS if name != "onnxruntime"]
RTX = "NvTensorRTRTXExecutionProvider"


@dataclass
class FakeOnnxRuntime:
    """ONNX Runtime with these providers; a session keeps those of `kept`, and all it was given without."""

    available: tuple[str, ...] = (CPU,)
    kept: tuple[str, ...] | None = None
    refuses: Exception | None = None
    sessions: list[dict[str, object]] = field(default_factory=list)
    __version__: str = "1.32.0"

    def get_available_providers(self):
        return list(self.available)

    def register_execution_provider_library(self, name, path):
        if self.refuses is not None:
            raise self.refuses

    def get_ep_devices(self):
        return [types.SimpleNamespace(ep_name=name) for name in (CPU, *(self.kept or ()))]

    def SessionOptions(self):  # noqa: N802  # ONNX Runtime's name
        options = types.SimpleNamespace(devices=[])
        options.add_session_config_entry = lambda key, value: None
        options.add_provider_for_devices = lambda devices, settings: options.devices.extend(devices)
        return options

    def InferenceSession(self, model, options, **settings):  # noqa: N802
        self.sessions.append(settings)
        if self.refuses is not None:
            raise self.refuses
        given = settings["providers"] or [*(device.ep_name for device in options.devices), CPU]
        kept = given if self.kept is None else [name for name in given if name in self.kept or name == CPU]
        return types.SimpleNamespace(get_providers=lambda: kept)


@pytest.fixture
def fake(monkeypatch):
    def install(**settings):
        module = FakeOnnxRuntime(**settings)
        monkeypatch.setitem(sys.modules, "onnxruntime", module)
        return module

    _rtx_devices.cache_clear()
    yield install
    _rtx_devices.cache_clear()


@pytest.fixture
def rtx_package(monkeypatch):
    package = types.SimpleNamespace(get_ep_name=lambda: RTX, get_library_path=lambda: "library")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", package)


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("onnxruntime-cuda", "pip install 'onnxruntime-gpu>=1.25'"),
        ("onnxruntime-tensorrt", "pip install 'onnxruntime-gpu>=1.25' tensorrt-cu12"),
        ("onnxruntime-nv-tensorrt-rtx", "pip install onnxruntime-ep-nv-tensorrt-rtx"),
    ],
)
def test_a_provider_that_is_not_installed(bundle, fake, monkeypatch, name, install):
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    module = fake()
    message = error_of(open_backend, name, bundle, None, kind=MissingPackage)
    assert f"has no {PROVIDERS[name][0]} here" in message and install in message
    assert module.sessions == []


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_provider_that_is_there(bundle, fake, name):
    wanted = PROVIDERS[name]
    module = fake(available=(*wanted, CPU))
    open_backend(name, bundle, None)
    assert module.sessions == [{"providers": [*wanted, CPU], "enable_fallback": 0}]


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_provider_that_onnxruntime_drops_silently(bundle, fake, name):
    fake(available=(*PROVIDERS[name], CPU), kept=())
    message = error_of(open_backend, name, bundle, None, kind=BackendError)
    assert f"fell back from {PROVIDERS[name][0]} to the CPU" in message and "use backend onnxruntime" in message


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_provider_that_cannot_start_does_not_blame_the_bundle(bundle, fake, name):
    fake(available=(*PROVIDERS[name], CPU), refuses=RuntimeError("libcudnn.so.9: not found\nand more"))
    message = error_of(open_backend, name, bundle, None, kind=BackendError)
    assert "libcudnn.so.9: not found;" in message and "export the bundle again" not in message


def test_the_rtx_provider_comes_as_a_package_and_is_asked_for_by_device(bundle, fake, rtx_package):
    module = fake(kept=(RTX,))
    for _ in range(2):
        open_backend("onnxruntime-nv-tensorrt-rtx", bundle, None)
    assert module.sessions == [{"providers": [], "enable_fallback": 0}] * 2


def test_the_rtx_provider_without_a_gpu_or_a_driver(bundle, fake, rtx_package):
    fake()
    message = error_of(open_backend, "onnxruntime-nv-tensorrt-rtx", bundle, None, kind=BackendError)
    assert f"{RTX} finds no RTX GPU here; use backend onnxruntime" in message
    fake(refuses=RuntimeError("libcuda.so.1: cannot open"))
    message = error_of(open_backend, "onnxruntime-nv-tensorrt-rtx", bundle, None, kind=BackendError)
    assert f"{RTX} cannot be loaded: libcuda.so.1: cannot open; use" in message


def test_the_installed_onnxruntime_refuses_a_provider_it_does_not_have(bundle):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has its CUDA provider here")
    message = error_of(open_backend, "onnxruntime-cuda", bundle, None, kind=MissingPackage)
    assert "has no CUDAExecutionProvider here" in message


def test_a_session_may_be_profiled_and_its_folded_graph_kept(tiny_bundle, tmp_path):
    graph = tiny_bundle / "text.onnx"
    session = open_session(graph, profile=tmp_path / "profile", folded=tmp_path / "folded.onnx")
    (found,) = session.run(None, text_inputs(IDS))
    events = json.loads(Path(session.end_profiling()).read_text())
    assert [event["name"] for event in events].count("model_run") == 1
    assert (tmp_path / "folded.data").stat().st_size > 1000
    (again,) = open_session(tmp_path / "folded.onnx").run(None, text_inputs(IDS))
    np.testing.assert_allclose(again, found, atol=1e-6)


def test_the_text_graph_is_not_needed_before_the_first_prompt(tiny_bundle, tmp_path):
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    opened = Bundle.open(copy)
    backend = open_backend("onnxruntime", opened, None)
    (copy / "text.onnx").write_bytes(b"not a graph")
    backend.detect(feed())
    said = error_of(backend.encode_text, IDS, kind=BundleError)
    assert said == f"{copy / 'text.onnx'} was changed since the bundle was opened; open it again"
    shutil.rmtree(copy)
    assert "was removed or replaced meanwhile" in error_of(backend.encode_text, IDS, kind=BundleError)


def test_what_the_graph_refuses_is_named_with_its_shapes(backend):
    inputs = feed()
    message = error_of(
        backend.detect, replace(inputs, text_embedding=inputs.text_embedding[..., :-1]), kind=BackendError
    )
    assert "ONNX Runtime failed on" in message and f"text_embedding (1, 4, {HIDDEN - 1})" in message
    assert "input_ids (1, 2)" in error_of(backend.encode_text, np.array([2, 10**6], np.int64), kind=BackendError)


def test_frames_in_gpu_memory_are_refused(backend):
    canvas = device_canvas([SimulatedDeviceArray(np.zeros((64, 64, 3), np.uint8))], color="rgb")
    message = error_of(backend.detect, replace(feed(), frames=canvas), kind=FrameError)
    assert "in GPU memory" in message and "backend tensorrt" in message


def test_after_close_nothing_runs_and_nothing_is_loaded_again(bundle):
    opened = open_backend("onnxruntime", bundle, None)
    opened.close()
    opened.close()
    assert "is closed" in error_of(opened.detect, feed(), kind=ClosedError)
    assert "is closed" in error_of(opened.encode_text, IDS, kind=ClosedError)
    assert "is closed" in error_of(opened.clone, kind=ClosedError)


def test_clones_share_their_sessions_and_close_apart(bundle):
    opened = open_backend("onnxruntime", bundle, None)
    twin = opened.clone()
    embedding = opened.encode_text(IDS)  # loads the text graph, for both
    assert twin._sessions.text is opened._sessions.text
    opened.close()
    np.testing.assert_array_equal(twin.encode_text(IDS), embedding)
    assert len(twin.detect(feed())) == 1
