"""Where frames come from: a picture, a folder, a glob, a video, a camera or a network stream.

`open_source` looks at what it was given and answers with one `Source`, which is iterated once. A frame that
cannot be read is logged, counted in `Source.skipped` and passed over; only a source that gives nothing at
all, or a live one that goes away, is an error.
"""

from __future__ import annotations

import glob
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from numpy.typing import NDArray

    from glip_deploy.video_source import VideoSource

__all__ = [
    "PICTURE_SUFFIXES",
    "Frame",
    "PictureSource",
    "Source",
    "open_source",
]

log = logging.getLogger(__name__)

# fmt: off
PICTURE_SUFFIXES = frozenset((
    ".bmp", ".gif", ".jpe", ".jpeg", ".jpg", ".jp2", ".png", ".pgm", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
))
"""File names that count as pictures when a folder or a glob is read; compared in lower case."""

_VIDEO_SUFFIXES = frozenset((
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm",
))
# fmt: on
_LOGGED_SKIPS = 10


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture to detect in.

    Attributes:
        image: (H, W, 3) uint8 RGB, upright.
        source: the file it came from, or the camera or address (without its password).
        index: its place in the source, from 0, counting frames that were skipped by the stride or unreadable.
        time: seconds from the start of the source; None for pictures and for frames without a time stamp.
    """

    image: NDArray[np.uint8]
    source: str
    index: int
    time: float | None = None


class Source(ABC):
    """Frames, to be iterated once, and what is known about them beforehand. A context manager.

    Attributes:
        name: what to call it in a message.
        is_video: frames follow each other in time.
        is_live: frames come at their own pace and are lost if nobody takes them.
        fps: frames per second before the stride; None for pictures, or where the source does not say.
        frame_count: how many frames an iteration gives, after stride and limit: exact for pictures, from the
            header or the duration for video; None where unknown.
        size: (width, height) in pixels as announced, before any rotation; None where unknown.
        stride: every how manyeth frame is given.
        timeout: for a live source, the seconds after which a missing frame is an error.
        skipped: frames that could not be read so far.
    """

    name: str
    is_video: bool = False
    is_live: bool = False
    fps: float | None = None
    frame_count: int | None = None
    size: tuple[int, int] | None = None
    stride: int = 1
    timeout: float = 10.0

    def __init__(self) -> None:
        self.skipped = 0

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]:
        """Give the frames; see the class for what may be raised."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file or device; an iteration still under way ends. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _skip(self, message: str) -> None:
        self.skipped += 1
        if self.skipped <= _LOGGED_SKIPS:
            log.warning("%s; skipped", message)
        if self.skipped == _LOGGED_SKIPS:
            log.warning("%s: more unreadable frames are counted, not listed", self.name)


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
        count = -(-len(self.paths) // stride)
        self.frame_count = count if max_frames is None else min(count, max_frames)

    def __iter__(self) -> Iterator[Frame]:
        from glip_deploy.image import load_image

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


def open_source(
    spec: str | int | os.PathLike[str],
    *,
    stride: int = 1,
    max_frames: int | None = None,
    timeout: float = 10.0,
    reconnect: int = 0,
) -> PictureSource | VideoSource:
    """Open whatever `spec` names.

    Args:
        spec: a picture file; a folder (its pictures, in natural order: 2 before 10, not its subfolders); a
            glob ("**" goes into subfolders); a video file; a camera ("0", or a device such as /dev/video0, or
            on Windows "video=NAME"); an address such as rtsp:// or http://.
        stride: every how manyeth frame is given; at least 1.
        max_frames: how many frames are given at most; at least 1, or None for all.
        timeout: seconds after which a camera or network peer that stays silent is an error.
        reconnect: how often in a row a lost live source is opened again before it is an error.

    Returns:
        An open source; close it, or use it in a `with` block.

    Raises:
        GlipError: it does not exist, is none of these, or cannot be opened; a number out of range.
    """
    limits = (("stride", stride, 1), ("max_frames", max_frames, 1), ("reconnect", reconnect, 0))
    for what, value, least in limits:
        if value is not None and value < least:
            raise GlipError(f"{what} is {value}; it must be at least {least}")
    if not timeout > 0:
        raise GlipError(f"timeout is {timeout}; it must be above 0 seconds")
    from glip_deploy.video_source import Address, VideoSource, live_address

    text = str(spec)
    address = live_address(text)
    if address is None:
        paths, root = _files(text)
        if len(paths) > 1 or _is_picture(paths[0]):
            return PictureSource(paths, name=text, root=root, stride=stride, max_frames=max_frames)
        address = Address(target=str(paths[0]), name=str(paths[0]))
    return VideoSource(address, stride=stride, max_frames=max_frames, timeout=timeout, reconnect=reconnect)


def _files(text: str) -> tuple[list[Path], Path]:
    """The pictures `text` stands for, or the one video; and the folder above them."""
    path = Path(text)
    if path.is_dir():
        paths = sorted((p for p in path.iterdir() if _looks_like_picture(p)), key=_natural)
        if not paths:
            raise GlipError(
                f"folder {text} holds no pictures ({_suffixes()}); name a video file in it by its full path"
            )
        return paths, path
    if path.exists():
        return [path], path.parent
    if not glob.has_magic(text):
        raise GlipError(
            f"source {text} does not exist; give a picture, a folder, a glob, a video file,"
            " a camera number or an address such as rtsp://host/path"
        )
    found = (Path(match) for match in glob.glob(text, recursive=True))  # noqa: PTH207 (Path.glob has no "/x/*")
    matches = sorted((match for match in found if match.is_file()), key=_natural)
    paths = [match for match in matches if _looks_like_picture(match)]
    if paths:
        return paths, _fixed_part(text)
    if len(matches) == 1:
        return matches, matches[0].parent
    if matches and all(match.suffix.lower() in _VIDEO_SUFFIXES for match in matches):
        raise GlipError(f"glob {text} matches {len(matches)} videos; give one video at a time")
    raise GlipError(f"glob {text} matches no pictures ({_suffixes()}); put it in quotes and check the folder")


def _fixed_part(pattern: str) -> Path:
    parts: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _looks_like_picture(path: Path) -> bool:
    # Names that begin with a dot are leavings, such as the ._x.jpg of macOS.
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _is_picture(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES or suffix in _VIDEO_SUFFIXES:
        return suffix in PICTURE_SUFFIXES
    from PIL import Image

    try:
        with Image.open(path):
            return True
    except OSError:
        return False


def _suffixes() -> str:
    return " ".join(sorted(PICTURE_SUFFIXES))


def _natural(path: Path) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", str(path).casefold())
    return [(0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in pieces if piece]
