"""What reads frames and what takes results: `Frame`, `Source` and `Sink`."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from glip_deploy.results.detections import Detections

__all__ = ["Frame", "Sink", "Source"]

log = logging.getLogger(__name__)
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


class Sink(ABC):
    """Takes each frame with its detections, in order."""

    @abstractmethod
    def write(self, frame: Frame, detections: Detections) -> None:
        """Take one frame.

        Raises:
            GlipError: it cannot be written, such as on a full disk.
        """

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the output, or, after an exception, keep only what is whole."""
