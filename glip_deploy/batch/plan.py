"""Which files there are, which of their frames are done, and which units are left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.batch.messages import Unit
from glip_deploy.errors import GlipError, SourceError, reason_of
from glip_deploy.frames.geometry import ceil_div
from glip_deploy.video.open import find_files

if TYPE_CHECKING:
    from glip_deploy.batch.record import Entry, Recorder

__all__ = ["UNIT_FRAMES", "Failure", "MediaFile", "Plan", "list_files", "make_plan"]

UNIT_FRAMES = 16
"""Frames in a unit of a video: what an interruption may cost of it."""


@dataclass(frozen=True)
class MediaFile:
    """A picture or a video of the source.

    Attributes:
        path: as the source names it.
        name: the same as text; bytes that are no UTF-8 are spelled out.
        video: whether it is a video.
        size: bytes; -1 where it is gone.
        modified: when it was changed last, in nanoseconds since 1970.
    """

    path: Path
    name: str
    video: bool
    size: int
    modified: int

    def unit(self, first: int = 0, end: int | None = None, frames: int = 1) -> Unit:
        """Return the unit of a picture, or one of a video."""
        return Unit(os.fsencode(Path(os.path.abspath(self.path))), self.name, self.video, first, end, frames)  # noqa: PTH100


@dataclass(frozen=True)
class Failure:
    """What could not be done.

    Attributes:
        name: of the file.
        reason: in a line.
        first: of a video, the first frame concerned; None for all of the file.
        end: of a video, the frame after the last concerned; None for all that follow.
    """

    name: str
    reason: str
    first: int | None = None
    end: int | None = None


@dataclass
class Plan:
    """What is left to do.

    Attributes:
        units: in the order of the files.
        failures: videos that cannot be opened.
        done: files of which nothing is left.
    """

    units: list[Unit] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    done: int = 0

    @property
    def frames(self) -> int:
        """Pictures and frames that are left, as far as videos say how many they have."""
        return sum(unit.frames for unit in self.units)


def list_files(source: str) -> list[MediaFile]:
    """Return the pictures and videos that a source names, in natural order.

    Raises:
        SourceError: there is none, or two have the same name.
    """
    files = []
    seen: dict[str, Path] = {}
    for path, video in find_files(source):
        name = str(path).encode("utf-8", "backslashreplace").decode()
        other = seen.setdefault(name, path)
        if other != path:
            raise SourceError(f"two files of source {source} would both be called {name}; rename one of them")
        try:
            status = path.stat()
        except OSError:  # the worker says what is wrong
            files.append(MediaFile(path, name, video, -1, 0))
        else:
            files.append(MediaFile(path, name, video, status.st_size, status.st_mtime_ns))
    return files


def make_plan(
    files: Sequence[MediaFile], recorder: Recorder, stride: int, advance: Callable[[], None] = lambda: None
) -> Plan:
    """Return the units that no part of the record holds.

    Args:
        files: of the source.
        recorder: what is done.
        stride: of a video, every how many frames.
        advance: called after each file.

    Raises:
        MissingPackage: there are videos, and PyAV is not installed.
    """
    plan = Plan()
    for file in files:
        known = recorder.entries(file.name, file.size, file.modified)
        if is_complete(known):
            plan.done += 1
        elif not file.video:
            plan.units.append(file.unit())
        else:
            _import_av()
            try:
                units = list(_video_units(file, stride))
            except (GlipError, OSError, ValueError) as error:
                plan.failures.append(Failure(file.name, reason_of(error)))
            else:
                plan.units += [unit for unit in units if not _is_done(unit, known)]
        advance()
    return plan


def is_complete(known: Mapping[int, Entry]) -> bool:
    """Return whether recorded outcomes cover a file from its first frame to its end."""
    at: int | None = 0
    while at is not None:
        entry = known.get(at)
        if entry is None:
            return False
        at = entry.end
    return True


def _is_done(unit: Unit, known: Mapping[int, Entry]) -> bool:
    entry = known.get(unit.first)
    return entry is not None and entry.end == unit.end


def _import_av() -> None:
    from glip_deploy.video.video_in import import_av

    import_av()


def _video_units(file: MediaFile, stride: int) -> Iterator[Unit]:
    """Divide a video; the last unit has all that follows, should the header announce too few frames."""
    from glip_deploy.video.address import Address
    from glip_deploy.video.video_in import VideoSource

    with VideoSource(Address.of_file(file.path), stride=stride) as video:
        count = video.frame_count or ceil_div(video.count_packets(), stride)
    units = max(1, ceil_div(count, UNIT_FRAMES))
    step = UNIT_FRAMES * stride
    for place in range(units):
        last = place == units - 1
        frames = count - place * UNIT_FRAMES if last else UNIT_FRAMES
        yield file.unit(place * step, None if last else (place + 1) * step, frames)
