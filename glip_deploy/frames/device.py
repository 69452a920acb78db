"""Frames that are resized on the GPU.

Those of PyCUDA, CuPy, PyTorch, Numba and others are in its memory already, and stay there; those of the host are
uploaded as they are.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import FrameError
from glip_deploy.frames.canvas import Color, NetworkCanvas, Resize, make_canvas
from glip_deploy.frames.geometry import canvas_size, network_size
from glip_deploy.frames.load import as_frame
from glip_deploy.frames.nv12 import nv12_planes, nv12_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DeviceCanvas", "DeviceFrame", "HostFrame", "device_canvas", "is_on_device", "network_canvas"]

LEGACY_DEFAULT_STREAM = 1
"""The handle of the stream that work without a stream goes to (cudaStreamLegacy)."""


_DLPACK_GPUS = (2, 13)
"""kDLCUDA and kDLCUDAManaged, the kinds of devices whose memory CUDA kernels can read."""
_DLPACK_BYTES = (1, 8, 1)
"""Code, bits and lanes of uint8."""


class _DLTensor(ctypes.Structure):
    """The beginning of DLPack's DLManagedTensor, as its specification lays it out."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class _Memory:
    """An array of bytes in GPU memory, as its owner describes it."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Bytes from one element to the next along each axis."""
    stream: int
    owner: Any

    @classmethod
    def of(cls, array: Any) -> _Memory:
        """Read an object's DLPack interface, or its `__cuda_array_interface__`, version 2 or 3.

        By DLPack the library itself makes the legacy default stream wait for its work, whatever stream that is on
        (PyTorch's current one, say, which its other interface does not name). Where neither interface names a stream
        (version 2, and PyCUDA), a picture may still be in the making on the legacy default stream, which is therefore
        the one to wait for.

        Raises:
            FrameError: the interface is malformed, not of uint8, or points nowhere.
        """
        by_dlpack = _on_dlpack_gpu(array)
        name = "DLPack interface" if by_dlpack else "__cuda_array_interface__"
        try:
            memory = cls._of_dlpack(array) if by_dlpack else cls._of_interface(array)
        except (AttributeError, BufferError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise FrameError(
                f"a frame in GPU memory has a malformed {name} ({type(error).__name__}: {error})"
                + ("" if by_dlpack else "; legal is version 2 or 3")
            ) from error
        if memory.address < 1:
            raise FrameError(f"a frame in GPU memory has the address {memory.address}; it points nowhere")
        return memory

    @classmethod
    def _of_interface(cls, array: Any) -> _Memory:
        interface = array.__cuda_array_interface__
        shape, kind = tuple(operator.index(side) for side in interface["shape"]), interface["typestr"]
        strides = tuple(operator.index(step) for step in interface.get("strides") or ())
        address = operator.index(interface["data"][0])
        stream = operator.index(interface.get("stream") or LEGACY_DEFAULT_STREAM)
        if kind not in ("|u1", "<u1", ">u1"):
            raise FrameError(f"a frame in GPU memory has type {kind}; legal is uint8 (|u1), convert it first")
        return cls(address, shape, strides or _packed(shape), stream, array)

    @classmethod
    def _of_dlpack(cls, array: Any) -> _Memory:
        capsule = array.__dlpack__(stream=LEGACY_DEFAULT_STREAM)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        tensor = _DLTensor.from_address(pointer(capsule, b"dltensor"))
        if (tensor.code, tensor.bits, tensor.lanes) != _DLPACK_BYTES:
            raise FrameError(
                f"a frame in GPU memory has {tensor.bits * tensor.lanes} bits an element of DLPack's type"
                f" {tensor.code}; legal is uint8, convert it first"
            )
        shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
        strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else _packed(shape)
        # The capsule is never renamed, so that it frees the tensor itself when the frame goes.
        address = (tensor.data or 0) + tensor.byte_offset
        return cls(address, shape, strides, LEGACY_DEFAULT_STREAM, (array, capsule))

    def check_rows(self, row_bytes: int) -> None:
        """Check that rows of so many bytes have no gaps inside; between them there may be some, as decoders leave.

        Raises:
            FrameError: they have.
        """
        within = _packed(self.shape)[1:]
        if self.strides[1:] != within or self.strides[0] < row_bytes:
            raise FrameError(f"a frame in GPU memory has strides {self.strides}; its rows must have no gaps inside")


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in bytes, of an array of bytes without gaps."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True)
class DeviceFrame:
    """A (H, W, 3 or 4) uint8 picture in GPU memory, or one in NV12."""

    address: int
    height: int
    width: int
    channels: int
    """3, or 4 of which the last is ignored; 1 in NV12."""
    row_bytes: int
    """From one row to the next; rows may end in a gap, as decoders leave them."""
    stream: int
    """The CUDA stream whose work must be done before the picture is read; 1 is the legacy default stream."""
    owner: Any
    """Keeps the memory alive."""
    chroma: int = 0
    """In NV12, the address of the color plane."""
    chroma_row_bytes: int = 0
    chroma_stream: int | None = None
    """Where the color plane is an array of its own, its stream."""

    @classmethod
    def of(cls, frame: Any) -> DeviceFrame:
        """Read a (H, W, 3 or 4) picture; see `_Memory.of` for the interfaces.

        Raises:
            FrameError: a malformed interface, not uint8, not (H, W, 3 or 4), or gaps between pixels.
        """
        memory = _Memory.of(frame)
        shape = memory.shape
        if len(shape) != 3 or shape[2] not in (3, 4) or min(shape) < 1:
            raise FrameError(f"a frame in GPU memory has shape {shape}; legal is (H, W, 3) or (H, W, 4)")
        height, width, channels = shape
        memory.check_rows(width * channels)
        return cls(memory.address, height, width, channels, memory.strides[0], memory.stream, memory.owner)

    @classmethod
    def of_nv12(cls, frame: Any) -> DeviceFrame:
        """Read a picture in NV12: one array of both planes, or a pair of arrays; see `glip_deploy.frames.nv12`.

        Raises:
            FrameError: a malformed interface, not uint8, not NV12's shapes, or gaps inside rows.
        """
        planes = [_Memory.of(plane) for plane in _planes(frame)]
        height, width = nv12_size(*(plane.shape for plane in planes))
        for plane in planes:
            plane.check_rows(width)
        luma, color = planes[0], planes[-1]
        below = luma.strides[0] * height if len(planes) == 1 else 0
        return cls(
            luma.address,
            height,
            width,
            1,
            luma.strides[0],
            luma.stream,
            tuple(plane.owner for plane in planes),
            color.address + below,
            color.strides[0],
            color.stream,
        )


@dataclass(frozen=True, eq=False)
class HostFrame:
    """A picture in host memory that is uploaded as it is, and resized on the GPU.

    Attributes:
        planes: (H, W, 3) uint8; in NV12 the planes of brightness (H, W) and of color (H / 2, W).
    """

    planes: tuple[NDArray[np.uint8], ...]

    @classmethod
    def of(cls, frame: Any, color: Color) -> HostFrame:
        """Check a picture, as `make_canvas` takes it.

        Raises:
            FrameError: an illegal frame.
        """
        return cls(nv12_planes(frame) if color is Color.NV12 else (as_frame(frame),))

    @property
    def height(self) -> int:
        """In pixels."""
        return int(self.planes[0].shape[0])

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.planes[0].shape[1])

    @property
    def size(self) -> int:
        """Bytes of all planes."""
        return sum(plane.size for plane in self.planes)

    def write(self, target: NDArray[np.uint8]) -> None:
        """Write the planes one after the other into (size,) bytes."""
        start = 0
        for plane in self.planes:
            target[start : start + plane.size].reshape(plane.shape)[...] = plane
            start += plane.size

    def uploaded(self, address: int, stream: int) -> DeviceFrame:
        """Return the picture that `write` made, once its bytes are at an address of the GPU by work of a stream."""
        row_bytes = int(math.prod(self.planes[0].shape[1:]))
        frame = DeviceFrame(address, self.height, self.width, row_bytes // self.width, row_bytes, stream, self)
        if len(self.planes) == 1:
            return frame
        return replace(frame, chroma=address + self.planes[0].size, chroma_row_bytes=row_bytes, chroma_stream=stream)


@dataclass(frozen=True)
class DeviceCanvas:
    """A batch that is resized on the GPU: the pictures, and the canvas on which they will be placed; see `Canvas`.

    Attributes:
        pictures: B frames, in GPU memory or to be uploaded.
        red: the index of red in their pixels, 0 or 2; of no meaning in NV12.
        shape: (B, Hp, Wp, 3) of the canvas.
        image_sizes: (B, 2) int64, (height, width) of each resized picture.
        original_sizes: (B, 2) int64, (height, width) of each frame.
    """

    pictures: tuple[DeviceFrame | HostFrame, ...]
    red: int
    shape: tuple[int, int, int, int]
    image_sizes: NDArray[np.int64]
    original_sizes: NDArray[np.int64]

    @property
    def pixels(self) -> DeviceCanvas:
        """The batch itself: the image branch places the pictures on the canvas, on the GPU."""
        return self

    def __len__(self) -> int:
        return len(self.pictures)

    def part(self, which: slice) -> DeviceCanvas:
        """Return some of the pictures, on a canvas of the same size."""
        pictures = self.pictures[which]
        shape = (len(pictures), *self.shape[1:])
        sizes, originals = self.image_sizes[which], self.original_sizes[which]
        return replace(self, pictures=pictures, shape=shape, image_sizes=sizes, original_sizes=originals)


def is_on_device(frame: object) -> bool:
    """Return whether a frame is in GPU memory: has a `__cuda_array_interface__`, or says so by DLPack.

    So is a pair of planes, in NV12, of which one is.
    """
    if isinstance(frame, tuple | list):
        return any(is_on_device(plane) for plane in frame)
    if isinstance(frame, np.ndarray):
        return False
    try:
        return hasattr(frame, "__cuda_array_interface__") or _on_dlpack_gpu(frame)
    except RuntimeError:  # PyTorch's, for a tensor that requires a gradient; `DeviceFrame.of` says so
        return True


def _on_dlpack_gpu(frame: Any) -> bool:
    device = getattr(frame, "__dlpack_device__", None)
    return device is not None and hasattr(frame, "__dlpack__") and int(device()[0]) in _DLPACK_GPUS


def _planes(frame: Any) -> Sequence[Any]:
    return frame if isinstance(frame, tuple | list) else (frame,)


def device_canvas(
    frames: Sequence[Any], *, color: Color | str, shortest_side: int = 800, longest_side: int | None = 1333
) -> DeviceCanvas:
    """Plan the canvas of frames that are resized on the GPU as `glip_deploy.frames.make_canvas` makes others'.

    Args:
        frames: B pictures, all in GPU memory or all in host memory.
        color: what their bytes are.
        shortest_side: in network pixels.
        longest_side: in network pixels; None for no limit.

    Raises:
        FrameError: a frame in host memory among others in GPU memory, no frames, or an illegal frame.
        OptionError: an illegal color or side.
    """
    order = Color.of(color)
    if len(frames) == 0:
        raise FrameError("no frames: a batch holds at least one picture")
    here = [all(is_on_device(plane) for plane in _planes(frame)) for frame in frames]
    pictures: tuple[DeviceFrame | HostFrame, ...]
    if all(here):
        pictures = tuple((DeviceFrame.of_nv12 if order is Color.NV12 else DeviceFrame.of)(frame) for frame in frames)
    elif any(is_on_device(frame) for frame in frames):
        raise FrameError("a batch has frames in GPU memory and in host memory; bring them to one side")
    else:
        pictures = tuple(HostFrame.of(frame, order) for frame in frames)
    sizes = [network_size(picture.height, picture.width, shortest_side, longest_side) for picture in pictures]
    height, width = canvas_size(sizes)
    return DeviceCanvas(
        pictures,
        0 if order is Color.RGB else 2,
        (len(pictures), height, width, 3),
        np.array(sizes, np.int64),
        np.array([(picture.height, picture.width) for picture in pictures], np.int64),
    )


def network_canvas(
    frames: Sequence[Any],
    *,
    color: Color | str,
    shortest_side: int = 800,
    longest_side: int | None = 1333,
    method: Resize | str = Resize.EXACT,
) -> NetworkCanvas:
    """Return the canvas of a batch, wherever its frames are; those in GPU memory are always resized there.

    Args and errors are those of `glip_deploy.frames.make_canvas`, and of `device_canvas` for frames in GPU memory and
    where `method` is `Resize.GPU`.
    """
    if Resize.of(method) is Resize.GPU or any(is_on_device(frame) for frame in frames):
        return device_canvas(frames, color=color, shortest_side=shortest_side, longest_side=longest_side)
    return make_canvas(frames, color=color, shortest_side=shortest_side, longest_side=longest_side, method=method)
