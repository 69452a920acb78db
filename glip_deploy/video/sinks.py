"""Where detections go: annotated pictures, an annotated video, JSON lines, COCO results.

A sink is a context manager with one method, `write(frame, detections)`. Making one already checks that its
output can be written, without touching what is there; entering it opens it; leaving it completes it. Leaving
it because of an exception keeps what is whole (pictures, lines, a video up to there) and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from glip_deploy.errors import GlipError
from glip_deploy.prompts.syntax import fold

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from glip_deploy.results.detections import Detections
    from glip_deploy.video.base import Frame
from glip_deploy.files import check_file, check_folder, not_written, refuse_overwriting
from glip_deploy.video.base import Sink

__all__ = ["PICTURE_FORMATS", "CocoSink", "JsonLinesSink", "PictureSink"]

log = logging.getLogger(__name__)
PICTURE_FORMATS = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG"}
"""Names an annotated picture may end in, and what Pillow calls the format."""


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
            check_folder(self._output)
        else:
            if self._output.suffix.lower() not in PICTURE_FORMATS:
                raise GlipError(f"picture {output} does not end in {' or '.join(PICTURE_FORMATS)}; choose one of them")
            check_file(self._output)

    def write(self, frame: Frame, detections: Detections) -> None:
        """Draw and save one picture."""
        from PIL import Image

        from glip_deploy.results.drawing import annotate

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
            raise not_written(path, error) from error
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
            check_file(self._path)

    def __enter__(self) -> Self:
        if not self._to_stdout:
            try:
                self._file = self._path.open("wb", buffering=0)
            except OSError as error:
                raise not_written(self._path, error) from error
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
        except UnicodeEncodeError:  # a terminal that is not UTF-8; JSON can say the same in ASCII
            sys.stdout.write(json.dumps(json.loads(line)) + "\n")
            sys.stdout.flush()
        except OSError as error:
            raise not_written(Path("standard output"), error) from error


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
        check_file(self._path)

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
            raise not_written(self._path, problem) from problem
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
