"""A worker: one open detector, which turns units into outcomes."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.batch.messages import Found, Outcome, Setup, Unit
from glip_deploy.errors import BundleError, GlipError, SourceError, reason_of

if TYPE_CHECKING:
    from glip_deploy.detector import Detector
    from glip_deploy.prompts.encoded import EncodedPrompt
    from glip_deploy.video.base import Frame
    from glip_deploy.video.video_in import VideoSource

__all__ = ["Worker"]

_log = logging.getLogger(__name__)


class Worker:
    """Opens the detector once, with the first unit, and keeps the video that it reads open.

    Args:
        setup: the job.
        threads: CPU threads; None for one a core.
    """

    def __init__(self, setup: Setup, threads: int | None = None) -> None:
        self._setup = setup
        self._threads = threads
        self._opened: tuple[Detector, EncodedPrompt] | None = None
        self._video: _OpenVideo | None = None

    def open(self) -> tuple[Detector, EncodedPrompt]:
        """Open the bundle and encode the prompt, unless that is done.

        Raises:
            GlipError: a bundle, backend, engine or prompt that cannot be used here.
        """
        if self._opened is None:
            from glip_deploy.detector import Detector

            setup = self._setup
            detector = Detector.open(setup.model, threads=self._threads, **setup.options)
            if detector.bundle.manifest_sha256 != setup.manifest_sha256:
                detector.close()
                raise BundleError(
                    f"bundle {setup.model} on {socket.gethostname()} is another one than where glip-batch was started;"
                    " copy the same bundle to every machine"
                )
            of_list: dict[str, Any] = (
                {} if setup.classes_per_prompt is None else {"classes_per_prompt": setup.classes_per_prompt}
            )
            self._opened = detector, detector.encode(setup.prompt, **of_list)
        return self._opened

    def __call__(self, units: Iterable[Unit]) -> Iterator[Outcome]:
        """Give the outcome of each unit; what is wrong with a file is its outcome.

        Raises:
            GlipError: the detector cannot be opened.
        """
        self.open()
        for unit in units:
            yield self._outcome(unit)

    def close(self) -> None:
        """Close the video and the detector."""
        self._leave_video()
        if self._opened is not None:
            self._opened[0].close()
            self._opened = None

    def _outcome(self, unit: Unit) -> Outcome:
        path = Path(os.fsdecode(unit.path))
        size = modified = 0
        try:
            size, modified = _stamp(path)
            found = [self._found(frame) for frame in self._frames(unit, path, (size, modified))]
            if _stamp(path) != (size, modified):
                raise SourceError(f"{path} was changed while it was read; run again when it is complete")
        except Exception as error:  # whatever a damaged file makes a library raise is that file's failure
            self._leave_video()
            text = str(error) if isinstance(error, GlipError) else f"{type(error).__name__}: {reason_of(error)}"
            _log.debug("%s failed", path, exc_info=True)
            failure = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
            return Outcome(unit.name, unit.first, unit.end, size, modified, failure=failure)
        return Outcome(unit.name, unit.first, unit.end, size, modified, found)

    def _found(self, frame: Frame) -> Found:
        detector, prompt = self.open()
        options: dict[str, Any] = {}
        if self._setup.max_detections is not None:
            options["max_detections"] = self._setup.max_detections
        found = detector.detect(frame.image, prompt, threshold=self._setup.thresholds, color="rgb", **options)
        height, width = frame.image.shape[:2]
        boxes = [(x1, y1, x2, y2) for x1, y1, x2, y2 in found.boxes.tolist()]
        return Found(frame.index, frame.time, width, height, boxes, found.scores.tolist(), found.labels.tolist())

    def _frames(self, unit: Unit, path: Path, stamp: tuple[int, int]) -> Iterator[Frame]:
        if unit.video:
            if self._video is None or not self._video.can_give(unit, stamp):
                self._leave_video()
                self._video = _OpenVideo(unit, path, stamp, self._setup.stride)
            return self._video.frames(unit)
        self._leave_video()
        return _picture(path)

    def _leave_video(self) -> None:
        if self._video is not None:
            self._video.source.close()
            self._video = None


def _picture(path: Path) -> Iterator[Frame]:
    from glip_deploy.frames.load import load_image
    from glip_deploy.video.base import Frame

    yield Frame(image=load_image(path), source=str(path), index=0)


def _stamp(path: Path) -> tuple[int, int]:
    """Return size and time of the last change, by which a file that changed is known."""
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({reason_of(error)})") from None
    return status.st_size, status.st_mtime_ns


class _OpenVideo:
    """A video that is read on where the unit before ended, so that each frame is decoded once by a worker."""

    def __init__(self, unit: Unit, path: Path, stamp: tuple[int, int], stride: int) -> None:
        from glip_deploy.video.address import Address
        from glip_deploy.video.video_in import VideoSource

        self._file = unit.path, stamp
        self._next = 0
        self._waiting: Frame | None = None
        self.source: VideoSource = VideoSource(Address.of_file(path), stride=stride)
        self._iterator = iter(self.source)

    def can_give(self, unit: Unit, stamp: tuple[int, int]) -> bool:
        """Return whether a unit is of this video, as it was when it was opened, and not behind what was read."""
        return (unit.path, stamp) == self._file and unit.first >= self._next

    def frames(self, unit: Unit) -> Iterator[Frame]:
        """Give the frames of a unit."""
        self.source.first_frame = self._next = unit.first
        while True:
            frame, self._waiting = self._waiting or next(self._iterator, None), None
            if frame is None:
                return
            if unit.end is not None and frame.index >= unit.end:
                self._waiting, self._next = frame, unit.end
                return
            if frame.index >= unit.first:
                self._next = frame.index + 1
                yield frame
