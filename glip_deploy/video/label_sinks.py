"""Detections as labels of pictures: tasks for Label Studio to correct, label files of YOLO to train on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from glip_deploy.errors import OutputError
from glip_deploy.files import check_file, check_folder, not_written, write_atomically
from glip_deploy.video.base import Sink
from glip_deploy.video.sinks import below

if TYPE_CHECKING:
    from types import TracebackType

    from glip_deploy.results.detections import Detections
    from glip_deploy.video.base import Frame, Source

__all__ = ["LabelStudioSink", "YoloSink"]


class LabelStudioSink(Sink):
    """Tasks of Label Studio with predictions: one JSON list, written at the end of the run, whole or not at all.

    The address of a picture is `/data/local-files/?d=FOLDER/NAME`, as Label Studio serves files of its own machine:
    FOLDER is the last part of the pictures' folder, NAME the path in it. `Detections.to_label_studio` says what the
    labeling configuration needs.

    Args:
        output: a file.
        root: the pictures' folder.
        model_version: what Label Studio calls the predictions.

    Raises:
        OutputError: it cannot be written there.
    """

    def __init__(self, output: str | os.PathLike[str], root: Path, *, model_version: str) -> None:
        self._path = Path(output)
        self._root = root
        self._model_version = model_version
        self._tasks: list[dict[str, Any]] = []
        check_file(self._path)

    def outputs(self, source: Source) -> Sequence[Path]:
        """Return the file."""
        return [self._path]

    def write(self, frame: Frame, detections: Detections) -> None:
        """Keep one picture's task."""
        height, width = frame.image.shape[:2]
        place = Path(self._root.resolve().name) / below(self._root, frame.source)
        address = f"/data/local-files/?d={quote(os.fsencode(place.as_posix()))}"  # names need not be UTF-8
        self._tasks.append(detections.to_label_studio(address, width, height, model_version=self._model_version))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the list, unless there was an exception."""
        if kind is not None:
            return
        try:
            write_atomically(self._path, json.dumps(self._tasks, ensure_ascii=False) + "\n", sync=True)
        except OSError as problem:
            raise not_written(self._path, problem) from problem


class YoloSink(Sink):
    """Label files of YOLO: `labels/NAME.txt` for each picture, and `classes.txt` with a class name per line.

    A picture with no detections gets an empty file. Every file is written whole or not at all. Put the pictures into
    `images` beside `labels` to train.

    Args:
        output: a folder, made if it does not exist; label files that are there and not written again stay.
        root: the pictures' folder; folders below it are made below `labels` too.
        phrases: the classes of the prompt.

    Raises:
        OutputError: it cannot be written there.
    """

    def __init__(self, output: str | os.PathLike[str], root: Path, phrases: Sequence[str]) -> None:
        self._folder = Path(output)
        self._root = root
        self._names = "".join(f"{' '.join(phrase.split())}\n" for phrase in phrases)
        check_folder(self._folder / "labels")

    def outputs(self, source: Source) -> Sequence[Path]:
        """Return the files.

        Raises:
            OutputError: two pictures differ only in their suffix, so that their labels would be one file.
        """
        pictures: dict[Path, Path] = {}
        for picture in source.files:
            other = pictures.setdefault(self._labels(str(picture)), picture)
            if other != picture:
                raise OutputError(f"pictures {other} and {picture} would have the same label file; rename one of them")
        return [self._folder / "classes.txt", *pictures]

    def __enter__(self) -> Self:
        self._write(self._folder / "classes.txt", self._names)
        return self

    def write(self, frame: Frame, detections: Detections) -> None:
        """Write the labels of one picture."""
        height, width = frame.image.shape[:2]
        self._write(self._labels(frame.source), detections.to_yolo(width, height))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: every file is complete already."""

    def _labels(self, source: str) -> Path:
        return self._folder / "labels" / below(self._root, source).with_suffix(".txt")

    @staticmethod
    def _write(path: Path, text: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        except OSError as error:
            raise not_written(path, error) from error
