"""The TensorRT backend's own work, on a simulated GPU; and what it says where there is none."""

from __future__ import annotations

import importlib.util
import threading
import time
from dataclasses import replace
from functools import partial

import msgspec
import numpy as np
import pytest
from backend_inputs import IDS, error_of, feed
from simulated_tensorrt import (
    ENGINES,
    VERSION,
    SimulatedContext,
    SimulatedCuda,
    SimulatedDeviceArray,
    simulated_tensorrt,
    write_engines,
)

from glip_deploy import Detector, GlipError
from glip_deploy.backends import BACKENDS, DATA_ONLY, open_backend, tensorrt
from glip_deploy.backends.tensorrt import SHAPES_KEPT, TensorRTBackend, choose_engines
from glip_deploy.bundle.engines import EngineRecord, PluginRecord
from glip_deploy.errors import BackendError, MissingPackage, OptionError
from glip_deploy.files import sha256_of
from glip_deploy.frames import Resize


@pytest.fixture
def reference(bundle):
    return open_backend("onnxruntime", bundle, None)


def candidates(found):
    """The slots that are not empty, in an order of their own."""
    boxes, scores, labels = found.boxes, found.scores, found.labels
    rows = [
        np.concatenate([[frame], [label], [score], box])
        for frame in range(len(scores))
        for box, score, label in zip(boxes[frame], scores[frame], labels[frame], strict=True)
        if score > 0
    ]
    return np.array(sorted(rows, key=lambda row: (row[0], row[1], round(row[2], 4), *row[3:].round(2))))


def assert_same(found, wanted):
    for name in ("boxes", "scores", "labels"):
        assert getattr(found, name).dtype == getattr(wanted, name).dtype
    theirs = candidates(wanted)
    assert len(theirs) > 10
    np.testing.assert_allclose(candidates(found), theirs, atol=1e-3)


def test_results_are_those_of_the_graphs(opened, reference):
    backend = opened()
    np.testing.assert_allclose(backend.encode_text(IDS), reference.encode_text(IDS), atol=1e-6)
    for _ in range(3):  # plainly, while a graph is recorded, by the graph
        assert_same(backend.detect(feed()), reference.detect(feed()))


def test_a_prompt_padded_to_an_engines_length_changes_nothing(opened, reference):
    """Two engines' lengths, one for more classes than the prompt has."""
    backend = opened(tokens=((8, 8, 8), (32, 32, 32)), classes=(6, 6, 6))
    embedding = backend.encode_text(IDS)
    assert embedding.shape == reference.encode_text(IDS).shape
    np.testing.assert_allclose(embedding, reference.encode_text(IDS), atol=1e-5)
    for tokens in (4, 8, 9, 32):
        assert_same(backend.detect(feed(tokens=tokens)), reference.detect(feed(tokens=tokens)))


def test_from_the_second_frame_on_a_frame_is_one_launch(opened, cuda):
    backend = opened()
    logs = []
    for _ in range(3):
        cuda.log.clear()
        backend.detect(feed())
        logs.append(list(cuda.log))
    first = ["upload"] * 3 + ["upload"] * 2 + ["execute"] + ["download"] * 3
    assert logs == [first, ["launch"], ["launch"]]


def test_a_new_prompt_is_uploaded_and_nothing_is_recorded_again(opened, cuda, reference):
    backend = opened()
    inputs = feed()
    for _ in range(2):
        backend.detect(inputs)
    cuda.log.clear()
    other = replace(inputs, text_embedding=inputs.text_embedding[..., ::-1].copy())
    found = backend.detect(other)
    assert cuda.log == ["upload", "launch"]
    assert len(cuda.live_graphs) == 1
    assert_same(found, reference.detect(other))
    assert np.abs(found.scores - backend.detect(inputs).scores).max() > 1e-6


def test_what_cannot_be_recorded_runs_plainly(opened, cuda, reference):
    cuda.graphs = False
    backend = opened()
    for _ in range(3):
        assert_same(backend.detect(feed()), reference.detect(feed()))
    assert "launch" not in cuda.log


def test_a_failed_recording_is_tried_again_and_reported_once(opened, cuda, reference, caplog):
    cuda.graphs = False
    backend = opened()
    for _ in range(2):
        backend.detect(feed())
    cuda.graphs = True
    for _ in range(3):
        assert_same(backend.detect(feed()), reference.detect(feed()))
    assert cuda.log[-1] == "launch"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "could not be recorded as a CUDA graph" in caplog.text


def test_a_prompt_of_another_length_is_only_an_upload(opened, cuda, reference):
    backend = opened()
    for _ in range(2):
        backend.detect(feed())
    cuda.log.clear()
    for tokens, classes in ((5, 3), (16, 8), (1, 1)):
        wanted = reference.detect(feed(tokens=tokens, classes=classes))
        assert_same(backend.detect(feed(tokens=tokens, classes=classes)), wanted)
    assert set(cuda.log) == {"upload", "launch"} and cuda.log.count("launch") == 3
    assert len(cuda.live_graphs) == 1


def test_new_prompts_do_not_evict_the_buffers_of_frames(opened, cuda):
    backend = opened(tokens=tuple((n, n, n) for n in range(4, 12)))
    for _ in range(2):
        backend.detect(feed())
    for count in range(4, 12):
        backend.encode_text(np.arange(2, 2 + count))
    cuda.log.clear()
    backend.detect(feed())
    assert cuda.log == ["launch"]


@pytest.mark.parametrize("method", ["set_optimization_profile_async", "set_tensor_address"])
def test_what_tensorrt_refuses_is_an_error_and_leaves_nothing(opened, cuda, monkeypatch, method):
    monkeypatch.setattr(SimulatedContext, method, lambda self, *arguments: False)
    backend = opened()
    assert "image.plan refuses" in error_of(backend.detect, feed())
    assert not cuda.arrays
    backend.close()
    assert not cuda.memory


def test_nothing_is_allocated_while_a_clone_records(opened, cuda, monkeypatch):
    """The simulated GPU fails an allocation during a recording, as a real one fails the recording."""
    backend = opened()
    twin = backend.clone()
    backend.detect(feed())
    record, begun, failures = SimulatedCuda.capture, threading.Event(), []

    def slow(self, stream, work):
        def both():
            begun.set()
            time.sleep(0.3)
            work()

        return record(self, stream, both)

    def bind():
        begun.wait(10)
        try:
            twin.detect(feed(height=96))
        except AssertionError as error:
            failures.append(error)

    monkeypatch.setattr(SimulatedCuda, "capture", slow)
    thread = threading.Thread(target=bind)
    thread.start()
    backend.detect(feed())
    thread.join()
    assert begun.is_set() and not failures


def test_backends_that_are_open_at_exit_are_closed(opened, cuda):
    backend = opened()
    backend.detect(feed())
    tensorrt._close_all()
    assert not (cuda.memory or cuda.arrays or cuda.streams)
    assert "is closed" in error_of(backend.detect, feed())


def test_a_plugin_that_is_registered_already_is_used(bundle, cuda, tmp_path):
    trt = simulated_tensorrt(cuda)
    for name in ("one.so", "two.so"):
        (tmp_path / name).write_bytes(name.encode())
        assert tensorrt._runtime(trt, tmp_path / name) is not None
    assert trt.loaded == [str(tmp_path / "one.so")]


@pytest.mark.parametrize("version", ENGINES)
def test_every_version_runs_in_one_piece_of_memory_per_clone(opened, cuda, reference, version):
    """The simulation has of each version's interface what the backend may use, and refuses what it has not."""
    backend = opened(version)
    twin = backend.clone()
    for one in (backend, twin):
        one.encode_text(IDS)
        for height in (64, 64, 96):
            assert_same(one.detect(feed(height=height)), reference.detect(feed(height=height)))
    contexts = [bound.context for one in (backend, twin) for kept in one._bound.values() for bound in kept.values()]
    assert len(contexts) == 6
    assert len({context.memory for context in contexts}) == 2
    twin.close()
    backend.close()
    assert not (cuda.memory or cuda.arrays or cuda.streams)


@pytest.mark.parametrize("version", ["8.6.1", VERSION])
def test_the_plugin_is_loaded_by_every_version(bundle, cuda, tmp_path, version):
    trt = simulated_tensorrt(cuda, version)
    (tmp_path / "one.so").write_bytes(b"")
    tensorrt._runtime(trt, tmp_path / "one.so")
    assert trt.loaded == [str(tmp_path / "one.so")]


def test_tensorrt_rtx_is_not_recorded_where_it_says_that_it_cannot_be(opened, cuda):
    cuda.capturable = False
    backend = opened("1.7.1")
    for _ in range(3):
        backend.detect(feed())
    assert "launch" not in cuda.log
    cuda.capturable = True
    for _ in range(2):
        backend.detect(feed())
    assert cuda.log[-1] == "launch"


def test_tensorrt_rtx_keeps_the_kernels_that_it_compiled(opened, cuda, bundle, tmp_path):
    backend = opened("1.7.1")
    backend.detect(feed())
    backend.close()
    (kept,) = (tmp_path / "cache" / "kernels").iterdir()  # of the image engine: text was not run
    assert kept.read_bytes().startswith(b"kernels")

    def known():
        again = TensorRTBackend.open(bundle, cuda=cuda, trt=simulated_tensorrt(cuda, "1.7.1"))
        return again._engines["image"]._cache.content

    assert known() == kept.read_bytes()
    kept.parent.chmod(0o777)  # anyone may have put it there
    assert known() == b""
    kept.parent.chmod(0o700)
    assert known() == kept.read_bytes()


def test_kernels_that_cannot_be_kept_are_no_error(opened, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    backend = opened("1.7.1")
    backend.detect(feed())
    backend.close()
    assert (tmp_path / "cache").read_text() == "in the way"


def test_buffers_of_shapes_that_are_no_longer_used_are_freed(opened, cuda, reference):
    backend = opened()
    for _ in range(2):
        for height in range(32, 32 * (SHAPES_KEPT["image"] + 3), 32):
            assert_same(backend.detect(feed(height=height)), reference.detect(feed(height=height)))
            backend.detect(feed(height=height))
    kept = SHAPES_KEPT["image"]
    assert len(cuda.live_graphs) == kept
    assert len(cuda.arrays) == kept * 8
    assert len(cuda.memory) == kept * 8 + 1  # and one for what contexts compute in
    backend.close()
    backend.close()
    assert not (cuda.memory or cuda.arrays or cuda.streams or cuda.live_graphs)
    assert "is closed" in error_of(backend.detect, feed())
    assert "is closed" in error_of(backend.encode_text, IDS)


def test_more_frames_than_the_engine_takes_go_in_turn(opened, reference):
    backend = opened(batch=2)
    assert_same(backend.detect(feed(batch=5)), reference.detect(feed(batch=5)))


def test_a_smaller_canvas_is_padded_as_glip_pads(opened, reference):
    backend = opened(sizes=((96, 96, 96), (128, 128, 128)))
    inputs = feed(height=64, width=96)
    padded = np.zeros((1, 96, 128, 3), np.uint8)
    padded[:, :64, :96] = inputs.frames
    assert_same(backend.detect(inputs), reference.detect(replace(inputs, frames=padded)))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"tokens": 65}, ("has 65 tokens, the engine takes up to 64", "glip-build", "--tokens 1:16:256")),
        ({"classes": 17}, ("has 17 classes, the engine takes up to 16", "--classes 1:8:17")),
        ({"height": 288}, ("288 pixels in height, the engine takes up to 256", "--shortest-side")),
        ({"width": 512}, ("512 pixels in width", "--max")),
    ],
)
def test_what_the_engine_was_not_built_for(opened, cuda, options, parts):
    backend = opened()
    message = error_of(backend.detect, feed(**options))
    for part in parts:
        assert part in message
    assert not cuda.memory


def test_clones_share_engines_and_no_buffers(opened, cuda, reference):
    backend = opened()
    twin = backend.clone()
    assert len(cuda.streams) == 2
    failures = []

    def work(one, height):
        try:
            for _ in range(4):
                assert_same(one.detect(feed(height=height)), reference.detect(feed(height=height)))
        except AssertionError as error:
            failures.append(error)

    backend.detect(feed())
    backend.close()
    threads = [threading.Thread(target=work, args=(twin, height)) for height in (64, 96)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    twin.close()
    assert not cuda.memory
    with pytest.raises(GlipError, match="is closed"):
        backend.clone()


def test_a_detector_runs_on_it(bundle, cuda):
    write_engines(bundle, classes=(1, 2, 8))
    backend = TensorRTBackend.open(bundle, cuda=cuda, trt=simulated_tensorrt(cuda))
    options = {"shortest_side": 96, "longest_side": 160}
    frame = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    wanted = Detector.open(bundle.path, cache_dir=None, **options).detect(frame, ["cat", "dog"], 0.1, color="rgb")
    detector = Detector(bundle, backend, **options)
    with detector, detector.clone() as twin:
        for one in (detector, detector, twin):
            found = one.detect(frame, ["cat", "dog"], 0.1, color="rgb")
            assert len(found) == len(wanted) > 0
            np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-2)
            np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)


# -- frames on the GPU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("row_bytes", [None, 512])
@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_frames_on_the_gpu_give_the_same_boxes(bundle, cuda, color, row_bytes, channels):
    write_engines(bundle)
    backend = TensorRTBackend.open(bundle, cuda=cuda, trt=simulated_tensorrt(cuda))
    picture = np.random.default_rng(1).integers(0, 256, (90, 120, channels), dtype=np.uint8)
    with Detector(bundle, backend, shortest_side=96, longest_side=160, resize=Resize.EXACT) as detector:
        wanted = detector.detect(picture[..., :3], ["cat", "dog"], 0.1, color=color)
        logs = []
        for _ in range(3):
            cuda.log.clear()
            found = detector.detect(SimulatedDeviceArray(picture, row_bytes), ["cat", "dog"], 0.1, color=color)
            logs.append(list(cuda.log))
            assert len(found) == len(wanted) > 0
            np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-2)
            np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)
    assert "upload" in logs[0]
    assert logs[1:] == [["resize", "launch"]] * 2
    assert not cuda.memory


def test_frames_on_the_gpu_in_batches_and_with_work_pending(bundle, cuda):
    write_engines(bundle, batch=2)
    backend = TensorRTBackend.open(bundle, cuda=cuda, trt=simulated_tensorrt(cuda))
    with cuda.active():
        producer = cuda.stream()
    pictures = np.random.default_rng(2).integers(0, 256, (3, 90, 120, 3), dtype=np.uint8)
    with Detector(bundle, backend, shortest_side=96, longest_side=160) as detector:
        wanted = detector.detect_batch(list(pictures), ["cat"], 0.1, color="rgb")
        given = [SimulatedDeviceArray(picture, stream=producer) for picture in pictures]
        for ours, theirs in zip(detector.detect_batch(given, ["cat"], 0.1, color="rgb"), wanted, strict=True):
            np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-2)
        assert producer in cuda.waits
        cuda.waits.clear()
        detector.detect(SimulatedDeviceArray(pictures[0]), ["cat"], 0.1, color="rgb")  # PyCUDA's, or version 2
        assert 1 in cuda.waits  # the legacy default stream
        with pytest.raises(GlipError, match="bring them to one side"):
            detector.detect_batch([given[0], pictures[0]], ["cat"], color="rgb")


@pytest.mark.parametrize("color", ["rgb", "bgr", "nv12"])
def test_frames_of_the_host_are_uploaded_as_they_are_and_resized_on_the_gpu(bundle, cuda, color):
    write_engines(bundle, batch=2)
    backend = TensorRTBackend.open(bundle, cuda=cuda, trt=simulated_tensorrt(cuda))
    shapes = ((96, 120), (240, 120)) if color == "nv12" else ((64, 120, 3), (160, 120, 4))
    small, large = (np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8) for shape in shapes)
    options = {"shortest_side": 96, "longest_side": 160}
    reference = Detector.open(bundle.path, cache_dir=None, **options)
    with Detector(bundle, backend, **options) as detector, detector.clone() as twin:
        assert detector.resize is twin.resize is Resize.GPU
        for one in (detector, detector, detector, twin):
            for frames in ([small], [small, large], [large]):  # the memory for raw frames grows, and is kept
                cuda.log.clear()
                found = one.detect_batch(frames, ["cat", "dog"], 0.1, color=color)
                assert cuda.log.count("resize") == len(frames)
                wanted = reference.detect_batch(frames, ["cat", "dog"], 0.1, color=color)
                for ours, theirs in zip(found, wanted, strict=True):
                    assert len(ours) == len(theirs) > 0
                    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-2)
                    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
        cuda.log.clear()
        detector.detect(large, ["cat", "dog"], 0.1, color=color)
        assert cuda.log == ["upload", "resize", "launch"]  # the prompt is there, the frame goes up as it is
    assert not cuda.memory
    assert not cuda.arrays


def test_no_memory_for_a_raw_frame_leaves_nothing_behind(bundle, cuda, monkeypatch):
    write_engines(bundle)
    backend = TensorRTBackend.open(bundle, cuda=cuda, trt=simulated_tensorrt(cuda))
    frame = np.zeros((64, 64, 3), np.uint8)
    with Detector(bundle, backend, shortest_side=96, longest_side=160) as detector:
        prompt = detector.encode(["cat"])
        allocate = cuda.allocate

        def full(size):
            if size == frame.size:
                raise BackendError("the GPU cannot be used: out of memory")
            return allocate(size)

        monkeypatch.setattr(cuda, "allocate", full)
        with pytest.raises(BackendError, match="out of memory"):
            detector.detect(frame, prompt, color="rgb")
        monkeypatch.setattr(cuda, "allocate", allocate)
        detector.detect(frame, prompt, color="rgb")
    assert not cuda.memory
    assert not cuda.arrays


def test_where_frames_are_resized(bundle, cuda, caplog):
    """On the GPU unless something else is asked for; without NVRTC on the CPU, if the GPU was not asked for."""
    write_engines(bundle)

    def detector(resize=None):
        return Detector(bundle, TensorRTBackend.open(bundle, cuda=cuda, trt=simulated_tensorrt(cuda)), resize=resize)

    for asked, wanted in ((None, "gpu"), (Resize.GPU, "gpu"), (Resize.EXACT, "exact"), (Resize.FAST, "fast")):
        with detector(asked) as opened:
            assert opened.resize == wanted
    cuda.without_nvrtc = True
    assert not caplog.records
    with detector() as opened:
        assert opened.resize is Resize.EXACT
    assert "frames are resized on the CPU: NVRTC" in caplog.text
    with pytest.raises(MissingPackage, match="NVRTC"):
        detector(Resize.GPU)
    with pytest.raises(OptionError, match='resize is "gpu", which only backend tensorrt does; use "exact" or "fast"'):
        Detector.open(bundle.path, cache_dir=None, resize="gpu")


# -- which engines --------------------------------------------------------------------------------------------------


def test_engines_that_do_not_fit_are_passed_over(bundle, cuda):
    trt = simulated_tensorrt(cuda)
    write_engines(bundle, "a")
    right = write_engines(bundle, "b")
    (bundle.path / "engines" / "a" / "image.plan").write_bytes(b"cut short")
    assert choose_engines(bundle, None, cuda, trt)[0] == right
    with pytest.raises(GlipError, match=r"image\.plan was changed or cut short.*build again: glip-build"):
        choose_engines(bundle, bundle.path / "engines" / "a", cuda, trt)
    assert choose_engines(bundle, type(right)("b"), cuda, trt)[0] == right
    cuda.compute_capability = 86
    with pytest.raises(GlipError, match=r"were built for SM80, here is Simulated GPU \(SM86\); build again"):
        choose_engines(bundle, None, cuda, trt)


def test_engines_with_a_plugin_may_be_refused(bundle, cuda):
    trt = simulated_tensorrt(cuda)
    folder = write_engines(bundle, "a")
    library = folder / "libglip_deform.so"
    library.write_bytes(b"a library")
    record = EngineRecord.read(folder)
    msgspec.structs.replace(record, plugin=PluginRecord(library.name, sha256_of(library))).write(folder)
    assert choose_engines(bundle, None, cuda, trt)[0] == folder
    message = error_of(partial(TensorRTBackend.open, bundle, cuda=cuda, trt=trt, plugins=False))
    assert "need the plugin library libglip_deform.so, and plugins are refused; build engines without one" in message
    assert trt.loaded == []
    plain = write_engines(bundle, "b")
    assert choose_engines(bundle, None, cuda, trt, plugins=False)[0] == plain


def test_native_code_of_a_stranger_is_refused_before_anything_is_opened(tmp_path):
    for name in BACKENDS:
        if name not in DATA_ONLY:
            said = error_of(partial(Detector.open, tmp_path / "none", backend=name, trusted=False))
            assert f"backend {name} runs native code that comes with the bundle, which is not trusted" in said
            assert said.endswith("use backend onnxruntime or onnxruntime-cuda or openvino")
    assert "does not exist" in error_of(partial(Detector.open, tmp_path / "none", trusted=False))


def test_a_stranger_s_bundle_runs_as_data(bundle):
    write_engines(bundle)
    with Detector.open(bundle.path, trusted=False, plugins=False, shortest_side=64, cache_dir=None) as detector:
        assert detector.encode(["dog"]).phrases == ("dog",)


def test_no_engines(bundle, cuda):
    message = error_of(open_backend, "tensorrt", bundle, None)
    assert message == f"bundle {bundle.path} has no engines; build them with glip-build {bundle.path}"


def test_a_machine_without_a_gpu(bundle):
    write_engines(bundle)
    if importlib.util.find_spec("cuda") is None:
        assert "cuda-python is not installed; pip install" in error_of(open_backend, "tensorrt", bundle, None)
        return
    try:
        import ctypes

        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert error_of(open_backend, "tensorrt", bundle, None).startswith(
            ("there is no NVIDIA driver", "the GPU cannot")
        )
        return
    pytest.skip("there is an NVIDIA driver here")


def test_the_backend_uses_what_tensorrt_rtx_has():
    """Every method of the bindings that the simulated ones stand for."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'glip-deploy[dev]'")
    for kind, names in {
        "Runtime": ("deserialize_cuda_engine",),
        "ICudaEngine": (
            *("num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "create_execution_context"),
            *("create_runtime_config", "device_memory_size_v2"),
        ),
        "IExecutionContext": (
            *("set_optimization_profile_async", "set_input_shape", "infer_shapes", "get_tensor_shape"),
            *("set_tensor_address", "execute_async_v3", "set_device_memory", "is_stream_capturable"),
        ),
        "IRuntimeConfig": (
            *("create_runtime_cache", "set_runtime_cache", "set_execution_context_allocation_strategy"),
            "dynamic_shapes_kernel_specialization_strategy",
        ),
        "IRuntimeCache": ("serialize", "deserialize"),
        "IPluginRegistry": ("load_library", "get_creator"),
    }.items():
        assert [name for name in names if not hasattr(getattr(trt, kind), name)] == []
    assert hasattr(trt.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert {"nptype", "TensorIOMode", "Logger", "init_libnvinfer_plugins", "get_plugin_registry"} <= set(dir(trt))
