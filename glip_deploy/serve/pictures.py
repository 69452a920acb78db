"""Pictures that strangers send: their size is known before they are decoded, and only plain formats are."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from glip_deploy.errors import FrameError
from glip_deploy.frames.load import decode_image
from glip_deploy.serve.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.serve.settings import Settings

__all__ = ["FORMATS", "Pictures", "check_picture"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is accepted, as Pillow names it. Others may start programs (EPS), or seldom meet hostile files."""
_AT_ONCE = 4
"""Pictures of the largest size that may lie in memory decoded; smaller ones, as many as fit."""


def check_picture(data: bytes, settings: Settings) -> int:
    """Return the number of pixels of a picture, from its header; nothing is decoded.

    Raises:
        FrameError: no bytes, not a picture, or of another format than `FORMATS`.
        RequestError: more bytes or pixels than the server takes.
    """
    from PIL import Image

    if not data:
        raise FrameError("picture is empty (0 bytes); give the bytes of a JPEG or PNG file")
    if len(data) > settings.max_bytes:
        raise RequestError(
            413,
            f"picture has {len(data)} bytes; at most {settings.max_bytes} are accepted; shrink or compress it",
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:  # above twice Pillow's own limit, which is not lower than ours
        raise RequestError(
            413, f"picture is too large; at most {settings.max_pixels} pixels are accepted; shrink it"
        ) from None
    except Exception:  # a damaged header makes Pillow raise anything
        raise FrameError(
            f"picture is not in a format this server can read ({', '.join(FORMATS)}); convert it to JPEG or PNG"
        ) from None
    if width * height > settings.max_pixels:
        raise RequestError(
            413,
            f"picture is too large ({width}x{height}, {width * height} pixels);"
            f" at most {settings.max_pixels} pixels are accepted; shrink it or cut it into tiles",
        )
    return width * height


class Pictures:
    """Decodes pictures in threads, and holds back those for which there is no memory.

    Args:
        settings: of the server.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._free = _AT_ONCE * settings.max_pixels
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def decoded(self, data: bytes) -> AsyncIterator[NDArray[np.uint8]]:
        """Give the (H, W, 3) uint8 RGB pixels of a picture; their memory counts until the block ends.

        Raises:
            FrameError: as `check_picture`, or the picture is damaged.
            RequestError: as `check_picture`.
        """
        pixels = await asyncio.to_thread(check_picture, data, self._settings)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield await asyncio.to_thread(decode_image, data, formats=FORMATS)
        finally:
            self._free += pixels
            async with self._changed:
                self._changed.notify_all()
