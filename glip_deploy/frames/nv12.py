"""NV12, what video decoders write: brightness in one plane, color at half the resolution in another.

Brought to RGB by BT.601 of limited range, as OpenCV's `COLOR_YUV2RGB_NV12` does, bit for bit: with integers of 20 bits
behind the point, and each color value for its two by two pixels. `resize.cu` and the C++ runtime do the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import FrameError
from glip_deploy.frames.load import MAX_PIXELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["nv12_planes", "nv12_size", "nv12_to_rgb"]

_BITS = 20
_LIGHT, _RED_V, _GREEN_U, _GREEN_V, _BLUE_U = 1220542, 1673527, -409993, -852492, 2116026
"""BT.601's 1.164, 1.596, -0.391, -0.813 and 2.018, times 2 to the power of 20."""
_ROWS = 128
"""Rows converted at a time, so that the integers stay in the processor's cache."""


def nv12_size(luma: tuple[int, ...], chroma: tuple[int, ...] | None = None) -> tuple[int, int]:
    """Return the (height, width) in pixels of a picture in NV12.

    Args:
        luma: shape of the plane of brightness, (H, W) or (H, W, 1); without `chroma`, of both planes one below the
            other, (H * 3 / 2, W) or (H * 3 / 2, W, 1).
        chroma: shape of the plane of color, (H / 2, W / 2, 2), (H / 2, W) or (H / 2, W, 1).

    Raises:
        FrameError: no such shapes, an odd side, or more than `MAX_PIXELS` pixels.
    """
    legal = "legal is (H * 3 / 2, W), or a pair (H, W) and (H / 2, W / 2, 2), of even H and W"
    what = f"a frame in NV12 has shape {luma}" if chroma is None else f"a frame in NV12 has shapes {luma} and {chroma}"
    if len(luma) not in (2, 3) or luma[2:] not in ((), (1,)):
        raise FrameError(f"{what}; {legal}")
    rows, width = luma[:2]
    if chroma is None and rows % 3:
        raise FrameError(f"{what}; {legal}")
    height = rows if chroma is not None else rows // 3 * 2
    if height < 2 or width < 2 or height % 2 or width % 2:
        raise FrameError(f"{what}; {legal}")
    half = (height // 2, width // 2, 2)
    if chroma is not None and chroma not in (half, (height // 2, width), (height // 2, width, 1)):
        raise FrameError(f"{what}; {legal}")
    if height * width > MAX_PIXELS:
        raise FrameError(f"{what}: {height * width} pixels, more than the {MAX_PIXELS} accepted; shrink the picture")
    return height, width


def nv12_planes(frame: Any) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return views of a picture's planes, brightness (H, W) and color (H / 2, W): U and V by turns.

    Args:
        frame: an array with both planes one below the other, (H * 3 / 2, W), as PyAV's `to_ndarray(format="nv12")`
            gives it; or a pair of arrays, one for each plane. uint8.

    Raises:
        FrameError: anything else; see `nv12_size`.
    """
    planes = tuple(frame) if isinstance(frame, tuple | list) else (frame,)
    if len(planes) not in (1, 2) or not all(isinstance(plane, np.ndarray) for plane in planes):
        kinds = ", ".join(type(plane).__name__ for plane in planes)
        raise FrameError(f"a frame in NV12 must be a numpy array or a pair of them, not {kinds}; use numpy.asarray")
    if any(plane.dtype != np.uint8 for plane in planes):
        dtypes = ", ".join(str(plane.dtype) for plane in planes)
        raise FrameError(f"a frame in NV12 has dtype {dtypes}; legal is uint8, convert it first")
    height, width = nv12_size(*(plane.shape for plane in planes))
    if len(planes) == 1:
        both = planes[0].reshape(height * 3 // 2, width)
        return both[:height], both[height:]
    return planes[0].reshape(height, width), planes[1].reshape(height // 2, width)


def nv12_to_rgb(frame: Any) -> NDArray[np.uint8]:
    """Convert a picture in NV12, as `nv12_planes` takes it, to (H, W, 3) uint8 RGB.

    Raises:
        FrameError: no such picture.
    """
    luma, chroma = nv12_planes(frame)
    out = np.empty((*luma.shape, 3), np.uint8)
    # By value of a byte; the factors of U and V at half the width are as many additions fewer.
    byte = np.arange(256, dtype=np.int32)
    light = np.maximum(byte - 16, 0) * _LIGHT + (1 << (_BITS - 1))
    red_v, green_u, green_v, blue_u = (
        (byte - 128) * np.int32(factor) for factor in (_RED_V, _GREEN_U, _GREEN_V, _BLUE_U)
    )
    for top in range(0, luma.shape[0], _ROWS):
        pairs = chroma[top // 2 : (top + _ROWS) // 2]
        u, v = pairs[:, 0::2], pairs[:, 1::2]
        base = light[luma[top : top + _ROWS]]
        for channel, tint in enumerate((red_v[v], green_u[u] + green_v[v], blue_u[u])):
            value = base + tint.repeat(2, axis=0).repeat(2, axis=1)
            value >>= _BITS
            out[top : top + _ROWS, :, channel] = value.clip(0, 255, out=value)
    return out
