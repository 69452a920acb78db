"""Pictures in: decoded, checked, resized exactly as GLIP was trained, and laid on the network's canvas.

Everything here stays uint8: the graph subtracts the mean, divides by the deviation and zeroes the padding
itself, so a frame is uploaded as bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray
    from PIL import Image

__all__ = [
    "MAX_NETWORK_PIXELS",
    "MAX_PIXELS",
    "SIZE_DIVISOR",
    "Canvas",
    "Color",
    "Resize",
    "as_frame",
    "canvas",
    "load_image",
    "network_size",
    "resize",
]

MAX_PIXELS = 178_956_970
"""Largest picture accepted, in pixels: above it Pillow refuses to decode (a decompression bomb)."""

MAX_NETWORK_PIXELS = 64_000_000
"""Largest resized picture, in pixels: without a longest side, a thin strip would fill the memory."""

SIZE_DIVISOR = 32
"""The canvas is a multiple of this many pixels on both sides (official DATALOADER.SIZE_DIVISIBILITY)."""

_EXIF_ORIENTATION = 0x0112
_Choice = TypeVar("_Choice", bound=StrEnum)


class Color(StrEnum):
    """Channel order of a frame."""

    BGR = "bgr"
    RGB = "rgb"


class Resize(StrEnum):
    """How a picture is brought to the network's size.

    `EXACT` is the official arithmetic: Pillow's antialiased bilinear on uint8.

    `FAST` is for video and changes pixels, so detections near a threshold may change. Shrinking by two or
    more, it first averages whole blocks of pixels, then resizes bilinearly; by less, it uses the box filter;
    enlarging, it is EXACT.

    Measured to 1333x750 by `glip-bench` (benchmarks/results, two cores of an AMD EPYC, Pillow 13), medians:
    1920x1080 17 -> 12 ms, 2560x1440 25 -> 17 ms, 3840x2160 44 -> 28 ms. Mean difference to EXACT on a photograph
    shrunk by the same factors: 4.6, 4.4 and 1.3 grey levels.
    """

    EXACT = "exact"
    FAST = "fast"


@dataclass(frozen=True, eq=False)
class Canvas:
    """A batch as the image graph takes it.

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
    def scales(self) -> NDArray[np.float64]:
        """(B, 2) float64, original pixels per network pixel along (height, width)."""
        return self.original_sizes / self.image_sizes

    def __len__(self) -> int:
        return len(self.frames)


def network_size(height: int, width: int, shortest_side: int = 800, longest_side: int | None = 1333) -> tuple[int, int]:
    """Return the (height, width), in pixels, to which the official code resizes a picture.

    Official `maskrcnn_benchmark/data/transforms/transforms.py`, `Resize.get_size` (evaluation); without a
    longest side, the demo's `torchvision.transforms.Resize`. The roundings are theirs: where the longest
    side rules, the shortest is rounded first and the longest follows from it, so it may end a little to
    either side of `longest_side` (2000x500 gives 1332x333).

    A strip so thin that its short side would round to nothing, where the official code fails, becomes one
    pixel by `longest_side`.

    Raises:
        GlipError: a side below 1, or a result above `MAX_NETWORK_PIXELS`.
    """
    if height < 1 or width < 1:
        raise GlipError(f"picture is {width}x{height}: both sides must be at least 1 pixel")
    if shortest_side < 1 or (longest_side is not None and longest_side < 1):
        raise GlipError(
            f"shortest side {shortest_side} and longest side {longest_side}: both must be at least 1 pixel;"
            " the official values are 800 and 1333"
        )
    short, long = min(height, width), max(height, width)
    new_short = shortest_side
    new_long = None
    if longest_side is not None and float(long) / float(short) * shortest_side > longest_side:
        new_short = round(longest_side * float(short) / float(long))
        if new_short == 0:
            new_short, new_long = 1, longest_side
    if new_long is None:
        new_long = int(new_short * long / short)
    if new_short * new_long > MAX_NETWORK_PIXELS:
        raise GlipError(
            f"a {width}x{height} picture resized to a shortest side of {shortest_side} has a side of"
            f" {new_long} pixels, {new_short * new_long} in all, more than {MAX_NETWORK_PIXELS};"
            " set a longest side (official: 1333) or crop the picture"
        )
    return (new_short, new_long) if height <= width else (new_long, new_short)


def as_frame(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a decoded picture as (H, W, 3) uint8, channel order unchanged; the same memory if it was that.

    Grey becomes three equal channels. A fourth channel is alpha and is dropped, not blended, as the official
    code does (`Image.convert("RGB")`). 16 bits are scaled over their full range, 65535 to 255.

    Args:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or uint16.

    Raises:
        GlipError: anything else, an empty picture, or more than `MAX_PIXELS` pixels.
    """
    if not isinstance(array, np.ndarray):
        raise GlipError(
            f"a frame must be a numpy array of shape (H, W, 3) and dtype uint8, not {type(array).__name__};"
            " use numpy.asarray or glip_deploy.image.load_image"
        )
    what = f"frame has shape {array.shape} and dtype {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        advice = "channels come last: use array.transpose(1, 2, 0)" if channels_first else "pass one picture at a time"
        raise GlipError(f"{what}; legal shapes are (H, W), (H, W, 1), (H, W, 3) and (H, W, 4); {advice}")
    if array.dtype not in (np.uint8, np.uint16):
        raise GlipError(f"{what}; legal dtypes are uint8 (0..255) and uint16 (0..65535); convert it first")
    height, width = array.shape[:2]
    if height < 1 or width < 1:
        raise GlipError(f"{what}; both sides must be at least 1 pixel")
    if height * width > MAX_PIXELS:
        raise GlipError(
            f"{what}: {height * width} pixels, more than the {MAX_PIXELS} accepted;"
            " shrink the picture or cut it into tiles"
        )
    if array.ndim == 2:
        array = array[:, :, np.newaxis]
    array = array[:, :, :3]
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return array


def resize(frame: NDArray[np.uint8], size: tuple[int, int], method: Resize | str = Resize.EXACT) -> NDArray[np.uint8]:
    """Resize a (H, W, 3) uint8 frame to `size`, (height, width) in pixels; channel order unchanged.

    Returns:
        (height, width, 3) uint8; read-only or the frame itself where nothing had to change.

    Raises:
        GlipError: an unknown method or an illegal frame.
    """
    way = _member(Resize, method, "resize method")
    frame = as_frame(frame)
    if frame.shape[:2] == tuple(size):
        return frame
    return np.asarray(_resized(frame, size, way))


def canvas(
    frames: Sequence[NDArray[Any]] | NDArray[Any],
    *,
    color: Color | str,
    shortest_side: int = 800,
    longest_side: int | None = 1333,
    method: Resize | str = Resize.EXACT,
    buffer: NDArray[np.uint8] | None = None,
) -> Canvas:
    """Resize frames and lay them on one zero-padded BGR canvas.

    Official: `Resize` and `to_image_list(size_divisible=32)`; padding is right and below. Padding is seen by
    the network, so frames of different shapes in one batch influence each other's results slightly, as they
    do officially.

    Args:
        frames: B pictures as `as_frame` takes them, or one alone.
        color: channel order of the frames. There is no default: a wrong guess costs accuracy in silence.
        shortest_side: in network pixels.
        longest_side: in network pixels; None for no limit (the official demo).
        method: `Resize.EXACT` or `Resize.FAST`.
        buffer: (B, Hp, Wp, 3) uint8 to write into, such as the previous `Canvas.frames` of a stream, which is
            then overwritten. It is used where its shape fits; otherwise a new one is made.

    Raises:
        GlipError: no frames, an illegal frame, colour, method or size.
    """
    order = _member(Color, color, "color")
    way = _member(Resize, method, "resize method")
    if isinstance(frames, np.ndarray) and frames.ndim < 4:
        frames = [frames]
    if len(frames) == 0:
        raise GlipError("no frames: a batch holds at least one picture")
    pictures = [as_frame(frame) for frame in frames]
    sizes = [network_size(picture.shape[0], picture.shape[1], shortest_side, longest_side) for picture in pictures]
    padded = tuple(-(-max(side) // SIZE_DIVISOR) * SIZE_DIVISOR for side in zip(*sizes, strict=True))
    shape = (len(pictures), *padded, 3)
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


def load_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Decode a picture file to (H, W, 3) uint8 RGB; of several pictures in a file, the first.

    Upright by its EXIF orientation. Grey, palette, CMYK and 16-bit files are converted; alpha is dropped, as
    the official code does (`Image.open(path).convert("RGB")`, which does not look at EXIF).

    Raises:
        GlipError: missing, unreadable, truncated, not a picture, 32 bits per sample, or above `MAX_PIXELS`.
    """
    from PIL import Image, UnidentifiedImageError

    file = Path(path)
    if not file.is_file():
        problem = "is not a file" if file.exists() else "does not exist"
        raise GlipError(f"picture {file} {problem}; give the path of an image file")
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(file, f"{image.width}x{image.height}, {image.width * image.height} pixels")
            image.load()
            pixels = _decoded(image, file)
            orientation = _orientation(image)
    except GlipError:
        raise
    except Image.DecompressionBombError as error:
        # Pillow refuses before anyone can ask for width and height; its message has the pixel count.
        count = re.search(r"\d+", str(error))
        raise _too_large(file, f"{count.group() if count else 'too many'} pixels") from error
    except UnidentifiedImageError as error:
        raise GlipError(f"picture {file} is not in a format Pillow can read; convert it to JPEG or PNG") from error
    except Exception as error:  # a damaged file makes decoders raise anything, from OSError to SyntaxError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GlipError(f"picture {file} cannot be decoded ({reason}); it may be truncated, write it again") from error
    return np.ascontiguousarray(_upright(pixels, orientation))


def _member(kind: type[_Choice], value: object, name: str) -> _Choice:
    try:
        return kind(str(value))
    except ValueError:
        legal = " or ".join(f'"{member}"' for member in kind)
        raise GlipError(f"{name} is {value!r}; it must be {legal}, said explicitly") from None


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
    # Pillow's packer swaps channels for free; the same in numpy is a strided copy.
    packing = "RGB" if color is Color.BGR else "BGR"
    data = _resized(picture, (height, width), method).tobytes("raw", packing)
    target[...] = np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)


def _too_large(file: Path, size: str) -> GlipError:
    return GlipError(
        f"picture {file} is too large ({size}); at most {MAX_PIXELS} pixels are accepted;"
        " shrink it or cut it into tiles"
    )


def _decoded(image: Image.Image, file: Path) -> NDArray[np.uint8]:
    if image.mode == "F":
        raise GlipError(f"picture {file} has floating-point samples; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # I;16 and its byte orders; older Pillow opens 16-bit files as I, 32 bits
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise GlipError(f"picture {file} has 32-bit samples above 65535; convert it to 8 or 16 bits")
        return as_frame(samples.astype(np.uint16))
    return np.asarray(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises anything; the pixels are good, so the picture is taken as stored
        return 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 4):
        return np.flip(pixels, axis=1 if orientation == 2 else 0)
    turns = {3: 2, 6: -1, 7: 2, 8: 1}.get(orientation, 0)
    return np.rot90(pixels, turns)
