"""Pictures resized as GLIP was trained and placed on the network's canvas.

Everything here stays uint8: the graph itself subtracts the mean, divides by the deviation and zeroes the padding, so a
frame is uploaded as bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from glip_deploy.errors import FrameError, OptionError
from glip_deploy.frames.geometry import canvas_size, network_size
from glip_deploy.frames.load import as_frame
from glip_deploy.frames.nv12 import nv12_to_rgb

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from glip_deploy.frames.device import DeviceCanvas

__all__ = ["Canvas", "Color", "NetworkCanvas", "Resize", "make_canvas", "resize"]


class _Choice(StrEnum):
    @classmethod
    def of(cls, value: object) -> Self:
        """Return the member that a value names.

        Raises:
            OptionError: it names none.
        """
        try:
            return cls(str(value))
        except ValueError:
            legal = " or ".join(f'"{member}"' for member in cls)
            raise OptionError(f"{cls.__name__.lower()} is {value!r}; it must be {legal}") from None


class Color(_Choice):
    """What the bytes of a frame are."""

    BGR = "bgr"
    RGB = "rgb"
    NV12 = "nv12"
    """As video decoders write: a plane of brightness, and one of color at half the resolution; BT.601 of limited
    range, as OpenCV reads it. A frame is a (H * 3 / 2, W) uint8 array, or a pair of one array for each plane."""


class Resize(_Choice):
    """How a picture is brought to the network's size.

    `EXACT` is the official arithmetic: Pillow's antialiased bilinear filter on uint8.

    `GPU` is the same filter on the GPU, within one gray level of `EXACT`: frames are uploaded as they are, and the
    processor does nothing to their pixels. Only backend "tensorrt" has it.

    `FAST` is for video and changes pixels, so detections near a threshold may change. Where it shrinks by two or more,
    it averages whole blocks of pixels before the bilinear filter; where it shrinks by less, it uses the box filter;
    where it enlarges, it is EXACT.

    Measured to 1333x750 by `glip-bench` (benchmarks/results, two cores of an AMD EPYC, Pillow 13), medians:
    1920x1080 26 -> 19 ms, 2560x1440 36 -> 26 ms, 3840x2160 64 -> 43 ms. Mean difference to EXACT on a photograph
    shrunk by the same factors: 1.2, 1.9 and 0.6 gray levels.
    """

    EXACT = "exact"
    FAST = "fast"
    GPU = "gpu"

    @classmethod
    def on_cpu(cls, value: object) -> Resize:
        """Return the method of the processor that a value names.

        Raises:
            OptionError: it names none, or `GPU`.
        """
        method = cls.of(value)
        if method is cls.GPU:
            raise OptionError('resize is "gpu", which only backend tensorrt does; use "exact" or "fast"')
        return method


class NetworkCanvas(Protocol):
    """A batch of pictures for the image branch, in host memory (`Canvas`) or on the GPU (`DeviceCanvas`)."""

    @property
    def pixels(self) -> NDArray[np.uint8] | DeviceCanvas:
        """What the image branch takes."""

    @property
    def image_sizes(self) -> NDArray[np.int64]:
        """(B, 2) int64, (height, width) of each resized picture, in network pixels."""

    @property
    def original_sizes(self) -> NDArray[np.int64]:
        """(B, 2) int64, (height, width) of each frame before resizing, in pixels."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Canvas:
    """A batch as the image graph takes it, in host memory.

    Attributes:
        frames: (B, Hp, Wp, 3) uint8, BGR; each picture in the top left corner, zero elsewhere; Hp and Wp are
            the smallest multiples of 32 that hold the largest picture of the batch.
        image_sizes: (B, 2) int64, (height, width) of each resized picture, in network pixels.
        original_sizes: (B, 2) int64, (height, width) of each frame before resizing, in pixels.
    """

    frames: NDArray[np.uint8]
    image_sizes: NDArray[np.int64]
    original_sizes: NDArray[np.int64]

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The frames: what the image branch takes."""
        return self.frames

    @property
    def scales(self) -> NDArray[np.float64]:
        """(B, 2) float64, original pixels per network pixel along (height, width)."""
        return self.original_sizes / self.image_sizes

    def __len__(self) -> int:
        return len(self.frames)


def resize(frame: NDArray[np.uint8], size: tuple[int, int], method: Resize | str = Resize.EXACT) -> NDArray[np.uint8]:
    """Resize a (H, W, 3) uint8 frame to `size`, (height, width) in pixels; channel order unchanged.

    Returns:
        (height, width, 3) uint8, read-only; the frame itself where it has that size already.

    Raises:
        OptionError: an unknown method, or `Resize.GPU`.
        FrameError: an illegal frame.
    """
    way = Resize.on_cpu(method)
    frame = as_frame(frame)
    if frame.shape[:2] == tuple(size):
        return frame
    return np.asarray(_resized(frame, size, way))


def make_canvas(
    frames: Sequence[NDArray[Any]] | NDArray[Any],
    *,
    color: Color | str,
    shortest_side: int = 800,
    longest_side: int | None = 1333,
    method: Resize | str = Resize.EXACT,
    buffer: NDArray[np.uint8] | None = None,
) -> Canvas:
    """Resize frames and place them on one zero-padded BGR canvas.

    Official: `maskrcnn_benchmark/data/transforms/transforms.py`, `Resize`, and `structures/image_list.py`,
    `to_image_list(size_divisible=32)`; the padding is right and below. The network sees the padding, so frames of
    different shapes in one batch change each other's results slightly, as they do officially.

    Args:
        frames: B pictures as `as_frame` takes them, or a single one; with `Color.NV12` as that says.
        color: what their bytes are. There is no default, because the wrong one costs accuracy without an error.
        shortest_side: in network pixels.
        longest_side: in network pixels; None for no limit (the official demo).
        method: `Resize.EXACT` or `Resize.FAST`.
        buffer: (B, Hp, Wp, 3) uint8 to write into, such as the previous `Canvas.frames` of a stream, which is
            then overwritten. It is used where its shape fits; otherwise a new one is made.

    Raises:
        FrameError: no frames, or an illegal frame.
        OptionError: an illegal color, method or side.
    """
    order = Color.of(color)
    way = Resize.on_cpu(method)
    if isinstance(frames, np.ndarray) and frames.ndim < 4:
        frames = [frames]
    if len(frames) == 0:
        raise FrameError("no frames: a batch holds at least one picture")
    if order is Color.NV12:
        pictures, order = [nv12_to_rgb(frame) for frame in frames], Color.RGB
    else:
        pictures = [as_frame(frame) for frame in frames]
    sizes = [network_size(picture.shape[0], picture.shape[1], shortest_side, longest_side) for picture in pictures]
    shape = (len(pictures), *canvas_size(sizes), 3)
    fits = buffer is not None and buffer.shape == shape and buffer.dtype == np.uint8 and buffer.flags.writeable
    out = buffer if buffer is not None and fits else np.empty(shape, dtype=np.uint8)
    for target, picture, (height, width) in zip(out, pictures, sizes, strict=True):
        _write_bgr(target[:height, :width], picture, order, way)
        target[height:] = 0
        target[:height, width:] = 0
    return Canvas(
        frames=out,
        image_sizes=np.array(sizes, dtype=np.int64),
        original_sizes=np.array([picture.shape[:2] for picture in pictures], dtype=np.int64),
    )


def _resized(frame: NDArray[np.uint8], size: tuple[int, int], method: Resize) -> Image.Image:
    from PIL import Image

    height, width = size
    source = Image.fromarray(frame)
    filter_ = Image.Resampling.BILINEAR
    gap = None
    if method is Resize.FAST:
        shrink = min(frame.shape[0] / height, frame.shape[1] / width)
        if shrink >= 2:
            gap = 1.0
        elif shrink > 1:
            filter_ = Image.Resampling.BOX
    return source.resize((width, height), filter_, reducing_gap=gap)


def _write_bgr(target: NDArray[np.uint8], picture: NDArray[np.uint8], color: Color, method: Resize) -> None:
    height, width = target.shape[:2]
    if picture.shape[:2] == (height, width):
        target[...] = picture if color is Color.BGR else picture[:, :, ::-1]
        return
    # Pillow swaps the channels while it copies them out; in numpy that would be a second, strided copy.
    packing = "RGB" if color is Color.BGR else "BGR"
    data = _resized(picture, (height, width), method).tobytes("raw", packing)
    target[...] = np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)
