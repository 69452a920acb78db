"""Open whatever is named as a source: a picture, a folder, a glob, a video, a camera or a stream."""

from __future__ import annotations

import glob
import re
import threading
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.errors import OptionError, SourceError
from glip_deploy.frames.geometry import check_whole
from glip_deploy.video.address import Address, live_address
from glip_deploy.video.pictures import PICTURE_SUFFIXES, PictureSource
from glip_deploy.video.video_in import VIDEO_SUFFIXES, VideoSource

if TYPE_CHECKING:
    import os

__all__ = ["find_files", "open_source"]


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
        spec: a picture file; a folder (its pictures in natural order, 2 before 10, without its subfolders); a
            glob ("**" includes subfolders); a video file; a camera ("0", or a device such as /dev/video0, or
            on Windows "video=NAME"); an address such as rtsp:// or http://.
        stride: 1 gives every frame, 2 every second one, and so on.
        max_frames: how many frames are given at most; at least 1, or None for all.
        timeout: seconds after which a camera or network peer that stays silent is an error.
        reconnect: how many times in a row a lost live source is opened again before it is an error.

    Returns:
        An open source; close it, or use it in a `with` block.

    Raises:
        OptionError: a number out of range.
        SourceError: the source does not exist, is none of these, or cannot be opened.
        MissingPackage: a video, and PyAV is not installed.
    """
    check_whole("stride", stride, 1)
    check_whole("reconnect", reconnect, 0)
    if max_frames is not None:
        check_whole("max_frames", max_frames, 1)
    if not isinstance(timeout, Real) or not 0 < timeout < threading.TIMEOUT_MAX / 2:
        raise OptionError(f"timeout is {timeout!r}; it must be a finite number above 0 seconds")
    text = str(spec)
    try:
        address = live_address(text)
        if address is None:
            paths, root = _files(text)
            if len(paths) > 1 or _is_picture(paths[0]):
                return PictureSource(paths, name=text, root=root, stride=stride, max_frames=max_frames)
            address = Address.of_file(paths[0])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SourceError(f"source {text} cannot be read ({reason}); check its name and its permissions") from error
    return VideoSource(address, stride=stride, max_frames=max_frames, timeout=float(timeout), reconnect=reconnect)


def find_files(text: str) -> list[tuple[Path, bool]]:
    """Return the pictures and videos that `text` names, in natural order, and of each whether it is a video.

    Args:
        text: a picture or video file; a folder (without its subfolders); a glob ("**" includes subfolders).

    Raises:
        SourceError: it does not exist, cannot be read, holds neither, or is a camera or a stream.
    """
    try:
        address = live_address(text)
        if address is not None and address.file is None:
            raise SourceError(
                f"source {address.name} is a camera or a stream, which has no end; give files, or use glip-detect"
            )
        path = Path(text) if address is None or address.file is None else address.file
        if path.is_dir():
            found, what = list(path.iterdir()), f"folder {text} holds"
        elif path.exists():
            return [(path, not _is_picture(path))]
        elif not glob.has_magic(text):
            raise SourceError(f"source {text} does not exist; give a picture, a video, a folder or a glob")
        else:
            found = [Path(match) for match in glob.glob(text, recursive=True)]  # noqa: PTH207 (Path.glob has no "/x/*")
            what = f"glob {text} matches"
        media = [(file, file.suffix.lower() in VIDEO_SUFFIXES) for file in found if _looks_like_media(file)]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SourceError(f"source {text} cannot be read ({reason}); check its name and its permissions") from error
    if not media:
        suffixes = " ".join(sorted(PICTURE_SUFFIXES | VIDEO_SUFFIXES))
        raise SourceError(f"{what} no pictures and no videos ({suffixes}); put a glob in quotes and check the folder")
    return sorted(media, key=lambda one: _natural(one[0]))


def _files(text: str) -> tuple[list[Path], Path]:
    """Return the pictures that `text` names, or the one video; and the folder above them."""
    path = Path(text)
    suffixes = " ".join(sorted(PICTURE_SUFFIXES))
    if path.is_dir():
        paths = sorted((p for p in path.iterdir() if _looks_like_picture(p)), key=_natural)
        if not paths:
            raise SourceError(f"folder {text} holds no pictures ({suffixes}); name a video file in it by its full path")
        return paths, path
    if path.exists():
        return [path], path.parent
    if not glob.has_magic(text):
        raise SourceError(
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
    if matches and all(match.suffix.lower() in VIDEO_SUFFIXES for match in matches):
        raise SourceError(f"glob {text} matches {len(matches)} videos; give one video at a time")
    raise SourceError(f"glob {text} matches no pictures ({suffixes}); put it in quotes and check the folder")


def _looks_like_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and _looks_like_media(path)


def _looks_like_media(path: Path) -> bool:
    # Names that begin with a dot are hidden files, such as the ._x.jpg that macOS writes beside x.jpg.
    known = path.suffix.lower() in PICTURE_SUFFIXES | VIDEO_SUFFIXES
    return known and not path.name.startswith(".") and path.is_file()


def _is_picture(path: Path) -> bool:
    """Return whether a file is a picture: by its suffix, or by its content where the suffix is of neither kind."""
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES or suffix in VIDEO_SUFFIXES:
        return suffix in PICTURE_SUFFIXES
    from PIL import Image

    try:
        with Image.open(path):
            return True
    except Image.DecompressionBombError:
        return True  # reading it says how large it is
    except Exception:  # a file that is no picture, or a damaged one, makes Pillow's readers raise anything
        return False


def _fixed_part(pattern: str) -> Path:
    """Return the folders of a glob before the first one that is a pattern."""
    parts: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Return a key that sorts numbers in names by their value, and letters without their case."""
    pieces = re.split(r"(\d+)", str(path).casefold())
    return [(0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in pieces if piece]
