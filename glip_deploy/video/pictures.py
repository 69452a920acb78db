"""Picture files as a source of frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from glip_deploy.errors import GlipError, SourceError
from glip_deploy.frames.geometry import ceil_div
from glip_deploy.frames.load import load_image
from glip_deploy.video.base import Frame, Source

__all__ = ["PICTURE_SUFFIXES", "PictureSource"]

PICTURE_SUFFIXES = frozenset(
    [".bmp", ".gif", ".jpe", ".jpeg", ".jpg", ".jp2", ".png", ".pgm", ".pnm", ".ppm", ".tif", ".tiff", ".webp"]
)
"""Suffixes of files that are taken for pictures; compared in lower case."""


class PictureSource(Source):
    """Picture files, in the order given; `Frame.index` is the place in that order.

    Args:
        paths: at least one file.
        name: what messages call them together.
        root: the folder that contains them; the names of output files are relative to it.
        stride: 1 gives every picture, 2 every second one, and so on.
        max_frames: how many pictures are given at most; None for all.

    Raises:
        FrameError: while iterating, if the only picture cannot be read.
        SourceError: while iterating, if none of several could be read.
    """

    def __init__(
        self, paths: Sequence[Path], *, name: str, root: Path, stride: int = 1, max_frames: int | None = None
    ) -> None:
        super().__init__()
        self.files = tuple(paths)
        self.name = name
        self.root = root
        self.stride = stride
        self._max_frames = max_frames
        count = ceil_div(len(self.files), stride)
        self.frame_count = count if max_frames is None else min(count, max_frames)

    def __iter__(self) -> Iterator[Frame]:
        given = 0
        first: GlipError | None = None
        for index in range(0, len(self.files), self.stride):
            if given == self._max_frames:
                return
            path = self.files[index]
            try:
                image = load_image(path)
            except GlipError as error:
                if len(self.files) == 1:
                    raise
                first = first or error
                self._skip(f"picture {index}: {error}")
                continue
            given += 1
            yield Frame(image=image, source=str(path), index=index)
        if not given:
            raise SourceError(f"{self.name}: none of its {self.skipped} pictures could be read; first: {first}")

    def close(self) -> None:
        """Do nothing: no file is open between two pictures."""
