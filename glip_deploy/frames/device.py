"""Frames that are in GPU memory already, from PyCUDA, CuPy, PyTorch, Numba and others: they stay on the GPU."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import FrameError
from glip_deploy.frames.canvas import Color, NetworkCanvas, Resize, make_canvas
from glip_deploy.frames.geometry import canvas_size, network_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DeviceCanvas", "DeviceFrame", "device_canvas", "is_on_device", "network_canvas"]

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
class DeviceFrame:
    """A (H, W, 3 or 4) uint8 picture in GPU memory."""

    address: int
    height: int
    width: int
    channels: int
    """3, or 4 of which the last is ignored."""
    row_bytes: int
    """From one row to the next; rows may end in a gap, as decoders leave them."""
    stream: int
    """The CUDA stream whose work must be done before the picture is read; 1 is the legacy default stream."""
    owner: Any
    """Keeps the memory alive."""

    @classmethod
    def of(cls, frame: Any) -> DeviceFrame:
        """Read an object's DLPack interface, or its `__cuda_array_interface__`, version 2 or 3.

        By DLPack the library itself makes the legacy default stream wait for its work, whatever stream that is on
        (PyTorch's current one, say, which its other interface does not name). Where neither interface names a stream
        (version 2, and PyCUDA), a picture may still be in the making on the legacy default stream, which is therefore
        the one to wait for.

        Raises:
            FrameError: the interface is malformed, or not of uint8, not (H, W, 3 or 4), or with gaps between pixels.
        """
        by_dlpack = _on_dlpack_gpu(frame)
        name = "DLPack interface" if by_dlpack else "__cuda_array_interface__"
        try:
            return cls._of_dlpack(frame) if by_dlpack else cls._of_interface(frame)
        except (AttributeError, BufferError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise FrameError(
                f"a frame in GPU memory has a malformed {name} ({type(error).__name__}: {error})"
                + ("" if by_dlpack else "; legal is version 2 or 3")
            ) from error

    @classmethod
    def _of_interface(cls, frame: Any) -> DeviceFrame:
        interface = frame.__cuda_array_interface__
        shape, kind = tuple(operator.index(side) for side in interface["shape"]), interface["typestr"]
        strides = tuple(operator.index(step) for step in interface.get("strides") or ())
        address = operator.index(interface["data"][0])
        stream = operator.index(interface.get("stream") or LEGACY_DEFAULT_STREAM)
        if kind not in ("|u1", "<u1", ">u1"):
            raise FrameError(f"a frame in GPU memory has type {kind}; legal is uint8 (|u1), convert it first")
        return cls._of_memory(address, shape, strides, stream, frame)

    @classmethod
    def _of_dlpack(cls, frame: Any) -> DeviceFrame:
        capsule = frame.__dlpack__(stream=LEGACY_DEFAULT_STREAM)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        tensor = _DLTensor.from_address(pointer(capsule, b"dltensor"))
        if (tensor.code, tensor.bits, tensor.lanes) != _DLPACK_BYTES:
            raise FrameError(
                f"a frame in GPU memory has {tensor.bits * tensor.lanes} bits an element of DLPack's type"
                f" {tensor.code}; legal is uint8, convert it first"
            )
        shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
        strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else ()
        # The capsule is never renamed, so that it frees the tensor itself when the frame goes.
        address = (tensor.data or 0) + tensor.byte_offset
        return cls._of_memory(address, shape, strides, LEGACY_DEFAULT_STREAM, (frame, capsule))

    @classmethod
    def _of_memory(
        cls, address: int, shape: tuple[int, ...], strides: tuple[int, ...], stream: int, owner: Any
    ) -> DeviceFrame:
        if len(shape) != 3 or shape[2] not in (3, 4) or min(shape) < 1:
            raise FrameError(f"a frame in GPU memory has shape {shape}; legal is (H, W, 3) or (H, W, 4)")
        height, width, channels = shape
        strides = strides or (width * channels, channels, 1)
        if strides[1:] != (channels, 1) or strides[0] < width * channels:
            raise FrameError(f"a frame in GPU memory has strides {strides}; its rows must have no gaps inside")
        if address < 1:
            raise FrameError(f"a frame in GPU memory has the address {address}; it points nowhere")
        return cls(address, height, width, channels, strides[0], stream, owner)


@dataclass(frozen=True)
class DeviceCanvas:
    """A batch in GPU memory: the pictures, and the canvas on which the GPU will place them; see `Canvas`.

    Attributes:
        pictures: B frames.
        red: the index of red in their pixels, 0 or 2.
        shape: (B, Hp, Wp, 3) of the canvas.
        image_sizes: (B, 2) int64, (height, width) of each resized picture.
        original_sizes: (B, 2) int64, (height, width) of each frame.
    """

    pictures: tuple[DeviceFrame, ...]
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
    """Return whether a frame is in GPU memory: has a `__cuda_array_interface__`, or says so by DLPack."""
    if isinstance(frame, np.ndarray):
        return False
    try:
        return hasattr(frame, "__cuda_array_interface__") or _on_dlpack_gpu(frame)
    except RuntimeError:  # PyTorch's, for a tensor that requires a gradient; `DeviceFrame.of` says so
        return True


def _on_dlpack_gpu(frame: Any) -> bool:
    device = getattr(frame, "__dlpack_device__", None)
    return device is not None and hasattr(frame, "__dlpack__") and int(device()[0]) in _DLPACK_GPUS


def device_canvas(
    frames: Sequence[Any], *, color: Color | str, shortest_side: int = 800, longest_side: int | None = 1333
) -> DeviceCanvas:
    """Plan the canvas of frames in GPU memory as `glip_deploy.frames.make_canvas` does for those in host memory.

    Raises:
        FrameError: a frame in host memory among them, or an illegal frame.
        OptionError: an illegal color or side.
    """
    order = Color.of(color)
    if not all(is_on_device(frame) for frame in frames):
        raise FrameError("a batch has frames in GPU memory and in host memory; bring them to one side")
    pictures = tuple(DeviceFrame.of(frame) for frame in frames)
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
    """Return the canvas of a batch, wherever its frames are; those in GPU memory are always resized exactly.

    Args and errors are those of `glip_deploy.frames.make_canvas`, and of `device_canvas` for frames in GPU memory.
    """
    if any(is_on_device(frame) for frame in frames):
        return device_canvas(frames, color=color, shortest_side=shortest_side, longest_side=longest_side)
    return make_canvas(frames, color=color, shortest_side=shortest_side, longest_side=longest_side, method=method)
