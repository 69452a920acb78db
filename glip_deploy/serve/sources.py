"""The source that the server itself reads: once for all who watch it, and each gets the newest frame."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.errors import GlipError, SourceLost

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.video.base import Frame, Source

__all__ = ["SharedFrame", "SharedSource"]

log = logging.getLogger(__name__)
_RETRY_S = 2.0
"""Seconds after which a source that was lost is opened again."""
_PATIENCE_S = 3.0
_PICTURE_S = 2.0
"""How long each picture of a folder is shown."""
_SHOWN_SIDE = 1280
"""Longest side, in pixels, of the JPEG that visitors see; what is looked for is looked for in the frame itself."""
_QUALITY = 80


@dataclass(eq=False)
class SharedFrame:
    """A frame of the source, as all visitors get it.

    Attributes:
        number: counts the frames that were published, from 1.
        image: (H, W, 3) uint8 RGB.
        index: its place in the source; see `glip_deploy.video.base.Frame`.
        at: `time.monotonic` when it was published.
        time: seconds from the start of the source; those of a video that starts again start again too.
    """

    number: int
    image: NDArray[np.uint8]
    index: int
    at: float
    time: float
    _jpeg: asyncio.Task[bytes] | None = field(default=None, repr=False)

    async def jpeg(self) -> bytes:
        """Return the frame as JPEG, its longest side at most 1280 pixels; compressed once, by the first who asks."""
        if self._jpeg is None:
            self._jpeg = asyncio.create_task(asyncio.to_thread(_jpeg_of, self.image))
        # A visitor who leaves meanwhile does not take it from the others.
        return await asyncio.shield(self._jpeg)


class SharedSource:
    """A video, a camera, a stream or pictures, read by one thread while anybody watches.

    A file plays at its own pace and starts again at its end; while nobody watches it stands still. A camera or a
    stream is opened when the first comes and closed when the last goes. One that is lost is opened again, every two
    seconds, for as long as somebody watches; `trouble` says meanwhile what is wrong.

    All methods but `check` belong to one event loop.

    Args:
        spec: as `glip_deploy.video.open_source` takes it.
        timeout: seconds after which a camera or a peer that stays silent counts as lost.
    """

    def __init__(self, spec: str, *, timeout: float = 10.0) -> None:
        self._spec, self._timeout = spec, timeout
        self.name = self._opened_name = spec
        self.trouble = ""
        self._frame: SharedFrame | None = None
        self._published = 0
        self._changed = asyncio.Condition()
        self._watchers = 0
        self._reader: _Reader | None = None
        self._logged = ""
        self._began = 0.0
        self._live = False

    def check(self, *, track: bool = False) -> None:
        """Open the source, to learn its name and whether it can be read, and close it again.

        Args:
            track: objects are to be followed through it.

        Raises:
            SourceError: it does not exist or cannot be opened.
            FrameError: it is a picture that cannot be read.
            MissingPackage: it is a video, and PyAV is not installed.
            OptionError: it is pictures, through which nothing can be followed.
        """
        from glip_deploy.video.open import open_source
        from glip_deploy.video.tracking import Tracker

        with open_source(self._spec, timeout=self._timeout) as source:
            if track:
                Tracker.check(source)
            self._opened_name, self._live = source.name, source.is_live
            # Visitors learn the name of a file, not where it is.
            self.name = source.name if source.is_live or not Path(self._spec).exists() else Path(self._spec).name
            if not source.is_live:
                next(iter(source), None)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Read the source while the block runs."""
        self._watchers += 1
        if self._watchers == 1:
            self._began, self.trouble = time.monotonic(), ""
            if self._reader is None:
                self._reader = _Reader(self, asyncio.get_running_loop())
            self._reader.resume()
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers and self._reader is not None:
                if self._live:
                    self._reader.stop()
                    self._reader = self._frame = None
                else:
                    self._reader.rest()

    def close(self) -> None:
        """Stop reading."""
        if self._reader is not None:
            self._reader.stop()
            self._reader = None

    async def newer(self, number: int) -> SharedFrame | None:
        """Wait for a frame after the one of this number, or until `trouble` changes, and then return None."""
        trouble = self.trouble
        async with self._changed:
            while True:
                if self._frame is not None and self._frame.number > number:
                    return self._frame
                if self.trouble != trouble:
                    return None
                try:
                    # Not wait_for, which before Python 3.12 goes on when it is canceled at the moment of a frame.
                    async with asyncio.timeout(1.0):
                        await self._changed.wait()
                except TimeoutError:
                    self._notice_silence()

    def _notice_silence(self) -> None:
        """Say so if a camera or a stream gives no frames: its reader may hang in a driver."""
        patience = self._timeout + _PATIENCE_S
        last = max(self._began, self._frame.at if self._frame else 0.0)
        if self._live and not self.trouble and time.monotonic() - last > patience:
            self.trouble = str(
                SourceLost(
                    f"{self.name}: no frame for {patience:g} s;"
                    " check that the camera is plugged in, or that the stream is running"
                )
            )

    async def _publish(self, reader: _Reader, frame: Frame | None, moment: float, trouble: str) -> None:
        if reader is not self._reader:
            return
        async with self._changed:
            if frame is not None:
                self._published += 1
                self._frame = SharedFrame(self._published, frame.image, frame.index, time.monotonic(), moment)
            if trouble and trouble != self._logged:
                log.warning("%s; it is opened again while somebody watches", trouble)
            self._logged = trouble
            self.trouble = trouble.replace(self._opened_name, self.name)
            self._changed.notify_all()


class _Reader:
    """The thread that reads, and hands each frame to the event loop, which keeps the newest."""

    def __init__(self, shared: SharedSource, loop: asyncio.AbstractEventLoop) -> None:
        self._shared, self._loop = shared, loop
        self._stopped = threading.Event()
        self._awake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="glip-source", daemon=True)

    def resume(self) -> None:
        """Read, or go on reading."""
        self._awake.set()
        if not self._thread.is_alive() and not self._stopped.is_set():
            self._thread.start()

    def rest(self) -> None:
        """Stand still until `resume`."""
        self._awake.clear()

    def stop(self) -> None:
        """End for good. A read that hangs in a driver cannot be ended; the thread is a daemon and holds only that."""
        self._stopped.set()
        self._awake.set()

    def _run(self) -> None:
        from glip_deploy.video.open import open_source

        while not self._stopped.is_set():
            try:
                with open_source(self._shared._spec, timeout=self._shared._timeout) as source:
                    self._follow(source)
                    if source.is_live and not self._stopped.is_set():
                        raise SourceLost(f"{source.name}: it ended; check the device or the network")
            except GlipError as error:
                self._publish(trouble=str(error))
                self._stopped.wait(_RETRY_S)
            except Exception:  # a decoder may raise anything; the source is opened again as after any loss
                log.exception("%s: reading failed", self._shared.name)
                self._publish(trouble=f"{self._shared.name}: reading failed; the server's log says how")
                self._stopped.wait(_RETRY_S)

    def _follow(self, source: Source) -> None:
        """Publish every frame of a source, those of a file when they are due."""
        began = time.monotonic()
        for count, frame in enumerate(source):
            if source.is_live:
                moment = time.monotonic() - began if frame.time is None else frame.time
            elif source.is_video:
                moment = frame.index / (source.fps or 25.0) if frame.time is None else frame.time
            else:
                moment = count * _PICTURE_S
            if not source.is_live:
                self._stopped.wait(max(0.0, began + moment - time.monotonic()))
                if not self._awake.is_set():
                    slept = time.monotonic()
                    self._awake.wait()
                    began += time.monotonic() - slept
            if self._stopped.is_set():
                return
            self._publish(frame, moment)
        if not source.is_video:
            self._stopped.wait(_PICTURE_S)

    def _publish(self, frame: Frame | None = None, moment: float = 0.0, trouble: str = "") -> None:
        publish = self._shared._publish(self, frame, moment, trouble)
        try:
            # Waiting for it keeps frames from piling up where the loop is busy.
            asyncio.run_coroutine_threadsafe(publish, self._loop).result()
        except RuntimeError:  # the loop is closed: the server has ended
            publish.close()
            self._stopped.set()


def _jpeg_of(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.BILINEAR)
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=_QUALITY)
    return written.getvalue()
