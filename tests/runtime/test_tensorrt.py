"""The C++ runtime's TensorRT backend on a simulated GPU, and what it says where there is none.

No GPU has run it: what the libraries are asked for, in which order and with which memory, is real; what they do is not.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import re
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_build import GlipError, Image, Library, run
from simulated_gpu import Simulation
from simulated_tensorrt import write_engines

from glip_deploy import Detector, load_image
from glip_deploy import GlipError as PythonError
from glip_deploy.bundle.engines import EngineRecord, Machine, PluginRecord
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]
SIDE = {"shortest_side": 96, "longest_side": 160}
SHAPES: dict[str, Any] = {"tokens": ((1, 16, 64),), "sizes": ((32, 96, 192),) * 2, "classes": (1, 4, 16)}
PROMPT = ["dog", "red apple", "bicycle"]


@pytest.fixture(scope="module")
def simulated(runtime: Path) -> Path:
    """The folder of the runtime, with the simulated libraries."""
    if not (runtime / "simulated" / "libcuda.so.1").exists():
        pytest.skip("TensorRT's headers are not here: pip install kernel-lens nvidia-cuda-runtime")
    return runtime


@pytest.fixture(scope="module")
def version(simulated: Path) -> str:
    """The version of TensorRT's headers, as the simulated library tells it."""
    (nvinfer,) = (simulated / "simulated").glob("libnvinfer.so.*")
    return told(nvinfer)


def told(library: Path) -> str:
    """Ask a simulated TensorRT for its version.

    In a process of its own: the simulated driver comes with it, which later tests would take for that of the machine.
    """
    number = int(
        run(sys.executable, "-c", f"import ctypes; print(ctypes.CDLL({str(library)!r}).getInferLibVersion())").stdout
    )
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}.34"


@pytest.fixture
def bundle(nano_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(nano_bundle, tmp_path / "glip")
    return tmp_path / "glip"


class Process:
    """The process that has the simulated GPU; another one after a failure."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def run(self, work: Any, *arguments: Any) -> Any:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            return self._pool.submit(work, *arguments).result(300)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


@pytest.fixture(scope="module")
def process():
    opened = Process()
    yield opened
    opened.close()


def apart(work, *arguments):
    """Run something in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result(300)


# -- in the process that has the GPU ----------------------------------------------------------------------------------


@cache
def simulation(folder: Path, number: int, flavour: str = "tensorrt") -> Simulation:
    return Simulation(folder, number, flavour)


@cache
def picture() -> Any:
    return np.ascontiguousarray(load_image(ROOT / "examples" / "nano" / "media" / "scene.jpg"))


_pythons: dict[str, Detector] = {}


def python_on(manifest: str, bundle: Path) -> Detector:
    """Give one detector for all copies of a bundle, by the hash of the manifest."""
    if manifest not in _pythons:
        _pythons[manifest] = Detector.open(bundle, cache_dir=None, **SIDE)
    return _pythons[manifest]


def number_of(version: str) -> int:
    major, minor, patch = (int(part) for part in version.split(".")[:3])
    return major * 10000 + minor * 100 + patch


class Opened:
    """A detector on simulated engines, the GPU, and Python's detector on the graphs."""

    def __init__(self, folder: Path, bundle: Path, version: str, options: Any = None, **shapes: Any) -> None:
        self.gpu = simulation(folder, number_of(version), shapes.get("flavour", "tensorrt"))
        assert self.gpu.left() == {}
        self.library = self.gpu.library
        self.bundle = Bundle.open(bundle)
        self.engines = write_engines(self.bundle, version=version, **{**SHAPES, **shapes})
        self.gpu.log()
        self.gpu.graphs.clear()
        given = {"backend": b"tensorrt", "no_cache": 1, "resize": b"exact", **SIDE, **(options or {})}
        self.detector = self.library.open(bundle, **given)
        self.python = python_on(self.bundle.manifest_sha256, bundle)

    def detect(self, prompt: Any, frame: Any = None, threshold: float = 0.1, **members: Any) -> Any:
        encoded = self.library.encode(self.detector, prompt)
        self.gpu.log()
        try:
            shown = picture() if frame is None else frame
            return self.library.detect(self.detector, encoded, shown, threshold, **members)
        finally:
            self.library.c.glip_prompt_free(encoded)

    def check(self, prompt: Any, frame: Any = None) -> list[str]:
        """Detect, compare with Python, and return what the GPU did for the frame."""
        found = self.detect(prompt, frame)
        wanted = self.python.detect(picture() if frame is None else frame, prompt, 0.1, color="rgb")
        same(found, wanted)
        assert len(found) > 0
        return self.gpu.log()

    def close(self) -> None:
        self.library.c.glip_close(self.detector)
        assert self.gpu.left() == {}


def same(found: Any, wanted: Any) -> None:
    assert [label for _, _, label, _ in found] == wanted.labels.tolist()
    np.testing.assert_allclose([score for _, score, _, _ in found], wanted.scores, atol=1e-4)
    np.testing.assert_allclose(np.array([box for box, *_ in found]).reshape(-1, 4), wanted.boxes, atol=0.01)


def refused(call: Any, *arguments: Any, **options: Any) -> str:
    try:
        call(*arguments, **options)
    except GlipError as error:
        return str(error)
    raise AssertionError("nothing was refused")


# -- running ----------------------------------------------------------------------------------------------------------

PLAIN = ["upload"] * 2 + ["execute"] + ["download"] * 3
"""A frame whose prompt is there."""


def frames_and_graphs(folder, bundle, version):
    opened = Opened(folder, bundle, version)
    first = opened.check(PROMPT)
    assert first == ["wait", *["upload"] * 3, *PLAIN, "wait"]
    assert opened.check(PROMPT) == ["launch", "wait"]  # recorded, and then launched
    assert opened.check(PROMPT) == ["launch", "wait"]
    # Other words are uploaded, and nothing is recorded again; those not changed (the mask) are not uploaded.
    log = opened.check(["penguin", "owl"])
    assert log[-2:] == ["launch", "wait"] and set(log[:-2]) == {"upload"}
    assert opened.check(["penguin", "owl"]) == ["launch", "wait"]
    # A longer prompt, and a picture of another shape, have buffers of their own.
    long = ["dog", "red apple", "bicycle", "guitar", "penguin", "owl", "green apple", "blue car", "yellow bus"]
    assert opened.check(long) == first
    assert opened.check(PROMPT, np.ascontiguousarray(picture()[:100])) == first
    assert opened.check(PROMPT) == [*["upload"] * 3, "launch", "wait"]  # still there
    # No more than four shapes are kept.
    device, pinned = opened.gpu.live("device"), opened.gpu.live("pinned")
    for height in (60, 80, 130, 150, 60):  # canvases of four shapes more
        opened.check(PROMPT, np.ascontiguousarray(picture()[:height]))
    most = 4 * 5 + 2 * 2 + 4 * 3 + 2 + 1  # inputs and outputs of images and texts, and what contexts compute in
    assert device <= most and opened.gpu.live("device") <= most and opened.gpu.live("pinned") <= pinned + 8
    opened.close()


def test_a_frame_is_one_launch_and_a_prompt_an_upload(process, simulated, bundle, version):
    process.run(frames_and_graphs, simulated, bundle, version)


def failed_recordings(folder, bundle, version):
    opened = Opened(folder, bundle, version)
    opened.check(PROMPT)
    opened.gpu.fail("cuStreamEndCapture", 0, 901)
    assert opened.check(PROMPT) == [*PLAIN, "wait"]
    opened.gpu.fail("cuGraphInstantiateWithFlags", 0, 2)
    assert opened.check(PROMPT) == [*PLAIN, "wait"]  # tried again
    assert opened.check(PROMPT) == [*PLAIN, "wait"]
    assert opened.check(PROMPT) == ["launch", "wait"]  # the fifth
    opened.close()


def test_what_cannot_be_recorded_runs_plainly_and_is_tried_again(process, simulated, bundle, version):
    process.run(failed_recordings, simulated, bundle, version)


def failures(folder, bundle, version):
    opened = Opened(folder, bundle, version)
    opened.check("owl")
    again = f"glip-build {bundle} --flavor tensorrt"
    said = {
        "context": "BACKEND: .*image.plan: the GPU has not enough free memory; close other programs",
        "profile": f"MISSING: .*image.plan refuses its profile 0; {again} --overwrite",
        "shape": rf"MISSING: .*image.plan refuses \w+ of shape \([\d, ]+\); {again}",
        "infer": f"MISSING: .*image.plan leaves the shape of frames open; {again}",
        "address": rf"MISSING: .*image.plan refuses the buffer of \w+; {again} --overwrite",
        "enqueue": f"BACKEND: tensorrt could not run the engine; {again} --overwrite",
    }
    small = np.ascontiguousarray(picture()[:100])
    for what, message in said.items():
        before = {kind: opened.gpu.live(kind) for kind in ("device", "pinned")}
        opened.gpu.refuse(what)
        assert re.fullmatch(message, refused(opened.detect, "owl", small)), what
        opened.gpu.refuse(what, False)
        left = {kind: opened.gpu.live(kind) for kind in before}
        assert (left == before) is (what != "enqueue")  # which leaves what the next frame of this shape uses
    opened.gpu.fail("cuMemAlloc_v2", 2, 2)  # as CUDA's header names it
    message = refused(opened.detect, "owl", np.ascontiguousarray(picture()[:130]))
    assert message == (
        "BACKEND: the GPU cannot be used: CUDA_ERROR_OUT_OF_MEMORY (2); close other programs or build smaller engines"
    )
    assert opened.check("owl") == ["launch", "wait"]  # nothing is broken
    opened.gpu.fail("cuGraphLaunch")
    assert "CUDA_ERROR_OF_THE_SIMULATION (700)" in refused(opened.detect, "owl")
    opened.check("owl")
    opened.check(PROMPT, small)
    opened.close()
    opened.gpu.refuse("plan")
    message = refused(opened.library.open, bundle, backend=b"tensorrt", no_cache=1)
    assert re.fullmatch(
        r"MISSING: .*text.plan cannot be loaded \(the simulation refuses plan\); build it again .* --overwrite", message
    )
    opened.gpu.refuse("plan", False)
    assert opened.gpu.left() == {}


def test_what_cuda_or_tensorrt_refuses_is_an_error_and_leaves_nothing(process, simulated, bundle, version):
    process.run(failures, simulated, bundle, version)


def clones(folder, bundle, version):
    opened = Opened(folder, bundle, version)
    library, gpu = opened.library, opened.gpu
    twins = [library.new("glip_clone", opened.detector) for _ in range(2)]
    assert gpu.trt.simulated_engines() == 2 and gpu.live("streams") == 3
    shapes = [np.ascontiguousarray(picture()[:height]) for height in (70, 110, 130, 150, 240)]
    prompts = [PROMPT, ["owl"]]
    wanted = {
        (i, j): opened.python.detect(shape, prompt, 0.1, color="rgb")
        for i, shape in enumerate(shapes)
        for j, prompt in enumerate(prompts)
    }
    wrong: list[BaseException] = []

    def frames(detector, order):
        try:
            for turn in range(20):  # canvases of five shapes come and go: one thread allocates while another records
                i, j = (turn // 2 + 2 * order) % 5, turn // 10
                prompt = library.encode(detector, prompts[j])
                same(library.detect(detector, prompt, shapes[i], 0.1), wanted[i, j])
                library.c.glip_prompt_free(prompt)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=frames, args=(twin, order)) for order, twin in enumerate(twins)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    assert gpu.live("violations") == 0  # nothing is allocated or given back while a stream is captured
    library.c.glip_close(opened.detector)  # the engines stay
    prompt = library.encode(twins[0], ["owl"])
    same(library.detect(twins[0], prompt, shapes[0], 0.1), wanted[0, 1])
    library.c.glip_prompt_free(prompt)
    for twin in twins:
        library.c.glip_close(twin)
    assert gpu.left() == {}


def test_clones_share_engines_and_no_buffers(process, simulated, bundle, version):
    process.run(clones, simulated, bundle, version)


def batches(folder, bundle, version):
    opened = Opened(folder, bundle, version, batch=2, sizes=((32, 96, 192), (160, 160, 192)))
    frames = [np.ascontiguousarray(picture()[:height]) for height in (120, 140, 150, 100, 130)]
    prompt = opened.library.encode(opened.detector, PROMPT)
    for _ in range(3):
        opened.gpu.graphs.clear()
        found = opened.library.detect_batch(opened.detector, prompt, frames, 0.1)
        assert opened.gpu.graphs == ["image.onnx"] * 3  # two, two and one
        for one, wanted in zip(found, opened.python.detect_batch(frames, PROMPT, 0.1, color="rgb"), strict=True):
            same(one, wanted)
    opened.library.c.glip_prompt_free(prompt)
    opened.close()


def test_more_pictures_than_the_engine_takes_go_in_turn(process, simulated, bundle, version):
    process.run(batches, simulated, bundle, version)


def prompts_in_parts(folder, bundle, version, split):
    opened = Opened(folder, bundle, version, split=split)
    assert opened.gpu.trt.simulated_engines() == 2  # the parts are loaded when they are needed
    texts = [PROMPT, ["owl"], ["penguin", "guitar"]]
    prompts = [opened.library.encode(opened.detector, text) for text in texts]
    small = np.ascontiguousarray(picture()[:90])
    for frame, is_new in ((picture(), True), (picture(), False), (picture(), False), (small, True), (picture(), False)):
        opened.gpu.graphs.clear()
        opened.gpu.log()
        found = opened.library.detect_prompts(opened.detector, prompts, frame, 0.1)
        log = opened.gpu.log()
        if split:
            assert opened.gpu.graphs == ["backbone.onnx", *["head.onnx"] * 3]
            # Only candidates, and none outside of a graph once it is recorded, which the second prompt does.
            assert log.count("download") == (3 if is_new else 0)
        else:
            assert opened.gpu.graphs == ["image.onnx"] * 3
        for one, text in zip(found, texts, strict=True):
            same(one, opened.python.detect(frame, text, 0.1, color="rgb"))
    for height in (50, 70, 110, 130):  # backbones come and go, and heads that read their features with them
        frame = np.ascontiguousarray(picture()[:height])
        for one, text in zip(opened.library.detect_prompts(opened.detector, prompts, frame, 0.1), texts, strict=True):
            same(one, opened.python.detect(frame, text, 0.1, color="rgb"))
    for prompt in prompts:
        opened.library.c.glip_prompt_free(prompt)
    opened.close()


@pytest.mark.parametrize("split", [True, False])
def test_several_prompts_on_a_frame(process, simulated, bundle, version, split):
    process.run(prompts_in_parts, simulated, bundle, version, split)


def pictures_on_the_gpu(folder, bundle, version):
    ctypes.CDLL(nvrtc())  # the runtime opens it by its name
    opened = Opened(folder, bundle, version)
    wanted = opened.python.detect(picture(), PROMPT, 0.1, color="rgb")
    bgra = np.zeros((picture().shape[0], picture().shape[1] + 5, 4), np.uint8)
    bgra[:, : picture().shape[1], :3] = picture()[..., ::-1]
    padded = {"width": picture().shape[1], "pitch": bgra.strides[0], "format": 2, "memory": 1}
    for turn in range(3):
        same(opened.detect(PROMPT, memory=1), wanted)
        log = opened.gpu.log()
        assert "wait for the default stream" in log and "resize" in log
        assert log.count("upload") == (4 if turn == 0 else 0)  # the prompt's and sizes; no pixels
        same(opened.detect(PROMPT, bgra, **padded), wanted)
    stream = ctypes.c_void_p(0)
    with_stream = {**padded, "stream": ctypes.addressof(stream)}
    same(opened.detect(PROMPT, bgra, **with_stream), wanted)
    assert "wait for another stream" in opened.gpu.log()
    same(opened.detect(PROMPT), wanted)  # and from the host again, in buffers of their own
    sides = {"width": picture().shape[1], "height": picture().shape[0]}
    luma = np.random.default_rng(5).integers(0, 256, (sides["height"], sides["width"] + 6), dtype=np.uint8)
    chroma = np.random.default_rng(6).integers(0, 256, (sides["height"] // 2, sides["width"]), dtype=np.uint8)
    planes = (np.ascontiguousarray(luma[:, : sides["width"]]), chroma)
    pitches = {"pitch": luma.strides[0], "chroma": chroma.ctypes.data, "chroma_pitch": chroma.strides[0]}
    found = opened.detect(PROMPT, luma, 0.02, memory=1, format=5, **pitches, **sides)
    wanted = opened.python.detect(planes, PROMPT, 0.02, color="nv12")
    assert len(wanted) > 0
    same(found, wanted)
    joined = np.concatenate([planes[0], chroma])  # without a gap between the planes
    same(opened.detect(PROMPT, joined, 0.02, memory=1, format=5, **sides), wanted)
    message = refused(opened.detect, PROMPT, memory=1, format=4)
    assert message.startswith("FRAME: the picture in GPU memory is gray; legal there are BGR, RGB, BGRA, RGBA and NV12")
    assert refused(opened.detect, PROMPT, memory=1, pitch=5).startswith("FRAME: picture has a pitch of 5 bytes")
    images = [opened.library.image(picture(), memory=memory) for memory in (0, 1)]
    given = (ctypes.POINTER(Image) * 2)(*(ctypes.pointer(image) for image in images))
    found = (ctypes.c_void_p * 2)()
    prompt = opened.library.encode(opened.detector, PROMPT)
    message = refused(
        opened.library.call, "glip_detect_batch", opened.detector, given, ctypes.c_size_t(2), prompt,
        ctypes.c_float(0.1), found,
    )  # fmt: skip
    assert message == "FRAME: some of the pictures are in GPU memory and some are not; copy those"
    opened.library.c.glip_prompt_free(prompt)
    opened.close()


def nvrtc() -> str:
    """NVRTC of CUDA 13, which compiles the GPU's resize here as it does there."""
    import nvidia

    for folder in nvidia.__path__:
        for file in Path(folder).glob("*/lib/libnvrtc.so.13"):
            return str(file)
    raise FileNotFoundError


def test_pictures_on_the_gpu_are_resized_there(simulated, bundle, version):
    try:
        nvrtc()
    except (ImportError, FileNotFoundError):
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    apart(pictures_on_the_gpu, simulated, bundle, version)


RAW = ["upload", "resize the upload"]
"""A picture of the host, as it is."""


def uploads(folder, bundle, version):
    ctypes.CDLL(nvrtc())
    opened = Opened(folder, bundle, version, {"resize": None})
    gpu, library = opened.gpu, opened.library
    assert library.c.glip_resize(opened.detector) == b"gpu"
    for asked in (b"", b"gpu", b"exact"):
        another = library.open(bundle, backend=b"tensorrt", no_cache=1, resize=asked)
        assert library.c.glip_resize(another) == (asked or b"gpu")
        library.c.glip_close(another)
    gpu.log()
    first = opened.check(PROMPT)
    assert sorted(first) == sorted(["wait", *RAW, *["upload"] * 3, *PLAIN[1:], "wait"])
    assert first.index("resize the upload") == first.index("upload") + 1 < first.index("execute")
    for _ in range(2):
        assert opened.check(PROMPT) == [*RAW, "launch", "wait"]  # right before the network, which is one launch
    log = opened.check(["penguin", "owl"])
    assert log[:2] == RAW and log[-2:] == ["launch", "wait"] and set(log[2:-2]) == {"upload"}

    # Every form of a picture; rows with gaps, which are not uploaded.
    height, width = picture().shape[:2]
    random = np.random.default_rng(7)
    wide = random.integers(0, 256, (height, width + 5, 4), dtype=np.uint8)
    wide[:, :width, :3] = picture()
    wanted = opened.python.detect(picture(), PROMPT, 0.1, color="rgb")
    shape = {"width": width, "height": height}
    same(opened.detect(PROMPT, wide, format=3, pitch=wide.strides[0], **shape), wanted)
    bgra = np.ascontiguousarray(wide[:, :width, [2, 1, 0, 3]])
    same(opened.detect(PROMPT, bgra, format=2), wanted)
    same(opened.detect(PROMPT, np.ascontiguousarray(picture()[..., ::-1]), format=0), wanted)
    luma = random.integers(0, 256, (height, width + 6), dtype=np.uint8)
    chroma = random.integers(0, 256, (height // 2, width + 2), dtype=np.uint8)
    planes = tuple(np.ascontiguousarray(plane[:, :width]) for plane in (luma, chroma))
    wanted = opened.python.detect(planes, PROMPT, 0.02, color="nv12")
    assert len(wanted) > 0
    pitches = {"pitch": luma.strides[0], "chroma": chroma.ctypes.data, "chroma_pitch": chroma.strides[0]}
    same(opened.detect(PROMPT, luma, 0.02, format=5, **pitches, **shape), wanted)
    assert opened.gpu.log() == [*RAW, "launch", "wait"]  # both planes at once
    same(opened.detect(PROMPT, np.concatenate(planes), 0.02, format=5, **shape), wanted)
    same(opened.detect(PROMPT, memory=1), opened.python.detect(picture(), PROMPT, 0.1, color="rgb"))
    assert opened.gpu.log().count("upload") == 0  # what is there already is not brought
    # A prompt with which there is something to be found in a gray picture.
    gray = random.integers(0, 256, (height, width + 3), dtype=np.uint8)
    gray[:, :width] = picture()[..., 0]
    birds = ["penguin", "owl"]
    wanted = opened.python.detect(np.repeat(picture()[..., :1], 3, axis=2), birds, 0.1, color="rgb")
    assert len(wanted) > 0
    same(opened.detect(birds, gray, format=4, pitch=gray.strides[0], **shape), wanted)

    # A larger picture of the same canvas takes larger memory, in place of the old; a smaller one that which is there.
    counts = [gpu.live("pinned"), gpu.live("device")]
    for times in (2, 1):
        opened.check(PROMPT, np.ascontiguousarray(np.repeat(np.repeat(picture(), times, 0), times, 1)))
        assert [gpu.live("pinned"), gpu.live("device")] == counts
    twin = library.new("glip_clone", opened.detector)
    assert library.c.glip_resize(twin) == b"gpu"
    prompt = library.encode(twin, PROMPT)
    gpu.log()
    same(library.detect(twin, prompt, picture(), 0.1), opened.python.detect(picture(), PROMPT, 0.1, color="rgb"))
    assert "resize the upload" in gpu.log()
    library.c.glip_prompt_free(prompt)
    library.c.glip_close(twin)
    opened.close()


def uploads_of_several(folder, bundle, version):
    ctypes.CDLL(nvrtc())
    opened = Opened(
        folder, bundle, version, {"resize": b"gpu"}, batch=2, sizes=((32, 96, 192), (160, 160, 192)), split=True
    )
    frames = [np.ascontiguousarray(picture()[:height]) for height in (120, 140, 150, 100, 130)]
    prompt = opened.library.encode(opened.detector, PROMPT)
    for _ in range(3):
        opened.gpu.log()
        found = opened.library.detect_batch(opened.detector, prompt, frames, 0.1)
        assert opened.gpu.log().count("resize the upload") == len(frames)
        for one, wanted in zip(found, opened.python.detect_batch(frames, PROMPT, 0.1, color="rgb"), strict=True):
            same(one, wanted)
    prompts = [prompt, opened.library.encode(opened.detector, ["owl"])]
    opened.gpu.log()
    found = opened.library.detect_prompts(opened.detector, prompts, frames[0], 0.1)
    assert opened.gpu.log().count("resize the upload") == 1  # the heads read the features
    for one, text in zip(found, (PROMPT, ["owl"]), strict=True):
        same(one, opened.python.detect(frames[0], text, 0.1, color="rgb"))
    for one in prompts:
        opened.library.c.glip_prompt_free(one)
    opened.close()


def no_memory_for_an_upload(folder, bundle, version):
    ctypes.CDLL(nvrtc())
    opened = Opened(folder, bundle, version)
    opened.gpu.fail("cuModuleLoadData", 0, 2)  # which, unlike a missing NVRTC, is no reason to use the host
    message = refused(opened.library.open, bundle, backend=b"tensorrt", no_cache=1)
    assert message.startswith("BACKEND: the GPU cannot be used: CUDA_ERROR_OUT_OF_MEMORY (2); ")
    opened.library.c.glip_close(opened.detector)
    opened.detector = opened.library.open(bundle, backend=b"tensorrt", no_cache=1, resize=b"gpu", **SIDE)
    opened.check(PROMPT)
    large = np.ascontiguousarray(np.repeat(np.repeat(picture(), 2, 0), 2, 1))
    counts = [gpu_live - 1 for gpu_live in (opened.gpu.live("pinned"), opened.gpu.live("device"))]
    for function in ("cuMemHostAlloc", "cuMemAlloc_v2", "cuMemcpyHtoDAsync_v2", "cuLaunchKernel"):
        opened.gpu.fail(function, 0, 2)
        message = refused(opened.detect, PROMPT, large)
        assert message.startswith("BACKEND: the GPU cannot be used: CUDA_ERROR_OUT_OF_MEMORY (2); "), function
        if "Alloc" in function:  # the old memory went first, so that the new finds room
            assert [opened.gpu.live("pinned"), opened.gpu.live("device")] == counts
    opened.check(PROMPT, large)
    opened.check(PROMPT)
    opened.close()


@pytest.mark.parametrize("work", [uploads, uploads_of_several, no_memory_for_an_upload])
def test_pictures_of_the_host_are_uploaded_as_they_are(simulated, bundle, version, work):
    try:
        nvrtc()
    except (ImportError, FileNotFoundError):
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    apart(work, simulated, bundle, version)


def without_nvrtc(folder, bundle, version):
    simulation(folder, number_of(version)).cuda.simulated_driver(12040)
    opened = Opened(folder, bundle, version, {"resize": None})
    assert opened.library.c.glip_resize(opened.detector) == b"exact"
    message = refused(opened.detect, PROMPT, memory=1)
    assert message == (
        "MISSING: NVRTC, which compiles the GPU's resize, is not installed; install the libnvrtc of CUDA 12, or copy"
        " the picture to the host"
    )
    opened.check(PROMPT)
    opened.close()
    assert refused(opened.library.open, bundle, backend=b"tensorrt", no_cache=1, resize=b"gpu") == (
        "MISSING: NVRTC, which compiles the GPU's resize, is not installed; install the libnvrtc of CUDA 12, or open"
        ' with resize "exact"'
    )
    assert opened.gpu.left() == {}


def test_without_nvrtc_pictures_come_from_the_host(simulated, bundle, version):
    for name in ("libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        pytest.skip(f"{name} is installed in the system")
    apart(without_nvrtc, simulated, bundle, version)


def older_library(folder, bundle, version):
    opened = Opened(folder, bundle, version)
    opened.check(PROMPT)
    opened.check(PROMPT)
    opened.close()


def test_a_library_older_than_the_headers_is_asked_for_what_it_has(simulated, bundle, version):
    """A class of TensorRT 10.0 lacks the functions that 10.1 brought; calling one ends the process."""
    if not version.startswith("10."):
        pytest.skip(f"the headers are of TensorRT {version}: their oldest library has all functions")
    apart(older_library, simulated, bundle, "10.0.1.34")


# -- engines ----------------------------------------------------------------------------------------------------------


def said_of(folder, bundle, version, options):
    """What opening says, or nothing; everything is given back."""
    gpu = simulation(folder, number_of(version))
    given = {"backend": b"tensorrt", "no_cache": 1, **options}
    try:
        gpu.library.c.glip_close(gpu.library.open(bundle, **given))
    except GlipError as error:
        assert gpu.left() == {}
        return str(error)
    assert gpu.left() == {}
    return ""


def python_says(record: EngineRecord, folder: Path, bundle: Bundle, version: str) -> str:
    with pytest.raises(PythonError) as caught:
        record.check(folder, bundle, Machine("tensorrt", version, "Simulated GPU", 80))
    return f"MISSING: {caught.value}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "10.3.0"}, "were built by tensorrt 10.3.0, here is "),
        ({"compute_capability": 90}, "were built for SM90, here is Simulated GPU (SM80)"),
        ({"gpu": "Another GPU"}, "were built on Another GPU, here is Simulated GPU"),
        ({"manifest_sha256": "0" * 64}, "were built from another export than"),
        ({"plugin": PluginRecord("libglip_deform.so", "0" * 64)}, "lack their plugin library libglip_deform.so"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_engines_for_something_else_are_refused_in_python_s_words(process, simulated, bundle, version, change, words):
    opened = Bundle.open(bundle)
    folder = write_engines(opened, version=version, **SHAPES)
    record = replace_record(EngineRecord.read(folder), change)
    record.write(folder)
    wanted = python_says(record, folder, opened, version)
    assert words in wanted and "build again: glip-build" in wanted
    assert process.run(said_of, simulated, bundle, version, {}) == wanted


def replace_record(record: EngineRecord, change: dict[str, Any]) -> EngineRecord:
    import msgspec

    return msgspec.structs.replace(record, **change)


def test_changed_files_are_refused_in_python_s_words(process, simulated, bundle, version):
    opened = Bundle.open(bundle)
    folder = write_engines(opened, version=version, **SHAPES)
    record = EngineRecord.read(folder)
    plan = folder / "image.plan"
    content = plan.read_bytes()
    for damaged in (content[:-1], content[:-1] + b"!"):
        plan.write_bytes(damaged)
        wanted = python_says(record, folder, opened, version)
        assert "was changed or cut short after its build" in wanted
        assert process.run(said_of, simulated, bundle, version, {}) == wanted
    plan.unlink()
    wanted = python_says(record, folder, opened, version)
    assert process.run(said_of, simulated, bundle, version, {}) == wanted
    (folder / "libglip_deform.so").write_bytes(b"a library")
    record = replace_record(record, {"plugin": PluginRecord("libglip_deform.so", "0" * 64)})
    record.write(folder)
    wanted = python_says(record, folder, opened, version)
    assert "is not the one these engines were built with" in wanted
    assert process.run(said_of, simulated, bundle, version, {}) == wanted


def test_records_that_cannot_be_read(process, simulated, bundle, version):
    folder = write_engines(Bundle.open(bundle), version=version, **SHAPES)
    file = folder / "build.json"
    content = json.loads(file.read_text())
    again = f"delete {folder} and build again with glip-build"
    profiles = {**content["engines"], "image.plan": {**content["engines"]["image.plan"], "profiles": [{}]}}
    for change, words in (
        ({"format": "something"}, '"format" is not'),
        ({"format_version": 0}, "format_version is 0"),
        ({"engines": {}}, "it does not list text.plan"),
        ({"engines": profiles}, "a profile lacks shapes of"),
        ({"engines": 7}, "damaged"),
        ({"compute_capability": "80"}, "damaged"),
    ):
        file.write_text(json.dumps({**content, **change}))
        said = process.run(said_of, simulated, bundle, version, {})
        assert said.startswith(f"MISSING: {file} is damaged (") and said.endswith(again) and words in said
    file.write_text(json.dumps({**content, "format_version": 2}))
    said = process.run(said_of, simulated, bundle, version, {})
    assert said == f"MISSING: {file} has format 2, this library reads up to 1; upgrade it"
    file.write_text("{")
    assert "is damaged" in process.run(said_of, simulated, bundle, version, {})


def test_the_first_engines_that_fit_are_opened(process, simulated, bundle, version):
    opened = Bundle.open(bundle)
    said = process.run(said_of, simulated, bundle, version, {})
    assert said == f"MISSING: bundle {bundle} has no engines; build them with glip-build {bundle}"
    other = write_engines(opened, "a-other", version=version, **SHAPES)
    replace_record(EngineRecord.read(other), {"compute_capability": 90}).write(other)
    write_engines(opened, "b-here", version=version, **SHAPES)
    assert process.run(said_of, simulated, bundle, version, {}) == ""
    said = process.run(said_of, simulated, bundle, version, {"engines": b"a-other"})
    assert "were built for SM90" in said
    assert process.run(said_of, simulated, bundle, version, {"engines": b"b-here"}) == ""
    said = process.run(said_of, simulated, bundle, version, {"engines": b"nowhere"})
    assert said == "MISSING: nowhere holds no engines (it has no build.json); build them with glip-build BUNDLE"


def plugin_once(folder, bundle, version):
    gpu = simulation(folder, number_of(version))
    gpu.plugins.clear()
    for _ in range(2):
        assert said_of(folder, bundle, version, {}) == ""
    assert len(gpu.plugins) == 1 and gpu.plugins[0].endswith("/here/libglip_deform.so")
    gpu.trt.simulated_forget_plugin()
    gpu.plugin_loads = False
    said = said_of(folder, bundle, version, {})
    gpu.plugin_loads = True
    wanted = "MISSING: plugin library .*/libglip_deform.so cannot be loaded.*; build the engines again.*"
    assert re.fullmatch(wanted, said)
    said = said_of(folder, bundle, version, {"no_plugins": 1})
    assert re.fullmatch(
        f"MISSING: engines .*/here need the plugin library libglip_deform.so, and plugins are refused; build engines"
        f" without one: glip-build {bundle} --flavor tensorrt --form native",
        said,
    )


def test_a_plugin_is_loaded_once_a_process(process, simulated, bundle, version):
    folder = write_engines(Bundle.open(bundle), version=version, **SHAPES)
    library = folder / "libglip_deform.so"
    library.write_bytes(b"a library")
    record = replace_record(EngineRecord.read(folder), {"plugin": PluginRecord(library.name, sha256_of(library))})
    record.write(folder)
    process.run(plugin_once, simulated, bundle, version)


def too_large(folder, bundle, version):
    opened = Opened(folder, bundle, version, tokens=((1, 8, 8),), sizes=((32, 64, 96),) * 2, classes=(1, 2, 2))
    again = f"glip-build {bundle} --flavor tensorrt"
    long = "red apple and green apple and blue car and [yellow bus]"
    assert re.fullmatch(
        rf"MISSING: the prompt has \d+ tokens, the engine takes up to 8; shorten it, or build again: {again}"
        r" --tokens 1:16:\d+",
        refused(opened.library.encode, opened.detector, long),
    )
    assert refused(opened.detect, ["a", "b", "c"], picture()[:90, :90].copy()) == (
        f"MISSING: the prompt has 3 classes, the engine takes up to 2; build again: {again} --classes 1:8:3"
    )
    assert refused(opened.detect, "owl") == (
        "MISSING: the frame's canvas is 128 pixels in width, the engine takes up to 96; lower the shortest side or"
        f" build with a larger --max: {again}"
    )
    opened.close()


def test_what_the_engine_was_not_built_for(process, simulated, bundle, version):
    process.run(too_large, simulated, bundle, version)


def test_another_tensorrt_than_the_headers(process, simulated, bundle, version):
    major = version.split(".")[0]
    folder = write_engines(Bundle.open(bundle), version="9.3.0", **SHAPES)
    said = process.run(said_of, simulated, bundle, version, {})
    assert said == (
        f"MISSING: engines {folder} were built by tensorrt 9.3.0, this library was compiled for TensorRT {major};"
        f" compile it with the headers of tensorrt 9.3.0, or build engines with TensorRT {major}"
    )
    replace_record(EngineRecord.read(folder), {"flavour": "tensorrt-next", "version": "2.0"}).write(folder)
    said = process.run(said_of, simulated, bundle, version, {})
    assert said == (
        f"MISSING: engines {folder} were built by tensorrt-next 2.0, which this library does not run; build engines"
        " with glip-build --flavor tensorrt or tensorrt-rtx"
    )


def test_native_code_of_a_stranger_is_refused_before_anything_is_opened(simulated, bundle):
    library = Library(simulated)
    assert refused(library.open, bundle, backend=b"tensorrt", untrusted=1, no_verify=1) == (
        "OPTION: backend tensorrt runs native code that comes with the bundle, which is not trusted; use backend"
        " openvino or onnxruntime"
    )
    assert refused(library.open, bundle, backend=b"tensorrt", precision=b"bf16", no_verify=1) == (
        'OPTION: precision is "bf16", which backend tensorrt cannot choose; use backend openvino, or glip-build'
        " --precision"
    )


# -- machines that lack something -------------------------------------------------------------------------------------


def opening_says(folder, bundle, loaded):
    for library in loaded:
        ctypes.CDLL(str(library))
    return refused(Library(folder).open, bundle, backend=b"tensorrt", no_cache=1, no_verify=1)


def system_has(name: str) -> None:
    if apart(loads, name):
        pytest.skip(f"{name} is installed in the system")


def loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def test_a_machine_without_a_driver(simulated, bundle, version):
    system_has("libcuda.so.1")
    write_engines(Bundle.open(bundle), version=version, **SHAPES)
    said = apart(opening_says, simulated, bundle, [])
    assert said.startswith("MISSING: there is no NVIDIA driver here (libcuda.so.1: ")
    assert said.endswith("); install the NVIDIA driver, or use backend openvino")


def test_a_machine_without_tensorrt(simulated, bundle, version):
    name = f"libnvinfer.so.{version.split('.')[0]}"
    system_has(name)
    write_engines(Bundle.open(bundle), version=version, **SHAPES)
    said = apart(opening_says, simulated, bundle, [simulated / "simulated" / "libcuda.so.1"])
    assert said.startswith(f"MISSING: tensorrt {version} is not installed ({name}: ")
    assert said.endswith("); install it, or name its folder in LD_LIBRARY_PATH")


def test_a_driver_that_is_too_old(simulated, bundle, version, tmp_path):
    write_engines(Bundle.open(bundle), version=version, **SHAPES)
    (tmp_path / "old.c").write_text("int cuInit(unsigned flags) { return (int)flags; }\n")
    library = tmp_path / "libcuda.so.1"
    run("cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", tmp_path / "old.c", "-o", library)
    assert apart(opening_says, simulated, bundle, [library]) == (
        "MISSING: libcuda.so.1 is too old or damaged: it lacks cuDriverGetVersion; install the NVIDIA driver, or use"
        " backend openvino"
    )


def no_gpu(folder, bundle):
    cuda = ctypes.CDLL(str(folder / "simulated" / "libcuda.so.1"))
    cuda.simulated_fail(b"cuInit", 0, 100)
    return refused(Library(folder).open, bundle, backend=b"tensorrt", no_cache=1, no_verify=1)


def test_a_driver_that_finds_no_gpu(simulated, bundle, version):
    write_engines(Bundle.open(bundle), version=version, **SHAPES)
    assert apart(no_gpu, simulated, bundle) == (
        "MISSING: the NVIDIA driver finds no GPU here (error 100); see whether nvidia-smi names one, or use backend"
        " openvino"
    )
