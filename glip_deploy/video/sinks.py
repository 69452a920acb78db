"""Where detections go: annotated pictures, JSON lines, COCO results.

An annotated video is in `video_out`, labels for annotation tools and training are in `label_sinks`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from glip_deploy.errors import OutputError
from glip_deploy.files import atomic_file, check_file, check_folder, check_outputs, not_written, write_atomically
from glip_deploy.results.coco import CocoIds
from glip_deploy.results.drawing import annotate
from glip_deploy.video.base import Sink

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from glip_deploy.results.detections import Detections
    from glip_deploy.video.base import Frame, Source

__all__ = ["PICTURE_FORMATS", "CocoSink", "JsonLinesSink", "PictureSink", "below"]

PICTURE_FORMATS = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG"}
"""Suffixes of an annotated picture, and what Pillow calls the format."""


def below(root: Path | None, source: str) -> Path:
    """Return the path of a picture inside the folder `root`, or its name alone where it is not in there."""
    path = Path(source)
    return path.relative_to(root) if root is not None and path.is_relative_to(root) else Path(path.name)


class PictureSink(Sink):
    """Annotated pictures, JPEG or PNG by the suffix; a picture is written whole or not at all.

    Args:
        output: a file, for a single picture; or a folder, made if it does not exist, in which each picture keeps its
            name (with .png added if it was neither JPEG nor PNG).
        folder: whether `output` is a folder.
        root: the part of a source path that is not repeated inside the folder.

    Raises:
        OutputError: it cannot be written there, or has another suffix.
    """

    def __init__(self, output: str | os.PathLike[str], *, folder: bool = False, root: Path | None = None) -> None:
        self._output = Path(output)
        self._folder = folder
        self._root = root
        if folder:
            check_folder(self._output)
        else:
            if self._output.suffix.lower() not in PICTURE_FORMATS:
                raise OutputError(
                    f"picture {output} does not end in {' or '.join(PICTURE_FORMATS)}; choose one of them"
                )
            check_file(self._output)

    def outputs(self, source: Source) -> Sequence[Path]:
        """Return the picture, or one in the folder for each picture of the source."""
        return [self._path(str(path)) for path in source.files] if self._folder else [self._output]

    def write(self, frame: Frame, detections: Detections) -> None:
        """Draw and save one picture."""
        from PIL import Image

        path = self._path(frame.source) if self._folder else self._output
        check_outputs({Path(frame.source): "the source itself"}, [path])
        picture = Image.fromarray(annotate(frame.image, detections))
        kind = PICTURE_FORMATS[path.suffix.lower()]
        options = {"quality": 92, "subsampling": 0} if kind == "JPEG" else {"compress_level": 3}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial:
                picture.save(partial, format=kind, **options)
        except OSError as error:
            raise not_written(path, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: every picture is complete already."""

    def _path(self, source: str) -> Path:
        relative = below(self._root, source)
        if relative.suffix.lower() not in PICTURE_FORMATS:
            relative = relative.with_name(f"{relative.name}.png")
        return self._output / relative


class JsonLinesSink(Sink):
    """One JSON object and line for each frame, flushed at once, so that a reader can follow live.

    {"source", "frame", "width", "height", "detections": [{"score", "label", "box": {"xmin", "ymin", "xmax",
    "ymax"}}]}, boxes in pixels of the frame. With several prompts there is a line for each prompt of a frame, and
    "prompt" in it says which. On a full disk, the file keeps its whole lines.

    Args:
        output: a file, or "-" for standard output.
        prompts: where detections are of several prompts: the text of each, and the number of its classes.

    Raises:
        OutputError: it cannot be written there.
    """

    def __init__(self, output: str | os.PathLike[str], prompts: Sequence[tuple[str, int]] = ()) -> None:
        self._prompts = tuple(prompts)
        self._to_stdout = str(output) == "-"
        self._path = Path(output)
        self._file: IO[bytes] | None = None
        self._whole = 0
        if not self._to_stdout:
            check_file(self._path)
        elif sys.stdout is None:
            raise OutputError("standard output is closed, so nothing can be written there; name a file instead of -")

    def outputs(self, source: Source) -> Sequence[Path]:
        """Return the file; nothing for standard output."""
        return [] if self._to_stdout else [self._path]

    def __enter__(self) -> Self:
        if not self._to_stdout:
            try:
                self._file = self._path.open("wb", buffering=0)
            except OSError as error:
                raise not_written(self._path, error) from error
        return self

    def write(self, frame: Frame, detections: Detections) -> None:
        """Write one line, or one for each prompt.

        Raises:
            BrokenPipeError: the reader of standard output went away.
            OutputError: it cannot be written.
        """
        if not self._prompts:
            self._write(frame, {}, detections)
        first = 0
        for text, classes in self._prompts:
            own = (detections.labels >= first) & (detections.labels < first + classes)
            self._write(frame, {"prompt": text}, detections[own])
            first += classes

    def _write(self, frame: Frame, prompt: Mapping[str, str], detections: Detections) -> None:
        height, width = frame.image.shape[:2]
        line = json.dumps(
            {
                "source": frame.source,
                "frame": frame.index,
                "width": width,
                "height": height,
                **prompt,
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
            raise not_written(self._path, error) from error
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
        except UnicodeEncodeError:  # a terminal that is not UTF-8; JSON can be written in ASCII too
            sys.stdout.write(json.dumps(json.loads(line)) + "\n")
            sys.stdout.flush()
        except OSError as error:
            raise not_written(Path("standard output"), error) from error


class CocoSink(Sink):
    """COCO results: one JSON list, written at the end of the run, whole or not at all.

    All detections are kept in memory until then. `glip_deploy.results.coco.CocoIds.image_ids` says which image_id a
    picture gets.

    Args:
        output: a file.
        categories: class name -> category_id; without it, a class is its place in the prompt, from 1.
        image_ids: file name -> image_id, from a COCO annotation file.

    Raises:
        OutputError: it cannot be written there.
        PromptError: at the end, a class that has no category.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        *,
        categories: Mapping[str, int] | None = None,
        image_ids: Mapping[str, int] | None = None,
    ) -> None:
        self.ids = CocoIds(categories, image_ids)
        self._path = Path(output)
        self._pictures: list[tuple[str, int, Detections]] = []
        check_file(self._path)

    def outputs(self, source: Source) -> Sequence[Path]:
        """Return the file."""
        return [self._path]

    def write(self, frame: Frame, detections: Detections) -> None:
        """Keep one frame's detections."""
        self._pictures.append((frame.source, frame.index, detections))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the list, unless there was an exception."""
        if kind is not None:
            return
        text = json.dumps(self.ids.results(self._pictures)) + "\n"
        try:
            write_atomically(self._path, text, sync=True)
        except OSError as problem:
            raise not_written(self._path, problem) from problem
