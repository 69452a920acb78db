"""Where detections go: annotated pictures, an annotated video, JSON lines, COCO results.

A sink is a context manager with one method, `write(frame, detections)`. Making one already checks that its
output can be written, without touching what is there; entering it opens it; leaving it completes it. Leaving
it because of an exception keeps what is whole (pictures, lines, a video up to there) and nothing else.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from glip_deploy.errors import GlipError
from glip_deploy.prompt_text import fold

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from numpy.typing import NDArray

    from glip_deploy.detections import Detections
    from glip_deploy.sources import Frame

__all__ = [
    "PICTURE_FORMATS",
    "VIDEO_SUFFIXES",
    "CocoSink",
    "JsonLinesSink",
    "PictureSink",
    "Sink",
    "VideoSink",
    "read_coco_names",
    "refuse_overwriting",
]

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset((".m4v", ".mkv", ".mov", ".mp4"))
"""Names an annotated video may end in."""

PICTURE_FORMATS = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG"}
"""Names an annotated picture may end in, and what Pillow calls the format."""

_DEFAULT_FPS = 25.0
_FRAGMENTED = "frag_every_frame+empty_moov+default_base_moof"
_BT709 = 1  # FFmpeg's number for the colour space, the primaries and the transfer curve alike
_LIMITED_RANGE = 1


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


class PictureSink(Sink):
    """Annotated pictures, JPEG or PNG by the end of the name; a picture is there whole or not at all.

    Args:
        output: a file, for a single picture; or a folder, made if need be, in which each picture keeps its
            name (with .png added if it was neither JPEG nor PNG).
        folder: whether `output` is a folder.
        root: the part of a source path that is not repeated inside the folder.

    Raises:
        GlipError: it cannot be written there, or the name ends in something else.
    """

    def __init__(self, output: str | os.PathLike[str], *, folder: bool = False, root: Path | None = None) -> None:
        self._output = Path(output)
        self._folder = folder
        self._root = root
        if folder:
            _check_folder(self._output)
        else:
            if self._output.suffix.lower() not in PICTURE_FORMATS:
                raise GlipError(f"picture {output} does not end in {' or '.join(PICTURE_FORMATS)}; choose one of them")
            _check_file(self._output)

    def write(self, frame: Frame, detections: Detections) -> None:
        """Draw and save one picture."""
        from PIL import Image

        from glip_deploy.draw import annotate

        path = self._path(frame.source) if self._folder else self._output
        refuse_overwriting(frame.source, path)
        picture = Image.fromarray(annotate(frame.image, detections))
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = PICTURE_FORMATS[path.suffix.lower()]
            options = {"quality": 92, "subsampling": 0} if kind == "JPEG" else {"compress_level": 3}
            picture.save(partial, format=kind, **options)
            partial.replace(path)
        except OSError as error:
            raise _not_written(path, error) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Every picture is complete already."""

    def _path(self, source: str) -> Path:
        name = Path(source)
        relative = Path(name.name)
        if self._root is not None and name.is_relative_to(self._root):
            relative = name.relative_to(self._root)
        if relative.suffix.lower() not in PICTURE_FORMATS:
            relative = relative.with_name(f"{relative.name}.png")
        return self._output / relative


class JsonLinesSink(Sink):
    """One JSON object a frame and line, flushed at once, so that a reader at the other end follows live.

    {"source", "frame", "width", "height", "detections": [{"score", "label", "box": {"xmin", "ymin", "xmax",
    "ymax"}}]}, boxes in pixels of the frame. On a full disk a file keeps its whole lines.

    Args:
        output: a file, or "-" for standard output.

    Raises:
        GlipError: it cannot be written there.
    """

    def __init__(self, output: str | os.PathLike[str]) -> None:
        self._to_stdout = str(output) == "-"
        self._path = Path(output)
        self._file: IO[bytes] | None = None
        self._whole = 0
        if not self._to_stdout:
            _check_file(self._path)

    def __enter__(self) -> Self:
        if not self._to_stdout:
            try:
                self._file = self._path.open("wb", buffering=0)
            except OSError as error:
                raise _not_written(self._path, error) from error
        return self

    def write(self, frame: Frame, detections: Detections) -> None:
        """Write one line.

        Raises:
            BrokenPipeError: whoever read standard output has gone.
            GlipError: it cannot be written.
        """
        height, width = frame.image.shape[:2]
        line = json.dumps(
            {
                "source": frame.source,
                "frame": frame.index,
                "width": width,
                "height": height,
                "detections": detections.to_dicts(),
            },
            ensure_ascii=False,
        )
        if self._file is None:
            self._write_stdout(line + "\n")
            return
        data = (line + "\n").encode("utf-8", errors="replace")
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._whole)
            raise _not_written(self._path, error) from error
        self._whole += len(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @staticmethod
    def _write_stdout(line: str) -> None:
        try:
            sys.stdout.write(line)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except UnicodeEncodeError:  # a terminal that is not UTF-8; JSON can say the same in ASCII
            sys.stdout.write(json.dumps(json.loads(line)) + "\n")
            sys.stdout.flush()
        except OSError as error:
            raise _not_written(Path("standard output"), error) from error


class CocoSink(Sink):
    """COCO results: one JSON list, written when the run is over, whole or not at all.

    The image_id of a picture is, in this order: the id of its file name in the COCO annotations given; the
    number its name consists of, as in 000000000139.jpg, if all pictures have one and no two the same; its
    `Frame.index`. Holds all detections in memory until the end.

    Args:
        output: a file.
        categories: class name -> category_id; without it, a class is its place in the prompt, from 1.
        image_ids: file name -> image_id, from a COCO annotation file.

    Raises:
        GlipError: it cannot be written there; while writing, a class that has no category.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        *,
        categories: Mapping[str, int] | None = None,
        image_ids: Mapping[str, int] | None = None,
    ) -> None:
        self._path = Path(output)
        self._categories = None if categories is None else {fold(name): number for name, number in categories.items()}
        self._image_ids = dict(image_ids or {})
        self._results: list[tuple[str, int, Detections]] = []
        _check_file(self._path)

    def write(self, frame: Frame, detections: Detections) -> None:
        """Remember one frame's detections."""
        self._results.append((frame.source, frame.index, detections))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the list, unless there was an exception."""
        if kind is not None:
            return
        numbers = self._numbers()
        entries: list[dict[str, Any]] = []
        for number, (_, _, detections) in zip(numbers, self._results, strict=True):
            entries.extend(detections.to_coco(number, self._category_ids(detections)))
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump(entries, file)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
        except OSError as problem:
            raise _not_written(self._path, problem) from problem
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        stems = [Path(source).stem for source, _, _ in self._results]
        numeric = all(stem.isdecimal() for stem in stems)
        own = [int(stem) for stem in stems] if numeric else []
        distinct = numeric and len(set(own)) == len(own)
        return [
            self._image_ids.get(Path(source).name, own[i] if distinct else index)
            for i, (source, index, _) in enumerate(self._results)
        ]

    def _category_ids(self, detections: Detections) -> list[int] | None:
        if self._categories is None:
            return None
        ids = [0] * (1 + max(detections.labels.tolist(), default=-1))
        for label, phrase in zip(detections.labels.tolist(), detections.phrases, strict=True):
            ids[label] = self.category_of(phrase)
        return ids

    def category_of(self, phrase: str) -> int:
        """Return the category_id of a class, letter case, spaces and underscores aside.

        Raises:
            GlipError: there is no category of that name.
        """
        categories = self._categories or {}
        try:
            return categories[fold(phrase)]
        except KeyError:
            some = ", ".join(list(categories)[:8])
            raise GlipError(
                f'class "{phrase}" is not among the {len(categories)} COCO categories ({some}, ...);'
                " use their names in the prompt, or leave the categories out"
            ) from None


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
        from glip_deploy.sources import import_av

        import_av()
        self._path = Path(output)
        if self._path.suffix.lower() not in VIDEO_SUFFIXES:
            raise GlipError(f"video {output} does not end in {' or '.join(sorted(VIDEO_SUFFIXES))}; .mp4 is usual")
        if make_folder:
            _check_folder(self._path.parent)
        if self._path.parent.exists() or not make_folder:
            _check_file(self._path)
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

        from glip_deploy.draw import annotate

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
            raise _not_written(self._path, error) from error

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
                raise _not_written(self._path, problem) from problem
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


def read_coco_names(path: str | os.PathLike[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Read what a COCO file calls things: an annotation file, or a bare list of categories.

    Returns:
        Class name -> category_id, and file name -> image_id (empty if the file lists no images).

    Raises:
        GlipError: it cannot be read, is not JSON, or holds no categories.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GlipError(f"COCO file {path} cannot be read ({reason}); give an annotation file in JSON") from error
    categories = data.get("categories") if isinstance(data, dict) else data
    images = data.get("images", []) if isinstance(data, dict) else []
    try:
        names = {str(entry["name"]): int(entry["id"]) for entry in categories or ()}
        numbers = {Path(str(entry["file_name"])).name: int(entry["id"]) for entry in images}
    except (TypeError, KeyError, ValueError):
        names, numbers = {}, {}
    if not names:
        raise GlipError(f'COCO file {path} holds no "categories" with "id" and "name"; give an annotation file')
    return names, numbers


def refuse_overwriting(source: str, path: Path) -> None:
    """Raise a GlipError if an output is the very file that is read."""
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise GlipError(f"output {path} is the source itself and would be overwritten; choose another name")


def _check_file(path: Path) -> None:
    """See that a file can be made or replaced, leaving no trace."""
    if path.is_dir():
        raise GlipError(f"output {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise GlipError(f"output {path}: folder {path.parent} does not exist; make it first")
    writable = os.access(path if path.exists() else path.parent, os.W_OK)
    if not writable:
        raise GlipError(f"output {path} cannot be written (permission denied); choose another place")


def _check_folder(path: Path) -> None:
    """See that files can be made in a folder that may not exist yet, leaving no trace."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise GlipError(f"output folder {path}: {existing} is a file; choose another name")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise GlipError(f"output folder {path} cannot be written (permission denied); choose another place")


def _not_written(path: Path, error: Exception) -> GlipError:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return GlipError(f"{path} cannot be written: no space left; free some, or write elsewhere")
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return GlipError(f"{path} cannot be written ({' '.join(str(reason).split())}); choose another place")
