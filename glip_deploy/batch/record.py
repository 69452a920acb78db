"""The output folder of a job: which job it is, and what is done, in part files.

    OUTPUT/job.json                 bundle, prompt and options; another job is refused
    OUTPUT/parts/00000001-*.jsonl   outcomes, one a line; first a line that names the job, last their number and SHA-256

A part is written under a temporary name, flushed to the disk and renamed, so it is whole or not there. Only the process
that holds the folder's lock writes. What no part holds is done again.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from glip_deploy.batch.messages import Outcome
from glip_deploy.bundle.records import Record
from glip_deploy.errors import GlipError, OutputError, reason_of, shown
from glip_deploy.files import check_folder, locked_folder, not_written, write_atomically

__all__ = ["Entry", "Job", "Recorder", "open_job"]

JOB, PARTS = "job.json", "parts"
_log = logging.getLogger(__name__)
_LONGEST_WAIT = 10.0
"""Seconds for which an outcome waits at most to be written together with others."""
_MOST_BYTES = 32_000_000
"""Outcomes that wait together have at most about so many bytes."""
_PART = "glip-deploy batch part"


class Job(Record, frozen=True, kw_only=True, tag="glip-deploy batch job"):
    """A `job.json`: all that results depend on, besides the files that the source names.

    Attributes:
        bundle: SHA-256 of the bundle's manifest, which has those of all files.
        source: as it was given, as it is part of the names of files in the results.
        prompt: the classes, and the words between them where they matter.
        options: that have an effect on results, by name.
    """

    newest: ClassVar[int] = 1
    error: ClassVar[type[GlipError]] = OutputError

    bundle: str
    source: str
    prompt: Any
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Hex identity of the job, by which its parts are known."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    def difference(self, other: Job) -> str:
        """Return in words what another job has that this one has not."""
        own = msgspec.json.decode(msgspec.json.encode(self), type=Job)  # as the other came out of a file
        if own.bundle != other.bundle:
            return "it was begun with another bundle"
        for name, ours, theirs in (
            ("source", own.source, other.source),
            ("prompt", own.prompt, other.prompt),
            *((f"--{name}", value, other.options.get(name)) for name, value in own.options.items()),
        ):
            if ours != theirs:
                return f"its {name} is {shown(theirs)}, not {shown(ours)}"
        return "it was begun by another version of glip-deploy"


class _Line(msgspec.Struct, omit_defaults=True):
    """What is read of every line of a part, to know what it holds."""

    format: str = ""
    job: str = ""
    name: str = ""
    first: int = 0
    end: int | None = None
    size: int = 0
    modified: int = 0
    found: list[_Scores] = []
    units: int | None = None
    sha256: str = ""


class _Scores(msgspec.Struct, array_like=True):
    frame: int
    time: float | None
    width: int
    height: int
    boxes: msgspec.Raw
    scores: list[float]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a recorded outcome is, and what it says without being read.

    Attributes:
        part: number of the part in `Recorder`.
        offset: of its line, in bytes.
        length: of its line, in bytes.
        end: of the unit.
        size: of the file when it was read, in bytes.
        modified: of the file, in nanoseconds since 1970.
        frames: number of frames.
        objects: detections in them together.
    """

    part: int
    offset: int
    length: int
    end: int | None
    size: int
    modified: int
    frames: int
    objects: int


class Recorder:
    """What is done, by name of the file and first frame; `open_job` makes it.

    Args:
        folder: the output folder.
        job: what is done there.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder = folder
        self.job = job
        self._parts: list[Path] = []
        self._entries: dict[str, dict[int, Entry]] = {}
        self._waiting: list[bytes] = []
        self._waiting_outcomes: list[Outcome] = []
        self._bytes = 0
        self._began = self._written = time.monotonic()
        self._number = 0

    def load(self) -> None:
        """Read which outcomes the parts hold; a damaged part is removed, so that its units are done again.

        Raises:
            OutputError: a part of another job, or one that cannot be read.
        """
        for path in sorted((self.folder / PARTS).glob("*.jsonl")):
            try:
                lines = list(_read_part(path))
            except OSError as error:
                raise OutputError(f"{path} cannot be read ({reason_of(error)}); check its permissions") from error
            except ValueError as error:
                _log.warning("%s is damaged (%s); what it held is done again", path, reason_of(error))
                path.unlink(missing_ok=True)
                continue
            if lines[0][2].job != self.job.key:
                raise OutputError(f"{path} belongs to another job than {self.folder / JOB}; remove it")
            self._number = max(self._number, int(re.match(r"\d*", path.name)[0] or 0))  # type: ignore[index]
            self._parts.append(path)
            for offset, length, line in lines[1:-1]:
                self._remember(len(self._parts) - 1, offset, length, line)

    def entries(self, name: str, size: int, modified: int) -> dict[int, Entry]:
        """Return what is recorded of a file as it is now, by first frame; its size and time must be the same."""
        known = self._entries.get(name, {})
        return {first: one for first, one in sorted(known.items()) if (one.size, one.modified) == (size, modified)}

    def read(self, entry: Entry) -> Outcome:
        """Read an outcome.

        Raises:
            OutputError: the part is gone or was changed.
        """
        path = self._parts[entry.part]
        try:
            with path.open("rb") as file:
                file.seek(entry.offset)
                return msgspec.json.decode(file.read(entry.length), type=Outcome)
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} was changed meanwhile ({reason_of(error)}); run the same again") from error

    def add(self, outcome: Outcome) -> None:
        """Record an outcome that is no failure: now, or with others within seconds.

        Raises:
            OutputError: it cannot be written.
        """
        line = msgspec.json.encode(outcome) + b"\n"
        self._waiting.append(line)
        self._waiting_outcomes.append(outcome)
        self._bytes += len(line)
        self.tick()

    def tick(self) -> None:
        """Write what waits if it waited long enough: a hundredth of the run, between 1 and 10 seconds."""
        now = time.monotonic()
        wait = min(_LONGEST_WAIT, max(1.0, (now - self._began) / 100))
        if now - self._written >= wait or self._bytes >= _MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a part.

        Raises:
            OutputError: it cannot be written.
        """
        self._written = time.monotonic()
        if not self._waiting:
            return
        head = msgspec.json.encode({"format": _PART, "format_version": 1, "job": self.job.key}) + b"\n"
        data = b"".join([head, *self._waiting])
        last = {"units": len(self._waiting), "sha256": hashlib.sha256(data).hexdigest()}
        path = self.folder / PARTS / f"{self._number + 1:08d}-{secrets.token_hex(4)}.jsonl"
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, data + msgspec.json.encode(last) + b"\n", sync=True)
        except OSError as error:
            raise not_written(path, error) from error
        self._number += 1
        self._parts.append(path)
        offset = len(head)
        for line, outcome in zip(self._waiting, self._waiting_outcomes, strict=True):
            self._remember(len(self._parts) - 1, offset, len(line), outcome)
            offset += len(line)
        self._waiting, self._waiting_outcomes, self._bytes = [], [], 0

    def _remember(self, part: int, offset: int, length: int, line: _Line | Outcome) -> None:
        objects = sum(len(one.scores) for one in line.found)
        entry = Entry(part, offset, length, line.end, line.size, line.modified, len(line.found), objects)
        self._entries.setdefault(line.name, {})[line.first] = entry


def _read_part(path: Path) -> Iterator[tuple[int, int, _Line]]:
    """Give offset, length and content of each line of a part, the first and the last included.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    data = path.read_bytes()
    decoder = msgspec.json.Decoder(_Line)
    end = data.rfind(b"\n", 0, max(0, len(data) - 1)) + 1
    last = decoder.decode(data[end:])
    if hashlib.sha256(data[:end]).hexdigest() != last.sha256:
        raise ValueError("its SHA-256 differs")
    offset = 0
    while offset < end:
        length = data.index(b"\n", offset) + 1 - offset
        line = decoder.decode(data[offset : offset + length])
        if not offset and line.format != _PART:
            raise ValueError(f'its format is "{line.format}"')
        yield offset, length, line
        offset += length
    yield end, len(data) - end, last


@contextmanager
def open_job(folder: Path, job: Job, results: Sequence[str]) -> Iterator[Recorder]:
    """Hold an output folder for a job until the block ends; begin the job there, or go on with it.

    Args:
        folder: made if it does not exist.
        job: what will be done.
        results: names of the files that will be written there at the end; a folder without a job must have none.

    Raises:
        OutputError: the folder cannot be written, is in use, or holds another job or foreign files.
    """
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(folder, error) from error
    with locked_folder(folder, "glip-batch") as locked:
        file = folder / JOB
        if file.exists():
            known = Job.read_file(file, "choose another folder")
            if known.key != job.key:
                raise OutputError(
                    f"output folder {folder} holds another job ({job.difference(known)}); choose another folder"
                )
        else:
            foreign = [name for name in (*results, PARTS) if (folder / name).exists()]
            if foreign:
                raise OutputError(
                    f"output folder {folder} has a {foreign[0]} that no glip-batch wrote; choose another folder"
                )
            try:
                job.write_file(file)
            except OSError as error:
                raise not_written(file, error) from error
        if locked:  # so whoever left an unfinished file is gone
            for left in (*(folder / PARTS).glob(".*"), *(one for name in results for one in folder.glob(f".{name}.*"))):
                with suppress(OSError):
                    left.unlink()
        recorder = Recorder(folder, job)
        recorder.load()
        yield recorder
