"""The server's source looked at by one model for all who watch: the backbone once a frame, a head for each prompt.

Every visitor gets the newest frame when ready for it. A frame waits for nobody: who is still drawing, or on a
slow line, is passed over and gets a later one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from glip_deploy.errors import GlipError
from glip_deploy.results.detections import Detections
from glip_deploy.serve.errors import QueueFull

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy.prompts.encoded import EncodedPrompt
    from glip_deploy.serve.models import Model
    from glip_deploy.serve.sources import SharedFrame, SharedSource
    from glip_deploy.serve.tracks import Tracks

__all__ = ["Broadcast", "Taken", "Watcher"]

log = logging.getLogger(__name__)
_HEADS = 8
"""Prompts, or chunks of long ones, that a frame is compared with in one turn; who is left over gets the next frame."""
_AFTER_ERROR_S = 0.5


@dataclass(frozen=True, eq=False)
class Taken:
    """A visitor's prompt, encoded.

    Attributes:
        id: the visitor's number for it.
        encoded: the prompt.
        limits: (C,) float32, what a score of each class must exceed.
    """

    id: int
    encoded: EncodedPrompt
    limits: NDArray[np.float32]


class Watcher(Protocol):
    """What the broadcast needs of a visitor."""

    taken: Taken | None
    """The prompt, or None to see the picture alone."""
    tracks: Tracks | None
    """What follows the objects in the picture, if they are followed."""
    dropped: int
    last_number: int
    """The number of the last frame of the source that was sent; 0 before the first."""

    @property
    def ready(self) -> bool:
        """Whether another frame can be taken now."""
        ...

    def show(
        self, frame: SharedFrame, jpeg: bytes, taken: Taken | None, found: Detections, ms: dict[str, float]
    ) -> None:
        """Send a frame and what was found in it."""
        ...

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message."""
        ...


class Broadcast:
    """One model at the server's source. It looks while somebody watches.

    Args:
        model: what detects.
        source: what is watched.
    """

    def __init__(self, model: Model, source: SharedSource) -> None:
        self._model, self._source = model, source
        self._watchers: dict[Watcher, None] = {}  # in the order of their last frames
        self._woken = asyncio.Event()
        self._told = ""
        self._task: asyncio.Task[None] | None = None

    def add(self, watcher: Watcher) -> None:
        """Let a visitor watch."""
        watcher.last_number = 0
        self._watchers[watcher] = None
        if self._told:
            watcher.tell({"type": "source", "message": self._told})
        if self._task is None:
            self._task = asyncio.create_task(self._look())
        self.wake()

    def remove(self, watcher: Watcher) -> None:
        """End the watching; nothing happens if there was none."""
        self._watchers.pop(watcher, None)
        if not self._watchers and self._task is not None:
            self._task.cancel()
            self._task, self._told = None, ""

    def wake(self) -> None:
        """Look again who is ready."""
        self._woken.set()

    async def _look(self) -> None:
        with self._source.watched():
            number = 0
            while True:
                await self._somebody_ready()
                self._tell_trouble()
                frame = await self._source.newer(number)
                self._tell_trouble()
                if frame is None:
                    continue
                number = frame.number
                try:
                    await self._turn(frame)
                except QueueFull:  # too many visitors' own frames wait; this one is dropped
                    await asyncio.sleep(_AFTER_ERROR_S)
                except GlipError as error:
                    await self._fail(str(error))
                except Exception:
                    log.exception("a frame of %s could not be looked at", self._source.name)
                    await self._fail("detection failed; the server's log says how")

    async def _fail(self, message: str) -> None:
        for watcher in self._watchers:
            watcher.tell({"type": "error", "about": "frame", "id": None, "message": message})
        await asyncio.sleep(_AFTER_ERROR_S)

    def _tell_trouble(self) -> None:
        if self._source.trouble != self._told:
            self._told = self._source.trouble
            for watcher in self._watchers:
                watcher.tell({"type": "source", "message": self._told})

    async def _somebody_ready(self) -> None:
        while not any(watcher.ready for watcher in self._watchers):
            self._woken.clear()
            await self._woken.wait()

    def _due(self) -> list[tuple[Watcher, Taken | None]]:
        """Return who gets this frame, with the prompt as it is now: those first who have waited longest."""
        due: list[tuple[Watcher, Taken | None]] = []
        known: set[Any] = set()
        for watcher in self._watchers:
            if not watcher.ready:
                continue
            keys = set() if watcher.taken is None else set(_keys(watcher.taken.encoded))
            if known and len(known | keys) > _HEADS:
                continue
            known |= keys
            due.append((watcher, watcher.taken))
        return due

    async def _turn(self, frame: SharedFrame) -> None:
        due = self._due()
        jpeg = asyncio.ensure_future(frame.jpeg())
        prompts: dict[Any, EncodedPrompt] = {}
        lowest: dict[Any, NDArray[np.float32]] = {}
        for watcher, taken in due:
            if taken is not None:
                key = _keys(taken.encoded)
                prompts.setdefault(key, taken.encoded)
                limits = taken.limits if watcher.tracks is None else watcher.tracks.limits(taken)
                lowest[key] = np.minimum(lowest.get(key, limits), limits)
        wait = 1000 * (time.monotonic() - frame.at)
        found: dict[Any, Detections] = {}
        ms: dict[str, float] = {}
        try:
            if prompts:
                asked = [lowest[key] for key in prompts]
                answers, ms = await self._model.detect_prompts(frame.image, list(prompts.values()), asked)
                found = dict(zip(prompts, answers, strict=True))
            owns = await self._owns(due, found, frame, ms)
            picture = await jpeg
        finally:
            jpeg.cancel()  # nothing if it is done; others who wait for the frame's JPEG are not disturbed
        for (watcher, taken), own in zip(due, owns, strict=True):
            if watcher not in self._watchers:  # left meanwhile
                continue
            if watcher.last_number:
                watcher.dropped += frame.number - watcher.last_number - 1
            watcher.last_number = frame.number
            del self._watchers[watcher]
            self._watchers[watcher] = None
            watcher.show(frame, picture, taken, own, {"wait": wait, **ms})

    async def _owns(
        self,
        due: list[tuple[Watcher, Taken | None]],
        found: dict[Any, Detections],
        frame: SharedFrame,
        ms: dict[str, float],
    ) -> list[Detections]:
        """Return what each visitor sees of what was found; the time that tracking takes is added to `ms`."""

        def own(watcher: Watcher, taken: Taken | None) -> Detections:
            if taken is None:
                return Detections.empty()
            # Thresholds come after NMS and the limit of boxes, so one answer serves all thresholds above its own.
            of_prompt = found[_keys(taken.encoded)]
            if watcher.tracks is None:
                return of_prompt[of_prompt.scores > taken.limits[of_prompt.labels]]
            return watcher.tracks.follow(of_prompt, taken, self, frame.time)

        def all_of_them() -> list[Detections]:
            return [own(watcher, taken) for watcher, taken in due]

        if not found or all(watcher.tracks is None for watcher, _ in due):
            return all_of_them()
        began = time.monotonic()
        owns = await asyncio.to_thread(all_of_them)
        ms["tracking"] = 1000 * (time.monotonic() - began)
        return owns


def _keys(encoded: EncodedPrompt) -> tuple[str, ...]:
    """Return what tells prompts apart: the same words with the same labels are one."""
    return tuple(chunk.prompt.key for chunk in encoded.chunks)
