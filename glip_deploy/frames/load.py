"""Pictures decoded and checked: files to pixels, and arrays to (H, W, 3) uint8."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import FrameError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray
    from PIL import Image

__all__ = ["MAX_PIXELS", "as_frame", "decode_image", "load_image"]

MAX_PIXELS = 178_956_970
"""Largest picture accepted, in pixels: above it Pillow refuses to decode (a decompression bomb)."""


def as_frame(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a decoded picture as (H, W, 3) uint8, channel order unchanged; the same memory if it was that already.

    Gray becomes three equal channels. A fourth channel is alpha and is dropped, not blended, as the official code does
    (`Image.convert("RGB")`). 16 bits are scaled over their full range, 65535 to 255.

    Args:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or uint16.

    Raises:
        FrameError: anything else, an empty picture, or more than `MAX_PIXELS` pixels.
    """
    if not isinstance(array, np.ndarray):
        raise FrameError(
            f"a frame must be a numpy array of shape (H, W, 3) and dtype uint8, not {type(array).__name__};"
            " use numpy.asarray or glip_deploy.load_image"
        )
    array = np.asarray(array)  # a subclass, such as numpy.matrix, has an indexing of its own
    what = f"frame has shape {array.shape} and dtype {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        advice = "channels come last: use array.transpose(1, 2, 0)" if channels_first else "pass one picture at a time"
        raise FrameError(f"{what}; legal shapes are (H, W), (H, W, 1), (H, W, 3) and (H, W, 4); {advice}")
    if array.dtype not in (np.uint8, np.uint16):
        raise FrameError(f"{what}; legal dtypes are uint8 (0..255) and uint16 (0..65535); convert it first")
    height, width = array.shape[:2]
    if height < 1 or width < 1:
        raise FrameError(f"{what}; both sides must be at least 1 pixel")
    if height * width > MAX_PIXELS:
        raise FrameError(
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


def load_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Decode a picture file to (H, W, 3) uint8 RGB; of several pictures in a file, the first.

    It is turned upright by its EXIF orientation. Gray, palette, CMYK and 16-bit files are converted; alpha is dropped,
    as the official code does (`Image.open(path).convert("RGB")`, which does not look at EXIF).

    Raises:
        FrameError: missing, unreadable, truncated, not a picture, 32 bits per sample, or above `MAX_PIXELS`.
    """
    file = Path(path)
    what = f"picture {file}"
    try:
        if not file.is_file():
            problem = "is not a file" if file.exists() else "does not exist"
            raise FrameError(f"{what} {problem}; give the path of an image file")
    except (OSError, ValueError) as error:  # a name that is too long or holds a zero byte
        raise _cannot_be_decoded(what, error) from error
    return _decode(file, what)


def decode_image(data: bytes, name: str = "", *, formats: tuple[str, ...] | None = None) -> NDArray[np.uint8]:
    """Decode the bytes of a picture file, JPEG or any other that Pillow reads; see `load_image`.

    Args:
        data: the whole file.
        name: what messages call it, after "picture".
        formats: that are accepted, as Pillow names them; None for all.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        FrameError: as `load_image`, or no bytes.
    """
    what = f"picture {name}".strip()
    if not data:
        raise FrameError(f"{what} is empty (0 bytes); give the bytes of a JPEG or PNG file")
    return _decode(io.BytesIO(data), what, formats)


def _decode(file: Path | io.BytesIO, what: str, formats: tuple[str, ...] | None = None) -> NDArray[np.uint8]:
    """Return the pixels of a picture that messages call `what`; see `load_image`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(what, f"{image.width}x{image.height}, {image.width * image.height} pixels")
            image.load()
            _turn_upright(image)
            return np.ascontiguousarray(_decoded(image, what))
    except FrameError:
        raise
    except Image.DecompressionBombError as error:
        # Pillow refuses before width and height can be asked for; its message has the pixel count.
        count = re.search(r"\d+", str(error))
        raise _too_large(what, f"{count.group() if count else 'too many'} pixels") from error
    except UnidentifiedImageError as error:
        raise FrameError(f"{what} is not in a format Pillow can read; convert it to JPEG or PNG") from error
    except Exception as error:  # a damaged file makes decoders raise anything, from OSError to SyntaxError
        raise _cannot_be_decoded(what, error) from error


def _cannot_be_decoded(what: str, error: Exception) -> FrameError:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return FrameError(f"{what} cannot be decoded ({reason}); it may be truncated, write it again")


def _too_large(what: str, size: str) -> FrameError:
    return FrameError(
        f"{what} is too large ({size}); at most {MAX_PIXELS} pixels are accepted; shrink it or cut it into tiles"
    )


def _turn_upright(image: Image.Image) -> None:
    from PIL import ImageOps

    # Damaged EXIF raises anything. The pixels are good: the picture is taken as it is stored.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _decoded(image: Image.Image, what: str) -> NDArray[np.uint8]:
    if image.mode == "F":
        raise FrameError(f"{what} has floating-point samples; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # I;16 and its byte orders; older Pillow opens 16-bit files as I, 32 bits
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise FrameError(f"{what} has 32-bit samples above 65535; convert it to 8 or 16 bits")
        return as_frame(samples.astype(np.uint16))
    return np.asarray(image.convert("RGB"))
