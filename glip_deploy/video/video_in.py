"""Video files, cameras and network streams, decoded by FFmpeg through PyAV."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import MissingPackage, SourceError, SourceLost
from glip_deploy.frames.geometry import ceil_div
from glip_deploy.video.base import Frame, Source

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from numpy.typing import NDArray

    from glip_deploy.video.address import Address

__all__ = ["VIDEO_SUFFIXES", "VideoSource", "import_av"]

log = logging.getLogger(__name__)
VIDEO_SUFFIXES = frozenset(
    [".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm"]
)
"""Suffixes of files that are taken for videos; compared in lower case."""
_MAX_READ_ERRORS = 100
_STALE_AFTER = 2.0


class VideoSource(Source):
    """A video file, a camera or a network stream, decoded by FFmpeg through PyAV.

    Frames before `first_frame`, which may be raised while the source is iterated, are decoded but not given.

    A live source gives every frame it has. Where detection cannot keep up, iterate it through
    `glip_deploy.video.run` or `detect_stream`, which keep only the newest frame.

    Args:
        address: what to open.
        stride: 1 gives every frame, 2 every second one, and so on; the others are decoded, but not converted to RGB.
        max_frames: how many frames are given at most; None for all.
        timeout: seconds to wait for a network peer, to connect and for each read.
        reconnect: how many times in a row a lost live source is opened again before it is an error.

    Raises:
        SourceError: it cannot be opened; while iterating, not one frame could be decoded.
        SourceLost: while iterating, a live source went away.
        MissingPackage: PyAV is not installed.
    """

    is_video = True
    first_frame: int = 0

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
        self.files = () if address.file is None else (address.file,)
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
            # The frames buffered since it was opened, while a model was loaded, are old or cut off.
            self._disconnect()
            self._connect()
        began = time.monotonic()
        index = -1
        given = passed = 0
        for picture in self._pictures():
            index += 1
            if picture is None or index % self.stride:
                continue
            if index < self.first_frame:
                passed += 1
                continue
            try:
                image = _rgb(picture)
            except (ArithmeticError, OSError, ValueError) as error:
                self._skip(f"{self.name}: frame {index} cannot be converted ({_reason(error)})")
                continue
            stamp = time.monotonic() - began if self.is_live else picture.time
            given += 1
            yield Frame(image=image, source=self.name, index=index, time=stamp)
            if given == self._max_frames:
                return
        if not given and not passed and not self._closing.is_set():
            raise SourceError(
                f"{self.name}: not one frame could be decoded ({self.skipped} failed);"
                " the file may be damaged, play it with ffplay to see, or export it again"
            )

    def close(self) -> None:
        """Close the file or device, waiting up to 2 s for a read in another thread to return."""
        self._closing.set()
        # Freeing a container during a read would crash; a read that hangs ends at its own time limit.
        if self._lock.acquire(timeout=2.0):
            try:
                self._disconnect()
            finally:
                self._lock.release()

    def count_packets(self) -> int:
        """Read a file to its end, decoding nothing, and return about how many frames it has.

        For one whose header does not say. The source cannot be iterated afterwards.

        Raises:
            OSError: it cannot be read (FFmpeg's errors are OSErrors or ValueErrors).
            ValueError: likewise.
        """
        assert self._container is not None
        return sum(1 for packet in self._container.demux(self._container.streams.video[0]) if packet.size)

    def _connect(self) -> None:
        av = import_av()
        limit = self.timeout if self._address.is_remote else None

        def connect() -> InputContainer:
            container: InputContainer = av.open(
                self._address.target,
                "r",
                format=self._address.format,
                options=dict(self._address.options),
                timeout=limit,
                metadata_errors="replace",
            )
            return container

        try:
            container = _in_thread(connect)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise SourceError(self._why_not_opened(error)) from error
        streams = container.streams.video
        if not streams or streams[0].codec_context is None:
            container.close()
            if streams:
                raise SourceError(
                    f"{self.name}: its pictures are in a format that FFmpeg does not know, or its header is damaged;"
                    " copy it again or convert it to mp4"
                )
            raise SourceError(f"{self.name}: holds no video, only sound or data; give a file with pictures")
        self._container = container
        self._connected = time.monotonic()
        # With threads across frames, a bad frame loses the good ones in flight; threads across slices lose none.
        streams[0].thread_type = "SLICE"

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
        # An address on the web that has a duration is a file, not a stream.
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
        """Give every picture in display order, and None in the place of one that could not be decoded."""
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
        """Open a lost stream again; return the number of the attempt that succeeded.

        Raises:
            SourceLost: none did.
        """
        self._disconnect()
        problem = f"{self.name}: lost after {frames} frames ({reason})"
        while attempt <= self._reconnect:
            log.warning("%s; opening it again, attempt %d of %d", problem, attempt, self._reconnect)
            if self._closing.wait(min(2.0 ** (attempt - 1), 10.0)):
                break
            try:
                self._connect()
            except SourceError as error:
                problem = str(error)
                attempt += 1
            else:
                return attempt
        raise SourceLost(f"{problem}; check the device or the network, or allow more reconnections")

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
                    demuxer = None  # a generator that raised is finished, but the file can be read on
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


def _in_thread(connect: Callable[[], InputContainer]) -> InputContainer:
    """Open a container in another thread: in this one, Ctrl-C would have no effect until FFmpeg's time limit."""
    opened: list[InputContainer] = []
    failed: list[BaseException] = []
    done = threading.Event()
    abandoned = threading.Event()

    def work() -> None:
        try:
            opened.append(connect())
            if abandoned.is_set():
                opened[0].close()
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="glip-open", daemon=True).start()
    try:
        while not done.wait(0.2):  # on Windows, only a wait with a time limit lets Ctrl-C through
            pass
    except BaseException:
        abandoned.set()
        raise
    if failed:
        raise failed[0]
    return opened[0]


def import_av() -> Any:
    """Return PyAV, which is an optional package: pictures need none.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingPackage(f'video needs PyAV ({error}); pip install "glip-deploy[video]"') from error
    return av


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
