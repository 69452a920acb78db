"""An annotated video, encoded by FFmpeg through PyAV."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import GlipError
from glip_deploy.files import check_file, check_folder, not_written, refuse_overwriting
from glip_deploy.video.base import Sink

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from glip_deploy.results.detections import Detections
    from glip_deploy.video.base import Frame

__all__ = ["VIDEO_SUFFIXES", "VideoSink"]

log = logging.getLogger(__name__)
VIDEO_SUFFIXES = frozenset((".m4v", ".mkv", ".mov", ".mp4"))
"""Names an annotated video may end in."""
_DEFAULT_FPS = 25.0
_FRAGMENTED = "frag_every_frame+empty_moov+default_base_moof"
_BT709 = 1  # FFmpeg's number for the colour space, the primaries and the transfer curve alike
_LIMITED_RANGE = 1


class VideoSink(Sink):
    """An annotated video: H.264 where FFmpeg has it, else MPEG-4; BT.709 colours; sides padded to even.

    It grows under its final name as a fragmented file, one fragment a frame, so that it can be played up to
    the last frame whenever the process dies. Once complete, an .mp4, .m4v or .mov is rewritten (copied, not
    encoded again) as an ordinary file with its index in front; should the disk have no room for that, the
    fragmented one stays. Nothing is touched before the first frame. Frames of another size are scaled to the
    first one's.

    Args:
        output: a file; see `VIDEO_SUFFIXES`.
        fps: frames per second of the source, before any stride; None for 25.
        stride: the stride of the source; the video has `fps / stride` frames per second and plays at the
            speed of the source.
        live: time frames by the clock, for a source that drops frames.
        make_folder: make the folder of `output` if need be.

    Raises:
        GlipError: it cannot be written there, or the name ends in something else.
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
        from glip_deploy.video.video_in import import_av

        import_av()
        self._path = Path(output)
        if self._path.suffix.lower() not in VIDEO_SUFFIXES:
            raise GlipError(f"video {output} does not end in {' or '.join(sorted(VIDEO_SUFFIXES))}; .mp4 is usual")
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

    def write(self, frame: Frame, detections: Detections) -> None:
        """Draw and encode one frame."""
        import av

        from glip_deploy.results.drawing import annotate

        picture = _even(annotate(frame.image, detections))
        try:
            if self._container is None:
                refuse_overwriting(frame.source, self._path)
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
        """Complete the file; after an exception too, as a video up to there is of use."""
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
                # Players stumble over the half fragment that a full disk leaves at the end.
                with suppress(OSError):
                    os.truncate(self._path, self._whole)
        if self._failed:
            return
        if self._path.suffix.lower() != ".mkv":
            self._defragment()

    @property
    def _time_base(self) -> Fraction:
        return Fraction(1, 1000) if self._live else 1 / self._rate

    def _clock(self, frame: Frame) -> float:
        """The frame's time in units of `_time_base`."""
        return (frame.time or 0.0) * 1000 if self._live else float(frame.index)

    def _open(self, width: int, height: int) -> None:
        import av

        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        options = {} if self._path.suffix.lower() == ".mkv" else {"movflags": _FRAGMENTED}
        container = av.open(str(self._path), "w", options={**options, "flush_packets": "1"})
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

        partial = self._path.with_name(f".{self._path.stem}.{os.getpid()}.part{self._path.suffix}")
        try:
            with (
                av.open(str(self._path)) as source,
                av.open(str(partial), "w", options={"movflags": "faststart"}) as target,
            ):
                stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(source.streams.video[0]):
                    if packet.dts is not None:
                        packet.stream = stream
                        target.mux(packet)
            partial.replace(self._path)
        except (av.FFmpegError, OSError) as error:
            log.warning("%s stays fragmented, which most players accept (%s)", self._path, error)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _even(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Repeat the last row or column where a side is odd: 4:2:0 video has one colour for two pixels."""
    height, width = picture.shape[:2]
    if not (height % 2 or width % 2):
        return picture
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
