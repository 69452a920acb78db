"""An annotated video, encoded by FFmpeg through PyAV."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import OutputError
from glip_deploy.files import atomic_file, check_file, check_folder, check_outputs, not_written
from glip_deploy.results.drawing import annotate
from glip_deploy.video.address import file_url
from glip_deploy.video.base import Sink
from glip_deploy.video.video_in import import_av

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from glip_deploy.results.detections import Detections
    from glip_deploy.video.base import Frame, Source

__all__ = ["VIDEO_FORMATS", "VideoSink"]

log = logging.getLogger(__name__)
VIDEO_FORMATS = frozenset((".m4v", ".mkv", ".mov", ".mp4"))
"""Suffixes of an annotated video."""
_DEFAULT_FPS = 25.0
_FRAGMENTED = {"movflags": "frag_every_frame+empty_moov+default_base_moof"}
_CLUSTERED = {"cluster_time_limit": "1"}  # in ms; by default a frame of .mkv may wait 5 s to be written
_BT709 = 1  # FFmpeg's number for the color space, the primaries and the transfer curve alike
_LIMITED_RANGE = 1


class VideoSink(Sink):
    """An annotated video: H.264 where FFmpeg has it, else MPEG-4; BT.709 colors; sides padded to even.

    It grows under its final name with every frame a unit of its own (a fragment of .mp4, .m4v and .mov, a cluster of
    .mkv), so that it can be played up to the last or last but one frame whenever the process dies or the disk is full.
    Once complete, an .mp4, .m4v or .mov is rewritten (copied, not encoded again) as an ordinary file with its index in
    front; if the disk has no room for that, the fragmented one stays. Nothing is touched before the first frame. Frames
    of another size are scaled to the size of the first.

    Args:
        output: a file; see `VIDEO_FORMATS`.
        fps: frames per second of the source, before any stride; None for 25.
        stride: the stride of the source; the video has `fps / stride` frames per second and plays at the
            speed of the source.
        live: take the times of frames from the clock, for a source that drops frames.
        make_folder: make the folder of `output` if it does not exist.

    Raises:
        OutputError: it cannot be written there, or has another suffix.
        MissingPackage: PyAV is not installed.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        *,
        fps: float | None = None,
        stride: int = 1,
        live: bool = False,
        make_folder: bool = False,
    ) -> None:
        import_av()
        self._path = Path(output)
        if self._path.suffix.lower() not in VIDEO_FORMATS:
            raise OutputError(f"video {output} does not end in {' or '.join(sorted(VIDEO_FORMATS))}; .mp4 is usual")
        if make_folder:
            check_folder(self._path.parent)
        if self._path.parent.exists() or not make_folder:
            check_file(self._path)
        self._rate = Fraction(fps or _DEFAULT_FPS).limit_denominator(1001)
        self._stride = stride
        self._live = live
        self._container: Any = None
        self._stream: Any = None
        self._first = 0.0
        self._last = -1
        self._whole = 0
        self._failed = False

    def outputs(self, source: Source) -> Sequence[Path]:
        """Return the file."""
        return [self._path]

    def write(self, frame: Frame, detections: Detections) -> None:
        """Draw and encode one frame."""
        import av

        picture = _even(annotate(frame.image, detections))
        try:
            if self._container is None:
                check_outputs({Path(frame.source): "the source itself"}, [self._path])
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._open(picture.shape[1], picture.shape[0])
                self._first = self._clock(frame)
            video_frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                width=self._stream.width,
                height=self._stream.height,
                format="yuv420p",
                dst_colorspace=_BT709,
                dst_color_range=_LIMITED_RANGE,
            )
            # Encoders refuse a time that does not grow; a camera may give two frames in one tick.
            self._last = max(round(self._clock(frame) - self._first), self._last + 1)
            video_frame.pts = self._last
            video_frame.time_base = self._time_base
            self._container.mux(self._stream.encode(video_frame))
            self._whole = self._path.stat().st_size
        except (av.FFmpegError, OSError) as error:
            self._failed = True
            raise not_written(self._path, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the file; after an exception too, because the video up to there is useful."""
        import av

        container, self._container = self._container, None
        if container is None:
            return
        try:
            try:
                if not self._failed:
                    container.mux(self._stream.encode(None))
            finally:
                container.close()
        except (av.FFmpegError, OSError) as problem:
            self._failed = True
            if kind is None:
                raise not_written(self._path, problem) from problem
        finally:
            if self._failed:
                # Players stop with an error at the half frame that a full disk leaves at the end.
                with suppress(OSError):
                    os.truncate(self._path, self._whole)
        if self._failed:
            return
        if self._path.suffix.lower() != ".mkv" and self._path.is_file():
            self._defragment()

    @property
    def _time_base(self) -> Fraction:
        return Fraction(1, 1000) if self._live else 1 / self._rate

    def _clock(self, frame: Frame) -> float:
        """Return the frame's time in units of `_time_base`."""
        return (frame.time or 0.0) * 1000 if self._live else float(frame.index)

    def _open(self, width: int, height: int) -> None:
        import av

        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        options = _CLUSTERED if self._path.suffix.lower() == ".mkv" else _FRAGMENTED
        container = av.open(file_url(self._path), "w", options={**options, "flush_packets": "1"})
        try:
            stream: Any = container.add_stream(codec, rate=self._rate / self._stride)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.time_base = self._time_base
            context.gop_size = max(1, round(2 * self._rate / self._stride))
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED_RANGE
            if codec == "libx264":
                # No look-ahead: a frame that is written is on disk, not in the encoder.
                stream.options = {"preset": "veryfast", "tune": "zerolatency", "crf": "20"}
            else:
                context.bit_rate = max(1_000_000, int(width * height * float(self._rate) * 0.15))
        except BaseException:
            container.close()
            raise
        self._container, self._stream = container, stream

    def _defragment(self) -> None:
        import av

        try:
            with (
                atomic_file(self._path) as partial,
                av.open(file_url(self._path)) as source,
                av.open(file_url(partial), "w", options={"movflags": "faststart"}) as target,
            ):
                stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(source.streams.video[0]):
                    if packet.dts is not None:
                        packet.stream = stream
                        target.mux(packet)
        except (av.FFmpegError, OSError) as error:
            log.warning("%s stays fragmented, which most players accept (%s)", self._path, error)


def _even(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Repeat the last row or column where a side is odd: 4:2:0 video stores one color for each 2x2 pixels."""
    height, width = picture.shape[:2]
    if not (height % 2 or width % 2):
        return picture
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
