"""What reads frames and what takes results: `Frame`, `Source` and `Sink`."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from glip_deploy.files import check_outputs

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.results.detections import Detections

__all__ = ["Frame", "Sink", "Source", "check_sinks"]

log = logging.getLogger(__name__)
_LOGGED_SKIPS = 10


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture to detect in.

    Attributes:
        image: (H, W, 3) uint8 RGB, upright.
        source: the file it came from, or the camera or address (without user and password).
        index: its place in the source, from 0, counting frames that the stride skipped or that could not be read.
        time: seconds from the start of the source; None for pictures and for frames without a time stamp.
    """

    image: NDArray[np.uint8]
    source: str
    index: int
    time: float | None = None


class Source(ABC):
    """A sequence of frames, which is iterated once, and what is known about it beforehand. A context manager.

    A frame that cannot be read is logged, counted in `skipped` and passed over. Errors are a source that gives nothing
    at all (SourceError), a single picture that cannot be read (FrameError), and a live source that goes away
    (SourceLost).

    Attributes:
        name: what messages call it.
        files: the files that it reads; none for a camera or a network stream.
        is_video: frames follow each other in time.
        is_live: frames come at their own pace and are lost if they are not taken.
        fps: frames per second before the stride; None for pictures, or where the source does not say.
        frame_count: how many frames an iteration gives, after stride and limit: exact for pictures, from the
            header or the duration for video; None where unknown.
        size: (width, height) in pixels as announced, before any rotation; None where unknown.
        stride: 1 gives every frame, 2 every second one, and so on.
        timeout: for a live source, the seconds without a frame after which it counts as lost.
        skipped: frames that could not be read so far.
    """

    name: str
    files: tuple[Path, ...] = ()
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
        """Give the frames; see the class for what is raised."""

    @abstractmethod
    def close(self) -> None:
        """Release the file or device; an iteration that is still running ends. It may be called twice."""

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


class Sink(ABC):
    """Takes each frame with its detections, in order. A context manager.

    Making one checks that its output can be written, and touches nothing. Entering it opens the output, leaving it
    completes the output; leaving it because of an exception keeps only what is whole (pictures, lines, a video up to
    there).
    """

    def outputs(self, source: Source) -> Sequence[Path]:
        """Return the files that will be written for a source."""
        return ()

    @abstractmethod
    def write(self, frame: Frame, detections: Detections) -> None:
        """Take one frame.

        Raises:
            OutputError: it cannot be written, such as on a full disk.
        """

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the output, or, after an exception, keep only what is whole."""


def check_sinks(source: Source, sinks: Sequence[Sink], other_inputs: Mapping[Path, str] | None = None) -> None:
    """Check that no sink writes to a file that is read, nor two of them to the same file, without touching anything.

    Args:
        source: what is read.
        sinks: what is written.
        other_inputs: other files that are read, and what they are, such as "the prompt file".

    Raises:
        OutputError: one does.
    """
    inputs = dict.fromkeys(source.files, "the source itself") | dict(other_inputs or {})
    check_outputs(inputs, [path for sink in sinks for path in sink.outputs(source)])
