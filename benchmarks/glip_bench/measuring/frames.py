"""Frames to measure with: the first of a source, all cut to one size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from glip_deploy.errors import SourceError
from glip_deploy.frames import resize
from glip_deploy.video.open import open_source

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FRAMES", "crop_to", "read_frames"]

FRAMES = 8
"""Frames that take turns in a measurement."""


def crop_to(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Crop the middle of a (H, W, 3) uint8 picture to the proportions of `size` (height, width) and resize it to that.

    Args:
        picture: of any size.
        size: (height, width) in pixels.
    """
    height, width = picture.shape[:2]
    scale = min(height / size[0], width / size[1])
    crop_h, crop_w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    return resize(np.ascontiguousarray(picture[top : top + crop_h, left : left + crop_w]), size)


def read_frames(spec: str, size: tuple[int, int], count: int = FRAMES) -> list[NDArray[np.uint8]]:
    """Read the first frames of a source, each cropped and resized to (height, width).

    Raises:
        SourceError: there is no such source, or no frame in it.
    """
    with open_source(spec, max_frames=count) as source:
        frames = [crop_to(frame.image, size) for frame in source]
    if not frames:
        raise SourceError(f"{spec} gave no frames; name a picture, a folder of pictures or a video")
    return frames
