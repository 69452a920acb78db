"""Open whatever a person names as a source: a picture, a folder, a glob, a video, a camera or a stream."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    import os

    from glip_deploy.video.video_in import VideoSource
from glip_deploy.video.pictures import VIDEO_SUFFIXES, PictureSource, _is_picture, _looks_like_picture, _suffixes

__all__ = ["open_source"]


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
    from glip_deploy.video.video_in import Address, VideoSource, live_address

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
    if matches and all(match.suffix.lower() in VIDEO_SUFFIXES for match in matches):
        raise GlipError(f"glob {text} matches {len(matches)} videos; give one video at a time")
    raise GlipError(f"glob {text} matches no pictures ({_suffixes()}); put it in quotes and check the folder")


def _fixed_part(pattern: str) -> Path:
    parts: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", str(path).casefold())
    return [(0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in pieces if piece]
