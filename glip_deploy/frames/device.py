"""Frames that are in GPU memory already: PyCUDA, CuPy, PyTorch, Numba and others say where, and they stay there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import GlipError
from glip_deploy.frames.canvas import Color
from glip_deploy.frames.geometry import canvas_size, network_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DeviceCanvas", "DeviceFrame", "device_canvas", "is_on_device"]


@dataclass(frozen=True)
class DeviceFrame:
    """A (H, W, 3 or 4) uint8 picture in GPU memory."""

    address: int
    height: int
    width: int
    channels: int
    """3, or 4 with one that is passed over."""
    row_bytes: int
    """From one row to the next; rows may have gaps, as decoders leave them."""
    stream: int | None
    """The stream whose work must be done before the picture is read; None if nothing is pending."""
    owner: Any
    """Keeps the memory alive."""

    @classmethod
    def of(cls, frame: Any) -> DeviceFrame:
        """Read an object's `__cuda_array_interface__`, version 2 or 3.

        Raises:
            GlipError: not uint8, not (H, W, 3 or 4), or with gaps between pixels.
        """
        interface = frame.__cuda_array_interface__
        shape, kind = tuple(interface["shape"]), interface["typestr"]
        if kind not in ("|u1", "<u1", ">u1"):
            raise GlipError(f"a frame in GPU memory has type {kind}; legal is uint8 (|u1), convert it first")
        if len(shape) != 3 or shape[2] not in (3, 4) or 0 in shape:
            raise GlipError(f"a frame in GPU memory has shape {shape}; legal is (H, W, 3) or (H, W, 4)")
        height, width, channels = shape
        strides = interface.get("strides") or (width * channels, channels, 1)
        if tuple(strides[1:]) != (channels, 1) or strides[0] < width * channels:
            raise GlipError(f"a frame in GPU memory has strides {tuple(strides)}; its rows must have no gaps inside")
        stream = interface.get("stream")
        return cls(int(interface["data"][0]), height, width, channels, int(strides[0]), stream, frame)


@dataclass(frozen=True)
class DeviceCanvas:
    """What `glip_deploy.frames.Canvas` is, before the pictures are laid on it: the GPU does that.

    Attributes:
        pictures: B frames.
        red: place of red in their pixels, 0 or 2.
        shape: (B, Hp, Wp, 3), the canvas.
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
        """What the image branch takes: the pictures, to be laid on the canvas on the GPU."""
        return self

    def __len__(self) -> int:
        return len(self.pictures)

    def part(self, which: slice) -> DeviceCanvas:
        """Some of the pictures."""
        pictures = self.pictures[which]
        shape = (len(pictures), *self.shape[1:])
        sizes, originals = self.image_sizes[which], self.original_sizes[which]
        return replace(self, pictures=pictures, shape=shape, image_sizes=sizes, original_sizes=originals)


def is_on_device(frame: object) -> bool:
    """Whether a frame is in GPU memory."""
    return hasattr(frame, "__cuda_array_interface__")


def device_canvas(
    frames: Sequence[Any], *, color: Color | str, shortest_side: int = 800, longest_side: int | None = 1333
) -> DeviceCanvas:
    """Lay out frames as `glip_deploy.frames.make_canvas` does.

    Raises:
        GlipError: a frame in host memory among them, an illegal frame, colour or size.
    """
    if not all(is_on_device(frame) for frame in frames):
        raise GlipError("a batch has frames in GPU memory and in host memory; bring them to one side")
    try:
        order = Color(str(color))
    except ValueError:
        raise GlipError(f'color is {color!r}; it must be "bgr" or "rgb", said explicitly') from None
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
