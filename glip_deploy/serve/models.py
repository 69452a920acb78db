"""Open detectors, asked by many at once: frames wait in a bounded queue, and those with one prompt may go together.

A model has one thread for each clone of its detector. Everything that is awaited belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.detector import FrameStep
from glip_deploy.errors import ClosedError, GlipError
from glip_deploy.prompts.syntax import Phrases
from glip_deploy.serve.errors import QueueFull

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy.detector import Detector
    from glip_deploy.prompts.encoded import EncodedPrompt
    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.results.detections import Detections

__all__ = ["Found", "Model", "Places"]

log = logging.getLogger(__name__)
_ENCODERS = 2
"""Prompts that are encoded at once, so that a long list does not hold up a word."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a frame was found to hold.

    Attributes:
        detections: of each prompt.
        ms: milliseconds by stage: "queue", the wait for frames before this one, then each `FrameStep`.
        batch: frames that were looked at together.
    """

    detections: list[Detections]
    ms: dict[str, float]
    batch: int


@dataclass(eq=False)
class _Job:
    """A frame that waits for a detector."""

    image: NDArray[np.uint8]
    prompts: Sequence[EncodedPrompt]
    limits: Sequence[NDArray[np.float32]]
    max_detections: int | None
    asked: float = field(default_factory=time.perf_counter)
    answer: Future[Found] = field(default_factory=Future)

    @cached_property
    def key(self) -> Any:
        """What jobs that are looked at together have in common.

        GLIP sees the padding of a batch, so that frames of unequal size would get slightly other scores than alone.
        """
        return self.image.shape, self.max_detections, tuple(c.prompt.key for p in self.prompts for c in p.chunks)


class Model:
    """An open detector and the queue before it.

    Args:
        name: what clients call it.
        detector: closed by `close`.
        workers: frames, or batches, that are looked at at once, each by a clone of the detector.
        queue_size: frames that may wait.
        batch_size: most frames that are looked at together.
        batch_wait: seconds that a frame waits for others with the same prompt, once a worker is free for it.
        observe: is told of every batch: the number of its frames, and the seconds of each step. Called by workers.
    """

    def __init__(
        self,
        name: str,
        detector: Detector,
        *,
        workers: int = 1,
        queue_size: int = 64,
        batch_size: int = 1,
        batch_wait: float = 0.0,
        observe: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.name, self.detector = name, detector
        self.queue_size, self.batch_size, self.batch_wait = queue_size, batch_size, batch_wait
        self.observe = observe
        self._frame_s = 0.0
        self._lanes: tuple[deque[_Job], deque[_Job]] = (deque(), deque())  # requests; frames of the live page
        self._turn = 0
        self._changed = threading.Condition()
        self._closed = False
        self._prompts = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="glip-prompts")
        self._detectors = [detector, *(detector.clone() for _ in range(workers - 1))]
        self._threads = [
            threading.Thread(target=self._work, args=(one,), name=f"glip-frames-{i}", daemon=True)
            for i, one in enumerate(self._detectors)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Frames in the queue."""
        return sum(map(len, self._lanes))

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def pause(self) -> int:
        """Whole seconds, 1 to 60, after which half of a full queue is done, as far as is known."""
        return max(1, min(60, round(self.queue_size * self._frame_s / len(self._threads) / 2)))

    async def encode(self, text: PromptText, *, phrases: Phrases | str = Phrases.AUTO) -> EncodedPrompt:
        """Encode a prompt beside the frames that are looked at; see `Detector.encode`.

        Raises:
            ClosedError: the server ends.
            GlipError: what `Detector.encode` raises.
        """

        def encode() -> EncodedPrompt:
            return self.detector.encode(text, phrases=phrases)

        if self._closed:
            raise _ended()
        return await asyncio.get_running_loop().run_in_executor(self._prompts, encode)

    async def detect(
        self,
        image: NDArray[np.uint8],
        prompts: Sequence[EncodedPrompt],
        thresholds: Sequence[NDArray[np.float32]],
        max_detections: int | None = None,
    ) -> Found:
        """Find what prompts name in a frame, together with other frames that wait with the same prompts.

        Canceling it takes the frame out of the queue, if it still waits.

        Args:
            image: (H, W, 3) uint8 RGB.
            prompts: one or more; the backbone runs once, if the bundle is split.
            thresholds: (C,) float32 for each of them.
            max_detections: for each prompt; None for the bundle's number.

        Raises:
            QueueFull: `queue_size` frames wait already.
            ClosedError: the server ends.
            GlipError: what `Detector.detect_prompts` raises.
        """
        return await self._ask(_Job(image, prompts, thresholds, max_detections), 0)

    async def detect_prompts(
        self, image: NDArray[np.uint8], prompts: Sequence[EncodedPrompt], thresholds: Sequence[NDArray[np.float32]]
    ) -> tuple[list[Detections], dict[str, float]]:
        """Find what each of several prompts names in a frame of the live page: alone, and not behind all requests.

        Args:
            image: (H, W, 3) uint8 RGB.
            prompts: one or more; the backbone runs once, if the bundle is split.
            thresholds: (C,) float32 for each of them.

        Returns:
            The detections of each prompt, and milliseconds by stage, as in `Found`.

        Raises:
            GlipError: as `detect`.
        """
        found = await self._ask(_Job(image, prompts, thresholds, None), 1)
        return found.detections, found.ms

    def close(self) -> None:
        """Refuse what waits, finish the frames that are looked at, and free the engine's memory."""
        with self._changed:
            self._closed = True
            waiting = [job for lane in self._lanes for job in lane]
            for lane in self._lanes:
                lane.clear()
            self._changed.notify_all()
        for job in waiting:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(_ended())
        self._prompts.shutdown(cancel_futures=True)
        for thread in self._threads:
            thread.join()
        for one in reversed(self._detectors):
            one.close()

    async def _ask(self, job: _Job, lane: int) -> Found:
        with self._changed:
            if self._closed:
                raise _ended()
            if len(self._lanes[lane]) >= self.queue_size:
                raise QueueFull(self.queue_size, self.pause)
            self._lanes[lane].append(job)
            self._changed.notify()
        try:
            return await asyncio.wrap_future(job.answer)
        except asyncio.CancelledError:
            with self._changed, suppress(ValueError):
                self._lanes[lane].remove(job)
            raise

    # -- the workers' side --

    def _work(self, detector: Detector) -> None:
        while jobs := self._next():
            self._answer(detector, jobs)

    def _next(self) -> list[_Job]:
        """Wait for frames and return those that are looked at together; none at the end."""
        with self._changed:
            while True:
                while not self._closed and not any(self._lanes):
                    self._changed.wait()
                if self._closed:
                    return []
                if not self._lanes[self._turn]:
                    self._turn = 1 - self._turn
                taken, lane = self._turn, self._lanes[self._turn]
                self._turn = 1 - self._turn  # the lanes take turns
                job = lane.popleft()
                if not job.answer.set_running_or_notify_cancel():
                    continue
                jobs = [job]
                if taken == 0 and len(job.prompts) == 1:
                    self._gather(jobs)
                return jobs

    def _gather(self, jobs: list[_Job]) -> None:
        """Add frames that wait with the same prompt, or come soon."""
        key, until = jobs[0].key, time.monotonic() + self.batch_wait
        while True:
            for job in list(self._lanes[0]):
                if len(jobs) >= self.batch_size:
                    return
                if job.key == key:
                    self._lanes[0].remove(job)
                    if job.answer.set_running_or_notify_cancel():
                        jobs.append(job)
            left = until - time.monotonic()
            # What cannot join, and frames of the live page, do not wait for those that may come.
            if left <= 0 or len(jobs) >= self.batch_size or any(self._lanes) or self._closed:
                return
            self._changed.wait(left)

    def _answer(self, detector: Detector, jobs: list[_Job]) -> None:
        began = time.perf_counter()
        steps: dict[FrameStep, float] = {}
        try:
            found = _look(detector, jobs, steps)
        except Exception as error:
            if len(jobs) > 1:  # an engine may take fewer frames at once, or one frame be at fault
                if isinstance(error, GlipError):
                    log.warning("%d frames together failed (%s); they are looked at one by one", len(jobs), error)
                for job in jobs:
                    self._answer(detector, [job])
                return
            jobs[0].answer.set_exception(error)
            return
        seconds = {str(step.value): took for step, took in steps.items()}
        frame_s = sum(seconds.values()) / len(jobs)
        self._frame_s = frame_s if not self._frame_s else 0.8 * self._frame_s + 0.2 * frame_s
        if self.observe is not None:
            self.observe(len(jobs), seconds)
        stages = {name: 1000 * took for name, took in seconds.items()}
        for job, detections in zip(jobs, found, strict=True):
            job.answer.set_result(Found(detections, {"queue": 1000 * (began - job.asked), **stages}, len(jobs)))


class Places:
    """The requests that are under way, for all models together: so many, and no more.

    Args:
        most: of them.
        models: that are asked.
    """

    def __init__(self, most: int, models: Iterable[Model]) -> None:
        self._most, self._models = most, list(models)
        self.taken = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place for a request, from its body to its answer.

        Raises:
            QueueFull: there is none.
        """
        if self.taken >= self._most:
            raise QueueFull(self._most, max(model.pause for model in self._models))
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


def _look(detector: Detector, jobs: Sequence[_Job], steps: dict[FrameStep, float]) -> list[list[Detections]]:
    """Return the detections by job and prompt."""
    first = jobs[0]
    if len(first.prompts) > 1:
        limits = [limit.tolist() for limit in first.limits]
        return [
            detector.detect_prompts(
                first.image, first.prompts, limits, color="rgb", max_detections=first.max_detections, timings=steps
            )
        ]
    # Thresholds come after suppression and the limit of boxes, so that the lowest serve all.
    lowest = np.minimum.reduce([job.limits[0] for job in jobs])
    found = detector.detect_batch(
        [job.image for job in jobs],
        first.prompts[0],
        lowest.tolist(),
        color="rgb",
        max_detections=first.max_detections,
        timings=steps,
    )
    return [
        [one if len(jobs) == 1 else one[one.scores > job.limits[0][one.labels]]]
        for job, one in zip(jobs, found, strict=True)
    ]


def _ended() -> ClosedError:
    return ClosedError("the server is ending; ask another, or ask again when it is back")
