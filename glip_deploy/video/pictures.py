"""Where frames come from: a picture, a folder, a glob, a video, a camera or a network stream.

`open_source` looks at what it was given and answers with one `Source`, which is iterated once. A frame that
cannot be read is logged, counted in `Source.skipped` and passed over; only a source that gives nothing at
all, or a live one that goes away, is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.errors import GlipError
from glip_deploy.frames.geometry import ceil_div

if TYPE_CHECKING:
    pass
from glip_deploy.video.base import Frame, Source

__all__ = ["PICTURE_SUFFIXES", "PictureSource"]

PICTURE_SUFFIXES = frozenset(
    (
        ".bmp",
        ".gif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".jp2",
        ".png",
        ".pgm",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    )
)
"""File names that count as pictures when a folder or a glob is read; compared in lower case."""
VIDEO_SUFFIXES = frozenset(
    (
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ts",
        ".webm",
    )
)


class PictureSource(Source):
    """Picture files, in the order given; `Frame.index` is the place in that order.

    Args:
        paths: at least one file.
        name: what to call them together.
        root: the folder under which they lie; names of output files are made relative to it.
        stride: every how manyeth picture is given.
        max_frames: how many pictures are given at most; None for all.

    Raises:
        GlipError: while iterating, if not one of them could be read.
    """

    def __init__(
        self, paths: Sequence[Path], *, name: str, root: Path, stride: int = 1, max_frames: int | None = None
    ) -> None:
        super().__init__()
        self.paths = tuple(paths)
        self.name = name
        self.root = root
        self.stride = stride
        self._max_frames = max_frames
        count = ceil_div(len(self.paths), stride)
        self.frame_count = count if max_frames is None else min(count, max_frames)

    def __iter__(self) -> Iterator[Frame]:
        from glip_deploy.frames.load import load_image

        given = 0
        first: GlipError | None = None
        for index in range(0, len(self.paths), self.stride):
            if given == self._max_frames:
                return
            path = self.paths[index]
            try:
                image = load_image(path)
            except GlipError as error:
                if len(self.paths) == 1:
                    raise
                first = first or error
                self._skip(f"picture {index}: {error}")
                continue
            given += 1
            yield Frame(image=image, source=str(path), index=index)
        if not given:
            raise GlipError(f"{self.name}: none of its {self.skipped} pictures could be read; first: {first}")

    def close(self) -> None:
        """Nothing is held open between two pictures."""


def _looks_like_picture(path: Path) -> bool:
    # Names that begin with a dot are leavings, such as the ._x.jpg of macOS.
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _is_picture(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES or suffix in VIDEO_SUFFIXES:
        return suffix in PICTURE_SUFFIXES
    from PIL import Image

    try:
        with Image.open(path):
            return True
    except OSError:
        return False


def _suffixes() -> str:
    return " ".join(sorted(PICTURE_SUFFIXES))
