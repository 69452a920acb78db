"""Video files, cameras and network streams, decoded by FFmpeg through PyAV."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import GlipError
from glip_deploy.frames.geometry import ceil_div
from glip_deploy.video.base import Frame, Source

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from numpy.typing import NDArray

__all__ = ["Address", "VideoSource", "import_av", "live_address"]

log = logging.getLogger(__name__)
_URL = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_MAX_READ_ERRORS = 100
_STALE_AFTER = 2.0


@dataclass(frozen=True)
class Address:
    """What to hand to FFmpeg, and how it is to be treated."""

    target: str
    name: str
    format: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    is_live: bool = False
    is_remote: bool = False


class VideoSource(Source):
    """A video file, a camera or a network stream, decoded by FFmpeg through PyAV.

    A live source gives every frame it has; whoever cannot keep up should iterate it through
    `glip_deploy.video`, which keeps only the newest.

    Args:
        address: what to open.
        stride: every how manyeth frame is given; the others are decoded, but not converted to RGB.
        max_frames: how many frames are given at most; None for all.
        timeout: seconds to wait for a network peer, to connect and for each read.
        reconnect: how often in a row a lost live source is opened again before it is an error.

    Raises:
        GlipError: it cannot be opened; while iterating, not one frame could be decoded, or a live source
            went away.
    """

    is_video = True

    def __init__(
        self,
        address: Address,
        *,
        stride: int = 1,
        max_frames: int | None = None,
        timeout: float = 10.0,
        reconnect: int = 0,
    ) -> None:
        super().__init__()
        self.name = address.name
        self.stride = stride
        self.timeout = timeout
        self._address = address
        self._max_frames = max_frames
        self._reconnect = reconnect
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._container: InputContainer | None = None
        self._connect()
        self._describe()

    def __iter__(self) -> Iterator[Frame]:
        if self.is_live and time.monotonic() - self._connected > _STALE_AFTER:
            # What waited in the buffers since opening (a model was loaded meanwhile) is old, or cut off.
            self._disconnect()
            self._connect()
        began = time.monotonic()
        index = -1
        given = 0
        for picture in self._pictures():
            index += 1
            if picture is None or index % self.stride:
                continue
            image = _rgb(picture)
            stamp = time.monotonic() - began if self.is_live else picture.time
            given += 1
            yield Frame(image=image, source=self.name, index=index, time=stamp)
            if given == self._max_frames:
                return
        if not given and not self._closing.is_set():
            raise GlipError(
                f"{self.name}: not one frame could be decoded ({self.skipped} failed);"
                " the file may be damaged, play it with ffplay to see, or export it again"
            )

    def close(self) -> None:
        """Close the file or device, waiting for a read in another thread to come back."""
        self._closing.set()
        # Freeing a container under a read that hangs would crash; such a reader is left to its time limit.
        if self._lock.acquire(timeout=2.0):
            try:
                self._disconnect()
            finally:
                self._lock.release()

    def _connect(self) -> None:
        av = import_av()
        limit = self.timeout if self._address.is_remote else None
        try:
            container = av.open(
                self._address.target,
                "r",
                format=self._address.format,
                options=dict(self._address.options),
                timeout=limit,
                metadata_errors="replace",
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            raise GlipError(self._why_not_opened(error)) from error
        if not container.streams.video:
            container.close()
            raise GlipError(f"{self.name}: holds no video, only sound or data; give a file with pictures")
        self._container = container
        self._connected = time.monotonic()
        # Threads across frames lose the good frames in flight when one is bad; slices do not.
        container.streams.video[0].thread_type = "SLICE"

    def _disconnect(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def _describe(self) -> None:
        assert self._container is not None
        stream = self._container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        if rate and 0 < rate <= 1000:  # some streams announce their 90 kHz clock instead
            self.fps = float(rate)
        if stream.codec_context.width and stream.codec_context.height:
            self.size = (stream.codec_context.width, stream.codec_context.height)
        # An address on the web is a file like any other if it knows how long it is.
        seconds = None if self._container.duration is None else self._container.duration / 1e6
        self.is_live = self._address.is_live or (self._address.is_remote and seconds is None)
        self._announced = 0 if self.is_live else stream.frames
        count: int | None = self._announced or None
        if count is None and not self.is_live and self.fps and seconds:
            count = max(1, round(seconds * self.fps))
        if count is not None:
            count = ceil_div(count, self.stride)
        if self._max_frames is not None:
            count = self._max_frames if count is None else min(count, self._max_frames)
        self.frame_count = count

    def _pictures(self) -> Iterator[VideoFrame | None]:
        """Every picture in display order; None stands in the place of one that could not be decoded."""
        count = 0
        attempt = 0
        while True:
            broken = ""
            try:
                for picture in self._decoded():
                    count += 1
                    attempt = 0
                    yield picture
            except _ReadError as error:
                broken = str(error)
            if self._closing.is_set():
                return
            # A stream on the web may end; a camera may not.
            if self._address.is_live or (self.is_live and broken):
                attempt = self._come_back(attempt + 1, count, broken or "the stream ended")
                continue
            if broken:
                log.warning("%s: reading stopped after %d frames (%s)", self.name, count, broken)
            elif count < self._announced:
                log.warning(
                    "%s: its header announces %d frames, %d were found; it may be cut short",
                    self.name,
                    self._announced,
                    count,
                )
            return

    def _come_back(self, attempt: int, frames: int, reason: str) -> int:
        """Open a lost stream again, or give up; returns the number of the attempt that succeeded."""
        self._disconnect()
        problem = f"{self.name}: lost after {frames} frames ({reason})"
        while attempt <= self._reconnect:
            log.warning("%s; opening it again, attempt %d of %d", problem, attempt, self._reconnect)
            if self._closing.wait(min(2.0 ** (attempt - 1), 10.0)):
                break
            try:
                self._connect()
            except GlipError as error:
                problem = str(error)
                attempt += 1
            else:
                return attempt
        raise GlipError(f"{problem}; check the device or the network, or allow more reconnections")

    def _decoded(self) -> Iterator[VideoFrame | None]:
        import av

        errors = 0
        packets = 0
        demuxer: Iterator[Any] | None = None
        while not self._closing.is_set():
            with self._lock:
                if self._container is None:
                    return
                if demuxer is None:
                    demuxer = self._container.demux(self._container.streams.video[0])
                try:
                    packet = next(demuxer, None)
                except (av.FFmpegError, OSError) as error:
                    if self.is_live or errors == _MAX_READ_ERRORS:
                        raise _ReadError(_reason(error, self.timeout)) from error
                    errors += 1
                    demuxer = None  # a generator that raised is spent, the file behind it is not
                    self._skip(f"{self.name}: data after packet {packets} cannot be read ({_reason(error)})")
                    continue
                if packet is None:
                    return
                errors = 0
                packets += 1
                pictures: list[VideoFrame | None]
                try:
                    pictures = list(packet.decode())
                except (av.FFmpegError, ValueError) as error:
                    pictures = [None]
                    self._skip(f"{self.name}: packet {packets - 1} cannot be decoded ({_reason(error)})")
            yield from pictures

    def _why_not_opened(self, error: Exception) -> str:
        reason = _reason(error, self.timeout)
        if self._address.format is not None:
            advice = "check that the camera is plugged in, not in use, and that you may read it"
        elif self._address.is_remote:
            advice = "check the address, the user and password in it, and that the host can be reached"
        else:
            advice = "it may be truncated or no video at all; copy it again or convert it to mp4"
        return f"{self.name}: cannot be opened as a video ({reason}); {advice}"


class _ReadError(Exception):
    """The stream broke off while it was read."""


def import_av() -> Any:
    """Return PyAV, which is an extra: pictures do without.

    Raises:
        GlipError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise GlipError(f'video needs PyAV ({error}); pip install "glip-deploy[video]"') from error
    return av


def live_address(text: str) -> Address | None:
    """Recognise what cannot be a file: a camera or an address; None for anything else."""
    if text.lower().startswith("file://"):
        return Address(target=text, name=text)
    if _URL.match(text):
        name = re.sub(r"//[^/@]*@", "//***@", text)
        if text.lower().startswith(("rtsp://", "rtsps://")):
            # UDP loses packets, which shows as smeared pictures; TCP does not.
            return Address(text, name, options={"rtsp_transport": "tcp"}, is_live=True, is_remote=True)
        on_the_web = text.lower().startswith(("http://", "https://"))
        return Address(text, name, is_live=not on_the_web, is_remote=True)
    if text.isdecimal() and not Path(text).exists():
        return _camera(text)
    if text.startswith("/dev/video") or (text.startswith("video=") and sys.platform == "win32"):
        return Address(text, text, format="dshow" if sys.platform == "win32" else "v4l2", is_live=True)
    return None


def _camera(number: str) -> Address:
    name = f"camera {number}"
    if sys.platform == "darwin":
        return Address(number, name, format="avfoundation", options={"framerate": "30"}, is_live=True)
    if sys.platform == "win32":
        raise GlipError(f'{name}: cameras have names on Windows; give "video=NAME", with NAME from the Device Manager')
    return Address(f"/dev/video{number}", name, format="v4l2", is_live=True)


def _rgb(picture: VideoFrame) -> NDArray[np.uint8]:
    image: NDArray[Any] = picture.to_ndarray(format="rgb24")
    turns = round(getattr(picture, "rotation", 0) / 90) % 4  # degrees anticlockwise, from the display matrix
    return np.ascontiguousarray(np.rot90(image, turns) if turns else image)


def _reason(error: Exception, timeout: float | None = None) -> str:
    import av

    if timeout is not None and isinstance(error, av.error.ExitError | TimeoutError):
        return f"no answer within {timeout:g} s"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
