"""The files that a run ends with: Parquet, COCO results, and the list of failures.

All are written from the record, in the order of the files, so that they do not depend on who did what when.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.batch.plan import Failure, MediaFile
from glip_deploy.files import atomic_file, not_written, write_atomically
from glip_deploy.results.detections import Detections

if TYPE_CHECKING:
    from glip_deploy.batch.messages import Found
    from glip_deploy.batch.record import Entry, Recorder
    from glip_deploy.results.coco import CocoIds

__all__ = ["COCO", "FAILURES", "PARQUET", "RESULTS", "Totals", "write_results"]

PARQUET, COCO, FAILURES = "detections.parquet", "coco.json", "failures.json"
RESULTS = (PARQUET, COCO, FAILURES)
_ROWS = 1024
"""Frames in a row group of the Parquet file, and in memory at a time."""


@dataclass(frozen=True)
class Totals:
    """What the results hold.

    Attributes:
        pictures: pictures that are done.
        video_frames: frames of videos.
        objects: detections in all of them.
    """

    pictures: int
    video_frames: int
    objects: int


def write_results(
    files: Sequence[MediaFile],
    recorder: Recorder,
    failures: Sequence[Failure],
    phrases: Sequence[str],
    ids: CocoIds,
) -> Totals:
    """Write Parquet, COCO results and failures into the output folder, each whole or not at all.

    Args:
        files: of the source.
        recorder: what is done; flushed.
        failures: what could not be done.
        phrases: the classes of the prompt.
        ids: COCO's numbers of classes and pictures.

    Raises:
        OutputError: a file cannot be written.
        PromptError: a class that has no COCO category.
    """
    table = [(file, recorder.entries(file.name, file.size, file.modified)) for file in files]
    image_ids = ids.image_ids(list(_numbered(table)))
    folder = recorder.folder
    _write_tables(folder, _rows(table, recorder, phrases), image_ids, ids, recorder.job.key)
    text = json.dumps([_in_json(one) for one in failures], indent=1, ensure_ascii=False) + "\n"
    try:
        write_atomically(folder / FAILURES, text, sync=True)
    except OSError as error:
        raise not_written(folder / FAILURES, error) from error
    entries = [(file.video, entry) for file, known in table for entry in known.values()]
    return Totals(
        pictures=sum(not video for video, _ in entries),
        video_frames=sum(entry.frames for video, entry in entries if video),
        objects=sum(entry.objects for _, entry in entries),
    )


def _numbered(table: Sequence[tuple[MediaFile, Mapping[int, Entry]]]) -> Iterator[tuple[str, int]]:
    """Give name and number of each frame, in order; a picture that failed keeps its number, as in glip-detect."""
    number = 0
    for file, known in table:
        for entry in known.values():
            for place in range(entry.frames):
                yield file.name, number + place
            number += entry.frames
        if not file.video and not known:
            number += 1


def _rows(
    table: Sequence[tuple[MediaFile, Mapping[int, Entry]]], recorder: Recorder, phrases: Sequence[str]
) -> Iterator[tuple[str, Found, Detections]]:
    for file, known in table:
        for entry in known.values():
            for found in recorder.read(entry).found:
                detections = Detections(
                    np.array(found.boxes, np.float32).reshape(-1, 4),
                    np.array(found.scores, np.float32),
                    np.array(found.labels, np.int64),
                    [phrases[label] for label in found.labels],
                )
                yield file.name, found, detections


def _write_tables(
    folder: Path,
    rows: Iterator[tuple[str, Found, Detections]],
    image_ids: Sequence[int],
    ids: CocoIds,
    key: str,
) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = _schema(pyarrow).with_metadata({"glip_deploy.batch": key})
    path = folder / PARQUET
    try:
        with (
            atomic_file(path, sync=True) as partial,
            atomic_file(folder / COCO, sync=True) as coco,
            parquet.ParquetWriter(partial, schema) as writer,
            coco.open("w", encoding="ascii") as results,
        ):
            waiting: list[dict[str, Any]] = []
            before = "["
            for image_id, (name, found, detections) in zip(image_ids, rows, strict=True):
                waiting.append(_row(name, image_id, found, detections))
                if len(waiting) == _ROWS:
                    writer.write_table(pyarrow.Table.from_pylist(waiting, schema))
                    waiting = []
                for entry in ids.result(image_id, detections):
                    results.write(before + json.dumps(entry))
                    before = ", "
            if waiting:
                writer.write_table(pyarrow.Table.from_pylist(waiting, schema))
            results.write("[]\n" if before == "[" else "]\n")
    except OSError as error:
        raise not_written(path, error) from error


def _schema(pyarrow: Any) -> Any:
    box = pyarrow.struct([(side, pyarrow.float32()) for side in ("xmin", "ymin", "xmax", "ymax")])
    detection = pyarrow.struct([("score", pyarrow.float32()), ("label", pyarrow.string()), ("box", box)])
    return pyarrow.schema(
        [
            pyarrow.field("source", pyarrow.string(), nullable=False),
            pyarrow.field("frame", pyarrow.int64(), nullable=False),
            pyarrow.field("time", pyarrow.float64()),
            pyarrow.field("width", pyarrow.int32(), nullable=False),
            pyarrow.field("height", pyarrow.int32(), nullable=False),
            pyarrow.field("image_id", pyarrow.int64(), nullable=False),
            pyarrow.field("detections", pyarrow.list_(detection), nullable=False),
        ]
    )


def _row(name: str, image_id: int, found: Found, detections: Detections) -> dict[str, Any]:
    return {
        "source": name,
        "frame": found.frame,
        "time": found.time,
        "width": found.width,
        "height": found.height,
        "image_id": image_id,
        "detections": detections.to_dicts(),
    }


def _in_json(failure: Failure) -> dict[str, Any]:
    frames = {} if failure.first is None else {"first_frame": failure.first, "end_frame": failure.end}
    return {"source": failure.name, **frames, "reason": failure.reason}
