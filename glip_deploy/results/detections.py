"""The detections of one picture, and the forms in which they are passed on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from glip_deploy.errors import MissingPackage
from glip_deploy.results.coco import coco_results
from glip_deploy.results.exchange import fiftyone_detections, hugging_face, label_studio_task, yolo_lines

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NO_TRACK", "Detection", "Detections"]


@dataclass(frozen=True)
class Detection:
    """One box.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the original frame.
        score: in [0, 1].
        label: 0-based class index in the prompt.
        phrase: that class as the prompt names it.
        track: the object's id in the video; None where it has none.
    """

    box: tuple[float, float, float, float]
    score: float
    label: int
    phrase: str
    track: int | None = None


def _no_boxes() -> NDArray[np.float32]:
    return np.zeros((0, 4), dtype=np.float32)


def _no_scores() -> NDArray[np.float32]:
    return np.zeros(0, dtype=np.float32)


def _no_labels() -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


NO_TRACK = -1
"""In `Detections.track`: a box that belongs to no object that is followed."""


@dataclass(frozen=True, eq=False)
class Detections:
    """The boxes of one picture, always by descending score (equal scores keep the order given).

    `for one in d` and `d[3]` give single `Detection`s; `d[:10]`, `d[d.scores > 0.5]` and `d[[0, 2]]` give `Detections`.

    Example:
        >>> found = Detections(
        ...     boxes=np.array([[0, 0, 9, 9], [5, 5, 20, 30]], np.float32),
        ...     scores=np.array([0.4, 0.75], np.float32),
        ...     labels=np.array([0, 1]),
        ...     phrases=["person", "dog"],
        ... )
        >>> found[0].phrase, len(found[found.scores > 0.5])
        ('dog', 1)

    Attributes:
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels of the original frame.
        scores: (N,) float32.
        labels: (N,) int64, 0-based class index in the prompt.
        phrases: the class of each box, as the prompt names it; N of them.
        track: (N,) int64, the id of the object in the video that `glip_deploy.video.tracking.Tracker` gave; -1 for a
            box without one, and so for all boxes where nothing is tracked. None is taken for that.

    Raises:
        ValueError: shapes or lengths that do not match, a number that is not finite, a negative or fractional
            label, or a track that is neither an id from 0 nor -1.
    """

    boxes: NDArray[np.float32] = field(default_factory=_no_boxes)
    scores: NDArray[np.float32] = field(default_factory=_no_scores)
    labels: NDArray[np.int64] = field(default_factory=_no_labels)
    phrases: list[str] = field(default_factory=list)
    track: NDArray[np.int64] = None  # type: ignore[assignment]  # an array once it is made, like the others

    def __post_init__(self) -> None:
        boxes, scores = np.asarray(self.boxes, np.float32), np.asarray(self.scores, np.float32)
        labels, phrases = np.asarray(self.labels), list(self.phrases)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"boxes have shape {boxes.shape}; (N, 4) is needed")
        count = len(boxes)
        if scores.shape != (count,) or labels.shape != (count,) or len(phrases) != count:
            raise ValueError(
                f"{count} boxes, scores of shape {scores.shape}, labels of shape {labels.shape} and"
                f" {len(phrases)} phrases; one of each per box is needed"
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError("boxes and scores must be finite; there is a NaN or an infinity among them")
        if not all(isinstance(phrase, str) for phrase in phrases):
            raise ValueError("phrases must be str")
        if count and not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels have dtype {labels.dtype}; an integer class index is needed")
        labels = labels.astype(np.int64)
        if count and labels.min() < 0:
            raise ValueError(f"label {labels.min()} is negative; classes count from 0")
        track = np.full(count, NO_TRACK, np.int64) if self.track is None else np.asarray(self.track)
        if track.shape != (count,) or (count and not np.issubdtype(track.dtype, np.integer)):
            raise ValueError(f"track has shape {track.shape} and dtype {track.dtype}; an integer per box is needed")
        if count and track.min() < NO_TRACK:
            raise ValueError(f"track {track.min()} is negative; ids count from 0, and {NO_TRACK} stands for none")
        order = np.argsort(-scores, kind="stable")
        object.__setattr__(self, "boxes", boxes[order])
        object.__setattr__(self, "scores", scores[order])
        object.__setattr__(self, "labels", labels[order])
        object.__setattr__(self, "phrases", [phrases[i] for i in order])
        object.__setattr__(self, "track", track.astype(np.int64)[order])

    @classmethod
    def empty(cls) -> Detections:
        """Return no detections, with the right shapes and dtypes."""
        return cls()

    @classmethod
    def joined(cls, parts: Sequence[Detections], classes: Sequence[int]) -> Detections:
        """Join the detections of several prompts in one frame.

        Args:
            parts: by prompt.
            classes: the number of classes of each; labels of a prompt follow those of the prompts before it.
        """
        firsts = np.cumsum([0, *classes])
        return cls(
            np.concatenate([_no_boxes(), *(part.boxes for part in parts)]),
            np.concatenate([_no_scores(), *(part.scores for part in parts)]),
            np.concatenate([_no_labels(), *(part.labels + first for part, first in zip(parts, firsts, strict=False))]),
            [phrase for part in parts for phrase in part.phrases],
            np.concatenate([_no_labels(), *(part.track for part in parts)]),
        )

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        for index in range(len(self)):
            yield self[index]

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Detection: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | Sequence[bool] | NDArray[Any]) -> Detections: ...

    def __getitem__(
        self, index: int | np.integer[Any] | slice | Sequence[int] | Sequence[bool] | NDArray[Any]
    ) -> Detection | Detections:
        if isinstance(index, int | np.integer) and not isinstance(index, bool):
            x1, y1, x2, y2 = self.boxes[index].tolist()
            return Detection(
                box=(x1, y1, x2, y2),
                score=float(self.scores[index]),
                label=int(self.labels[index]),
                phrase=self.phrases[index],
                track=None if self.track[index] == NO_TRACK else int(self.track[index]),
            )
        if not isinstance(index, slice):
            index = np.asarray(index)
            if index.size == 0 and index.dtype != np.bool_:
                index = index.astype(np.int64)
        chosen = np.arange(len(self))[index]
        return Detections(
            self.boxes[chosen],
            self.scores[chosen],
            self.labels[chosen],
            [self.phrases[i] for i in chosen],
            self.track[chosen],
        )

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return `{"score", "label", "box": {"xmin", "ymin", "xmax", "ymax"}}` per box, ready for JSON.

        The label is the phrase; the box is in pixels of the original frame; numbers are Python floats. A box that
        belongs to a tracked object also has `"track"`, its id.
        """
        return [
            {
                "score": one.score,
                "label": one.phrase,
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), one.box, strict=True)),
                **({} if one.track is None else {"track": one.track}),
            }
            for one in self
        ]

    def to_hf(self) -> list[dict[str, Any]]:
        """Return what the zero-shot object detection pipeline of Hugging Face transformers returns for a picture.

        That is the form of `to_dicts`, with boxes in whole pixels: fractions are cut off, as the pipeline does
        (`ZeroShotObjectDetectionPipeline._get_bounding_box`).
        """
        return hugging_face(self)

    def to_fiftyone(self, width: int, height: int) -> Any:
        """Return a `fiftyone.Detections`, one `fiftyone.Detection` with label, confidence and bounding box per box.

        Tracked objects have their id as `index`.

        Args:
            width: of the picture, in pixels; bounding boxes are relative to it.
            height: of the picture.

        Raises:
            MissingPackage: the `fiftyone` package is not installed.
            OptionError: boxes reach out of a picture of that size.
        """
        return fiftyone_detections(self, width, height)

    def to_label_studio(
        self, image: str, width: int, height: int, *, model_version: str = "glip-deploy"
    ) -> dict[str, Any]:
        """Return a task of Label Studio with these boxes as a prediction; a list of tasks in a JSON file is imported.

        The labeling configuration needs `<Image name="image" value="$image"/>` and
        `<RectangleLabels name="label" toName="image">` with a `<Label>` for each phrase.
        Format: https://labelstud.io/guide/predictions.

        Args:
            image: the address under which Label Studio finds the picture.
            width: of the picture, in pixels; boxes are in percent of it.
            height: of the picture.
            model_version: what Label Studio calls the prediction.

        Raises:
            OptionError: boxes reach out of a picture of that size.
        """
        return label_studio_task(self, image, width, height, model_version)

    def to_yolo(self, width: int, height: int) -> str:
        """Return the label file of a picture in YOLO's format: `class x y width height` per line.

        The class is the index in the prompt; x and y are the center, and all four are shares of the picture's width or
        height, with six digits. The score has no place in the format. No boxes give an empty string, which YOLO takes
        as a picture with no objects.

        Args:
            width: of the picture, in pixels.
            height: of the picture.

        Raises:
            OptionError: boxes reach out of a picture of that size.
        """
        return yolo_lines(self, width, height)

    def to_coco(self, image_id: int | str, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return COCO results: `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}` per box.

        Widths include the last pixel, `x2 - x1 + 1`, as the official evaluation writes them
        (`BoxList.convert("xywh")`, `coco_eval.prepare_for_coco_detection`). A box that belongs to a tracked object also
        has `"track_id"`, as results of TAO do.

        Args:
            image_id: the picture's id in the annotation file.
            category_ids: COCO category of each class, in the prompt's order; by default 1, 2, ...

        Raises:
            OptionError: fewer category ids than the classes found.
        """
        return coco_results(self, image_id, category_ids)

    def to_supervision(self) -> Any:
        """Return a `supervision.Detections`; the phrases are its `data["class_name"]`, the tracks its `tracker_id`.

        `tracker_id` is None where no box has a track.

        Raises:
            MissingPackage: the `supervision` package is not installed.
        """
        try:
            supervision: Any = import_module("supervision")
        except ImportError as error:
            raise MissingPackage(
                "to_supervision needs the supervision package, which is not installed;"
                " pip install supervision, or use to_dicts()"
            ) from error
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.labels.copy(),
            tracker_id=self.track.copy() if (self.track != NO_TRACK).any() else None,
            data={"class_name": np.array(self.phrases, dtype=str)},
        )
