"""Reading, detection and writing at the same time: each in a thread, detection in the caller's.

The queues between them are short, so memory does not grow with the length of a video. A file is read at the pace of
the slowest of the three; from a live source only the newest frame is kept, and those it replaces count as dropped.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import numpy as np

from glip_deploy.errors import SourceLost
from glip_deploy.frames.geometry import check_whole
from glip_deploy.video.base import check_sinks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from glip_deploy.detector import Detector
    from glip_deploy.prompts.encoded import EncodedPrompt
    from glip_deploy.results.detections import Detections
    from glip_deploy.video.base import Frame, Sink, Source
    from glip_deploy.video.tracking import Tracker

    Threshold = float | Sequence[float] | Mapping[str, float]
    Wanted = EncodedPrompt | Sequence[EncodedPrompt]
    PromptChoice = Wanted | Callable[[Frame], Wanted]

__all__ = ["RunSummary", "StageTimes", "detect_stream", "run"]

log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_TIMES_KEPT = 10_000
_PATIENCE = 3.0


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds per frame of one stage, over the last 10 000 frames; 0 where there was none."""

    median_ms: float
    p95_ms: float


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Attributes:
        frames: frames read, including the dropped ones.
        skipped: frames or pictures that could not be read.
        detected: frames that went through the detector.
        dropped: frames of a live source that a newer one replaced before the detector was free.
        objects: detections in all frames together.
        tracks: ids that the tracker gave; 0 without one.
        seconds: wall-clock time, from the first read to the last file closed.
        fps: `detected / seconds`.
        reading: decoding and conversion; for a live source mostly the wait for the next frame.
        inference: `Detector.detect`, including preprocessing.
        writing: all sinks together, including drawing.
        interrupted: Ctrl-C (KeyboardInterrupt) ended it early.
    """

    frames: int
    skipped: int
    detected: int
    dropped: int
    objects: int
    seconds: float
    fps: float
    reading: StageTimes
    inference: StageTimes
    writing: StageTimes
    interrupted: bool = False
    tracks: int = 0


def run(
    detector: Detector,
    source: Source,
    prompt: PromptChoice,
    sinks: Sequence[Sink] = (),
    *,
    threshold: Threshold | Sequence[Threshold] = 0.5,
    max_detections: int | None = None,
    tracker: Tracker | None = None,
    queue_size: int = 4,
    on_frame: Callable[[Frame, Detections], None] | None = None,
) -> RunSummary:
    """Detect in every frame of a source, writing the results while the next ones are computed.

    After Ctrl-C (KeyboardInterrupt in the caller's thread) frames already detected are written, the sinks are
    completed, and the summary says `interrupted`; a second Ctrl-C ends the run without waiting. Any other exception,
    from whichever thread, stops all three and is raised here once they have ended: frames already detected are written
    unless the writing itself failed, and the sinks are left as after an exception.

    Args:
        detector: an open detector.
        source: an open source, not iterated yet; closed at the end.
        prompt: what `Detector.encode` gave; or a function from the frame to it, to change the prompt while the video
            runs. Changing between encoded prompts costs nothing. Several prompts in a list share the backbone;
            sinks then get the detections of all, labeled by the place in all their classes together.
        sinks: entered here, in order, and left at the end.
        threshold: as `Detector.detect` takes it; for several prompts, as `Detector.detect_prompts` does.
        max_detections: as they take it.
        tracker: gives the objects ids over the frames (`glip_deploy.video.tracking`); sinks get detections with tracks.
            The boxes are the same as without; weaker ones are looked for too, but only the tracker sees them.
        queue_size: at most so many frames wait before and after inference; at least 1.
        on_frame: called in the caller's thread after each frame is detected.

    Returns:
        Counts and times.

    Raises:
        OptionError: a queue size or threshold out of range, or a tracker for pictures; nothing was read or written.
        OutputError: a sink writes to a file that is read or that another one writes (nothing was read or written), or
            it cannot write, such as on a full disk.
        FrameError: the only picture of the source cannot be read, or a frame is illegal.
        SourceError: the source gave no frame that can be read.
        SourceLost: a live source went away, or gave no frame for its `timeout` and three seconds more.
        BrokenPipeError: the reader of standard output went away.
        GlipError: whatever else the detector raised, such as a ClosedError or BackendError.
    """
    check_whole("queue_size", queue_size, 1)
    if tracker is not None:
        tracker.check(source)
    check_sinks(source, sinks)
    start = time.perf_counter()
    inference = _Clock()
    known = 0 if tracker is None else tracker.count
    detected = objects = 0
    interrupted = False
    with contextlib.ExitStack() as stack:
        for sink in sinks:
            stack.enter_context(sink)
        reader = _Reader(source, queue_size)
        writer = _Writer(sinks, queue_size, on_failure=reader.stop)
        # The writer is left last: frames already detected are written after reading has stopped.
        with writer, reader:
            try:
                for frame in reader:
                    with inference:
                        wanted = prompt(frame) if callable(prompt) else prompt
                        found = _detect(detector, frame, wanted, threshold, max_detections, tracker, source.fps)
                    detected += 1
                    objects += len(found.scores)
                    if not writer.put((frame, found)):
                        break
                    if on_frame is not None:
                        on_frame(frame, found)
                writer.finish()
            except KeyboardInterrupt:
                interrupted = True
                log.info("interrupted; finishing what is detected")
    seconds = time.perf_counter() - start
    return RunSummary(
        frames=reader.frames,
        skipped=source.skipped,
        detected=detected,
        dropped=reader.dropped,
        objects=objects,
        seconds=seconds,
        fps=detected / seconds if seconds else 0.0,
        reading=reader.clock.times(),
        inference=inference.times(),
        writing=writer.clock.times(),
        interrupted=interrupted,
        tracks=0 if tracker is None else tracker.count - known,
    )


def detect_stream(
    detector: Detector,
    source: Source,
    prompt: PromptChoice,
    *,
    threshold: Threshold | Sequence[Threshold] = 0.5,
    max_detections: int | None = None,
    tracker: Tracker | None = None,
    queue_size: int = 4,
) -> Iterator[tuple[Frame, Detections]]:
    """Give each frame with its detections, reading ahead meanwhile; from a live source, the newest frame.

    Args and errors are those of `run`. Leaving the loop early ends the reading.
    """
    check_whole("queue_size", queue_size, 1)
    if tracker is not None:
        tracker.check(source)
    with _Reader(source, queue_size) as reader:
        for frame in reader:
            wanted = prompt(frame) if callable(prompt) else prompt
            yield frame, _detect(detector, frame, wanted, threshold, max_detections, tracker, source.fps)


def _detect(
    detector: Detector,
    frame: Frame,
    wanted: Wanted,
    threshold: Any,
    max_detections: int | None,
    tracker: Tracker | None,
    fps: float | None,
) -> Detections:
    """Return the detections of a frame, with tracks if there is a tracker."""
    if tracker is None:
        return _found(detector, frame, wanted, threshold, max_detections)
    from glip_deploy.detector import thresholds_of_prompts
    from glip_deploy.prompts.tokens import thresholds
    from glip_deploy.video.tracking import WEAK

    several = isinstance(wanted, list | tuple)
    prompts = cast("Sequence[EncodedPrompt]", wanted if several else [wanted])
    each = thresholds_of_prompts(threshold, len(prompts)) if several else [threshold]
    limits = [thresholds(one.phrases, limit) for one, limit in zip(prompts, each, strict=True)]
    weak = [(WEAK * limit).tolist() for limit in limits]
    found = _found(detector, frame, wanted, weak if several else weak[0], max_detections)
    phrases = [phrase for one in prompts for phrase in one.phrases]
    time = frame.index / fps if frame.time is None and fps else frame.time
    return tracker.update(found, phrases, np.concatenate(limits).tolist(), time=time)


def _found(detector: Detector, frame: Frame, wanted: Wanted, threshold: Any, max_detections: int | None) -> Detections:
    """Return the detections of a frame; those of several prompts as if they were one."""
    options: dict[str, Any] = {} if max_detections is None else {"max_detections": max_detections}
    if not isinstance(wanted, list | tuple):
        one = cast("EncodedPrompt", wanted)
        return detector.detect(frame.image, one, threshold=threshold, color="rgb", **options)
    from glip_deploy.results.detections import Detections

    found = detector.detect_prompts(frame.image, wanted, threshold, color="rgb", **options)
    return Detections.joined(found, [len(prompt.phrases) for prompt in wanted])


class _Clock:
    """Times a stage; keeps only the last frames, so that its memory is bounded."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_TIMES_KEPT)
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds.append(time.perf_counter() - self._start)

    def times(self) -> StageTimes:
        if not self._seconds:
            return StageTimes(0.0, 0.0)
        median, p95 = np.percentile(np.array(self._seconds) * 1000, [50, 95])
        return StageTimes(float(median), float(p95))


class _ClosedError(Exception):
    """Nothing more comes out of a channel."""


class _Channel(Generic[_Item]):
    """A bounded queue between one producer and one consumer that either side can end.

    Args:
        capacity: so many items wait at most.
        newest: replace what waits, instead of making the producer wait.
    """

    def __init__(self, capacity: int, *, newest: bool = False) -> None:
        self._items: deque[_Item] = deque()
        self._capacity = capacity
        self._newest = newest
        self._changed = threading.Condition()
        self._finished = False
        self.dropped = 0

    def put(self, item: _Item) -> bool:
        """Add an item, waiting for room; return False if it will not be taken any more."""
        with self._changed:
            if self._newest:
                while len(self._items) >= self._capacity:
                    self._items.popleft()
                    self.dropped += 1
            while len(self._items) >= self._capacity and not self._finished:
                self._changed.wait()
            if self._finished:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def get(self, timeout: float | None = None) -> _Item:
        """Take the oldest item, waiting for one.

        Raises:
            _ClosedError: there are none and there will be none.
            TimeoutError: none came in `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._finished, timeout):
                raise TimeoutError
            if not self._items:
                raise _ClosedError
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def finish(self, *, discard: bool = False) -> None:
        """Take no more items; what waits can still be taken, unless it is discarded."""
        with self._changed:
            self._finished = True
            if discard:
                self._items.clear()
            self._changed.notify_all()


class _Reader:
    """Reads ahead in its own thread; iterating it gives the frames, then raises what the source raised."""

    def __init__(self, source: Source, queue_size: int) -> None:
        self._source = source
        live = source.is_live
        self._channel: _Channel[Frame] = _Channel(1 if live else queue_size, newest=live)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="glip-reader", daemon=True)
        self.frames = 0
        self.clock = _Clock()

    @property
    def dropped(self) -> int:
        return self._channel.dropped

    def __enter__(self) -> _Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._source.close()
        # A read that hangs in a camera's driver cannot be ended; the thread is a daemon and holds only the camera.
        self._thread.join(_PATIENCE if self._source.is_live else None)

    def __iter__(self) -> Iterator[Frame]:
        patience = self._source.timeout + _PATIENCE if self._source.is_live else None
        while True:
            try:
                frame = self._channel.get(patience)
            except _ClosedError:
                if self._error is not None:
                    raise self._error from None
                return
            except TimeoutError:
                raise SourceLost(
                    f"{self._source.name}: no frame for {patience:g} s;"
                    " check that the camera is plugged in, or that the stream is running"
                ) from None
            yield frame

    def stop(self) -> None:
        """Forget what was read ahead and read no more."""
        self._channel.finish(discard=True)

    def _read(self) -> None:
        try:
            frames = iter(self._source)
            while True:
                with self.clock:
                    frame = next(frames, None)
                if frame is None:
                    return
                self.frames += 1
                if not self._channel.put(frame):
                    return
        except BaseException as error:
            self._error = error
        finally:
            # After an error, frames that were read but not taken yet are dropped.
            self._channel.finish(discard=self._error is not None)


class _Writer:
    """Hands frames to the sinks in its own thread; leaving it waits for that and raises what they raised."""

    def __init__(self, sinks: Sequence[Sink], queue_size: int, on_failure: Callable[[], None]) -> None:
        self._sinks = sinks
        self._on_failure = on_failure
        self._channel: _Channel[tuple[Frame, Detections]] = _Channel(queue_size)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="glip-writer", daemon=True)
        self._done = threading.Event()
        self.clock = _Clock()

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            self.finish()
        except BaseException:
            # A second Ctrl-C: drop what waits, but never leave a sink while it is being written to.
            self._channel.finish(discard=True)
            self._done.wait()
            raise
        # If the source or the detector failed first, that is the error to report.
        if self._error is not None and error is None:
            raise self._error

    def put(self, item: tuple[Frame, Detections]) -> bool:
        """Queue a frame, waiting for room; return False once writing has failed."""
        return self._channel.put(item)

    def finish(self) -> None:
        """Wait until everything queued is written, or writing has failed."""
        self._channel.finish()
        # The event first: Thread.join, once interrupted by Ctrl-C, takes the thread for ended (bpo-45274).
        self._done.wait()
        self._thread.join()

    def _write(self) -> None:
        try:
            while True:
                frame, found = self._channel.get()
                with self.clock:
                    for sink in self._sinks:
                        sink.write(frame, found)
        except _ClosedError:
            pass
        except BaseException as error:
            self._error = error
            self._on_failure()
        finally:
            self._channel.finish(discard=True)
            self._done.set()
