"""Frames in GPU memory: what is read of them, and the resize kernel's own source run on this CPU pixel by pixel."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_tensorrt import SimulatedDeviceArray

import glip_deploy.backends
from glip_deploy import Detector, GlipError
from glip_deploy.backends.cuda import compile_kernel
from glip_deploy.errors import FrameError, OptionError
from glip_deploy.frames import Canvas, load_image, make_canvas, resize
from glip_deploy.frames.device import (
    LEGACY_DEFAULT_STREAM,
    DeviceCanvas,
    DeviceFrame,
    device_canvas,
    is_on_device,
    network_canvas,
)

SOURCE = Path(glip_deploy.backends.__file__).with_name("resize.cu")
HOST = """
#define __device__
#define __global__
struct Index { int x, y, z; };
static Index blockIdx, blockDim, threadIdx;
#include "resize.cu"
extern "C" void run(const unsigned char* in, long long stride, int in_height, int in_width, int channels, int red,
                    unsigned char* out, int canvas_height, int canvas_width, int height, int width) {
  blockDim = {32, 8, 1};
  for (blockIdx.y = 0; blockIdx.y * 8 < canvas_height; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x * 32 < canvas_width; ++blockIdx.x)
      for (threadIdx.y = 0; threadIdx.y < 8; ++threadIdx.y)
        for (threadIdx.x = 0; threadIdx.x < 32; ++threadIdx.x)
          glip_resize(in, stride, in_height, in_width, channels, red, out, canvas_height, canvas_width, height, width);
}
extern "C" void run_nv12(const unsigned char* luma, long long stride, const unsigned char* chroma,
                         long long chroma_stride, int in_height, int in_width, unsigned char* out, int canvas_height,
                         int canvas_width, int height, int width) {
  blockDim = {32, 8, 1};
  for (blockIdx.y = 0; blockIdx.y * 8 < canvas_height; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x * 32 < canvas_width; ++blockIdx.x)
      for (threadIdx.y = 0; threadIdx.y < 8; ++threadIdx.y)
        for (threadIdx.x = 0; threadIdx.x < 32; ++threadIdx.x)
          glip_resize_nv12(luma, stride, chroma, chroma_stride, in_height, in_width, out, canvas_height, canvas_width,
                           height, width);
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler; apt-get install g++")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "host.cpp").write_text(HOST)
    library = folder / "resize.so"
    command = [compiler, "-O2", "-shared", "-fPIC", f"-I{SOURCE.parent}", "-o", library, folder / "host.cpp"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def drawn(kernel, array, color, canvas=None, **sides):
    """The canvas the kernel makes of one frame."""
    canvas = canvas or device_canvas([array], color=color, **sides)
    (frame,) = canvas.pictures
    out = np.full(canvas.shape[1:], 99, np.uint8)
    target = (ctypes.c_void_p(out.ctypes.data), *canvas.shape[1:3], *(int(side) for side in canvas.image_sizes[0]))
    source = (ctypes.c_void_p(frame.address), ctypes.c_longlong(frame.row_bytes))
    if frame.chroma:
        chroma = (ctypes.c_void_p(frame.chroma), ctypes.c_longlong(frame.chroma_row_bytes))
        kernel.run_nv12(*source, *chroma, frame.height, frame.width, *target)
    else:
        kernel.run(*source, frame.height, frame.width, frame.channels, canvas.red, *target)
    return out


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    channels=st.sampled_from([3, 4]),
    gap=st.integers(0, 9),
    color=st.sampled_from(["rgb", "bgr"]),
    shortest=st.integers(1, 120),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_kernel_is_the_cpus_resize_to_one_gray_level(kernel, height, width, channels, gap, color, shortest, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    array = SimulatedDeviceArray(picture, width * channels + gap)
    sides = {"shortest_side": shortest, "longest_side": 200}
    wanted = make_canvas([np.ascontiguousarray(picture[..., :3])], color=color, **sides)
    found = drawn(kernel, array, color, **sides)
    assert found.shape == wanted.frames.shape[1:]
    assert np.abs(found.astype(int) - wanted.frames[0]).max() <= 1
    rows, columns = wanted.image_sizes[0]
    assert not found[rows:].any()
    assert not found[:, columns:].any()


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 75).map(lambda half: 2 * half),
    width=st.integers(1, 75).map(lambda half: 2 * half),
    gap=st.integers(0, 9),
    apart=st.sampled_from(["together", "planes", "pairs"]),
    shortest=st.integers(1, 120),
    seed=st.integers(0, 2**32 - 1),
)
def test_nv12_on_the_gpu_is_the_cpus_to_one_gray_level(kernel, height, width, gap, apart, shortest, seed):
    both = np.random.default_rng(seed).integers(0, 256, (height * 3 // 2, width), dtype=np.uint8)
    luma, chroma = both[:height], both[height:]
    if apart == "pairs":
        chroma = chroma.reshape(height // 2, width // 2, 2)
    planes = (luma, chroma)
    given = tuple(SimulatedDeviceArray(plane, width + gap) for plane in planes)
    if apart == "together":
        planes, given = both, SimulatedDeviceArray(both, width + gap)
    sides = {"shortest_side": shortest, "longest_side": 200}
    wanted = make_canvas([planes], color="nv12", **sides)
    found = drawn(kernel, given, "nv12", **sides)
    assert found.shape == wanted.frames.shape[1:]
    assert np.abs(found.astype(int) - wanted.frames[0]).max() <= 1
    rows, columns = wanted.image_sizes[0]
    assert not found[rows:].any()
    assert not found[:, columns:].any()


def test_pictures_that_are_uploaded_arrive_whole(kernel):
    """What the backend writes into page-locked memory is what the kernel then reads."""
    rng = np.random.default_rng(3)
    packed, both = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((10, 14, 4), (15, 14)))
    for frame, color in ((packed, "bgr"), (both, "nv12"), ((both[:10], both[10:]), "nv12")):
        canvas = device_canvas([frame], color=color, shortest_side=20, longest_side=40)
        (picture,) = canvas.pictures
        memory = np.zeros(picture.size, np.uint8)
        picture.write(memory)
        uploaded = picture.uploaded(memory.ctypes.data, 7)
        assert uploaded.stream == 7
        there = drawn(kernel, None, color, canvas=replace(canvas, pictures=(uploaded,)))
        wanted = make_canvas([frame], color=color, shortest_side=20, longest_side=40)
        assert np.abs(there.astype(int) - wanted.frames[0]).max() <= 1


@pytest.mark.parametrize("size", [(1080, 1920), (480, 640), (720, 1280)])
def test_a_photograph_at_the_networks_size(kernel, size):
    photo = resize(load_image(Path(__file__).parents[3] / "export/glip_export/data/picture.jpg"), size)
    wanted = make_canvas([photo], color="rgb").frames[0]
    found = drawn(kernel, SimulatedDeviceArray(photo), "rgb")
    difference = np.abs(found.astype(int) - wanted)
    assert difference.max() <= 1
    assert difference.mean() < 0.2


@pytest.mark.parametrize("compute_capability", [75, 80, 90, 120])
def test_the_kernel_compiles_without_a_gpu(compute_capability):
    try:
        code = compile_kernel(SOURCE, compute_capability)
    except GlipError as error:
        if "not installed" in str(error):
            pytest.skip(str(error))
        raise
    assert code.startswith(b"\x7fELF")
    assert b".text.glip_resize" in code
    assert b".text.glip_resize_nv12" in code


def test_a_gpu_the_compiler_does_not_know():
    try:
        compile_kernel(SOURCE, 80)
    except GlipError as error:
        pytest.skip(str(error))
    with pytest.raises(GlipError, match=r"cannot compile resize\.cu for SM31 .*install the nvidia-cuda-nvrtc"):
        compile_kernel(SOURCE, 31)


def test_what_is_read_of_a_frame():
    frame = DeviceFrame.of(SimulatedDeviceArray(np.zeros((4, 5, 3), np.uint8), 64, stream=7))
    assert (frame.height, frame.width, frame.channels, frame.row_bytes, frame.stream) == (4, 5, 3, 64, 7)
    assert DeviceFrame.of(SimulatedDeviceArray(np.zeros((4, 5, 3), np.uint8))).stream == LEGACY_DEFAULT_STREAM
    assert is_on_device(SimulatedDeviceArray(np.zeros((4, 5, 3), np.uint8)))
    assert not is_on_device(np.zeros((4, 5, 3), np.uint8))


class DlpackArray:
    """A picture in "GPU memory" that says so by DLPack, in a capsule that numpy makes."""

    def __init__(self, array, device=2, both=False):
        self.array, self.device, self.streams = array, device, []
        if both:  # PyTorch's, which names no stream there
            self.__cuda_array_interface__ = SimulatedDeviceArray(array).__cuda_array_interface__

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        return self.array.__dlpack__()


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("device", [2, 13])
def test_what_is_read_by_dlpack(kernel, device, both):
    """The library is asked to order its work before the legacy default stream, which the backend waits for."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8)
    given = DlpackArray(pixels[2:, 3:13] if not both else pixels.copy(), device, both)
    assert is_on_device(given)
    frame = DeviceFrame.of(given)
    height, width, _ = given.array.shape
    assert (frame.address, frame.height, frame.width) == (given.array.ctypes.data, height, width)
    assert (frame.channels, frame.row_bytes, frame.stream) == (3, 48, LEGACY_DEFAULT_STREAM)
    assert given.streams == [LEGACY_DEFAULT_STREAM]
    sides = {"shortest_side": 20, "longest_side": 40}
    wanted = make_canvas([np.ascontiguousarray(given.array)], color="rgb", **sides).frames[0]
    assert np.abs(drawn(kernel, given, "rgb", **sides).astype(int) - wanted).max() <= 1


def test_memory_lent_by_dlpack_is_given_back():
    pixels = np.zeros((4, 5, 3), np.uint8)
    before = sys.getrefcount(pixels)
    frame = DeviceFrame.of(DlpackArray(pixels))
    assert sys.getrefcount(pixels) > before + 1  # the capsule's, beside the wrapper's
    del frame
    assert sys.getrefcount(pixels) == before


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), "has 32 bits an element of DLPack's type 2; legal is uint8"),
        (np.zeros((4, 5, 3), np.int8), "has 8 bits an element of DLPack's type 0; legal is uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"has shape \(3, 4, 5\); legal is \(H, W, 3\)"),
        (np.zeros((4, 10, 3), np.uint8)[:, ::2], "no gaps inside"),
        (np.zeros((4, 5, 3), ">f4"), "malformed DLPack interface"),
    ],
)
def test_illegal_frames_by_dlpack(array, message):
    with pytest.raises(FrameError, match=message):
        DeviceFrame.of(DlpackArray(array))


def test_dlpack_in_host_memory_is_not_on_the_device():
    assert not is_on_device(DlpackArray(np.zeros((4, 5, 3), np.uint8), device=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"typestr": "<f4"}, "has type <f4; legal is uint8"),
        ({"shape": (3, 4, 5)}, r"has shape \(3, 4, 5\); legal is \(H, W, 3\)"),
        ({"shape": (4, 5)}, r"has shape \(4, 5\)"),
        ({"shape": (0, 5, 3)}, r"has shape \(0, 5, 3\)"),
        ({"strides": (1, 4, 20)}, "no gaps inside"),
        ({"data": (0, False)}, "address 0"),
        ({"data": None}, "malformed"),
        ({"data": ()}, "malformed"),
        ({"data": ("x", False)}, "malformed"),
        ({"shape": None}, "malformed"),
        ({"shape": (4.0, 5, 3)}, "malformed"),
        ({"shape": (-4, 5, 3)}, r"has shape \(-4, 5, 3\)"),
        ({"strides": 15}, "malformed"),
        ({"strides": ("a", 3, 1)}, "malformed"),
    ],
)
def test_illegal_frames(change, message):
    array = SimulatedDeviceArray(np.zeros((4, 5, 3), np.uint8))
    array.__cuda_array_interface__.update(change)
    with pytest.raises(FrameError, match=message):
        DeviceFrame.of(array)


def test_an_interface_that_cannot_be_read():
    class Incomplete:
        __cuda_array_interface__: ClassVar = {"version": 3}

    class Learning:
        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("a variable that requires grad")

    for frame in (Incomplete(), Learning()):
        with pytest.raises(FrameError, match="malformed __cuda_array_interface__"):
            network_canvas([frame], color="rgb")


def test_a_batch_is_on_one_side():
    here, there = np.zeros((4, 5, 3), np.uint8), SimulatedDeviceArray(np.zeros((4, 5, 3), np.uint8))
    assert isinstance(network_canvas([here], color="rgb"), Canvas)
    assert isinstance(network_canvas([there], color="rgb"), DeviceCanvas)
    with pytest.raises(FrameError, match="in GPU memory and in host memory"):
        network_canvas([here, there], color="rgb")


def test_the_color_has_no_default():
    with pytest.raises(OptionError, match='must be "bgr" or "rgb"'):
        device_canvas([SimulatedDeviceArray(np.zeros((4, 5, 3), np.uint8))], color="gray")


def test_the_cpu_backend_refuses_frames_in_gpu_memory(tiny_bundle):
    with (
        Detector.open(tiny_bundle, cache_dir=None) as detector,
        pytest.raises(GlipError, match="is in GPU memory, which this backend cannot read"),
    ):
        detector.detect(SimulatedDeviceArray(np.zeros((64, 64, 3), np.uint8)), ["cat"], color="rgb")
