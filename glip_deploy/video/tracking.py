"""Which box is which object: ids that stay with an object from frame to frame of a video.

The association is ByteTrack's (Zhang et al., ECCV 2022, https://arxiv.org/abs/2110.06864), as the package `trackers`
has it: boxes are matched with where a Kalman filter expects the known objects, first those that are shown, then weaker
ones, which keep an object known while its score dips. Both are enlarged before their overlap is taken (buffered IoU,
Yang et al., WACV 2023), so that an object that moves far between two frames, as after a stride, still meets itself.
"""

from __future__ import annotations

import importlib
import statistics
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import MissingPackage, OptionError
from glip_deploy.prompts.tokens import thresholds
from glip_deploy.results.detections import NO_TRACK, Detections

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy.video.base import Source

    Key = tuple[str, int]

__all__ = ["WEAK", "Tracker"]

WEAK = 0.5
"""Boxes above this share of a class's threshold keep an object known, though they are not shown."""

_USUAL_INTERVAL = 1 / 25
_KEPT_INTERVALS = 9
_ENLARGED = 0.3
"""Share of its width and height by which a box is enlarged to each side for the association."""
_MISSED_FRAMES = 3
"""An object may be missing for so many frames, however far apart they are in time."""


class Tracker:
    """Gives the objects of one video ids, from 1, that stay with them from frame to frame.

        tracker = Tracker(interval=1 / 30)
        for frame, time in ...:
            found = detector.detect(frame, prompt, threshold=0.5, color="rgb")
            found = tracker.update(found, prompt.phrases, 0.5, time=time)
            print(found.track)

    Every phrase is tracked on its own, so that an id never goes from one phrase to another, also where two phrases
    name the same thing. An object gets its id in the second frame in a row in which it is found; a box that appears
    only once gets none. An object that is missing keeps its id for `memory` seconds, or for three frames where they
    are further apart than that. No id is given twice, also after `reset`.

    `glip_deploy.video.run` and `detect_stream` take one as `tracker`. It is not for several threads at once.

    Args:
        interval: seconds between two frames as they usually come, after any stride; only the pace for which the motion
            model is set, since each frame's own time counts.
        memory: seconds for which an object that is not seen stays known.

    Raises:
        MissingPackage: the package `trackers` is not installed, or a library that it needs.
        OptionError: a number that is not above 0.
    """

    def __init__(self, *, interval: float = _USUAL_INTERVAL, memory: float = 1.0) -> None:
        for name, value in (("interval", interval), ("memory", memory)):
            if not 0 < value < float("inf"):
                raise OptionError(f"{name} is {value!r}; it must be a finite number above 0 seconds")
        self._trackers, self._supervision = _packages()
        self._interval = float(interval)
        self._memory = float(memory)
        self._given = 0
        self._phrases: tuple[str, ...] = ()
        self._keys: list[Key] = []
        self.reset()

    @classmethod
    def of(cls, source: Source) -> Tracker:
        """Return one for a source, with the interval that its frame rate and stride make.

        Raises:
            OptionError: the source is pictures, which do not follow each other in time.
            MissingPackage: as the class.
        """
        cls.check(source)
        return cls(interval=source.stride / source.fps if source.fps else _USUAL_INTERVAL)

    @staticmethod
    def check(source: Source) -> None:
        """Check that the frames of a source follow each other in time.

        Raises:
            OptionError: they are pictures.
        """
        if not source.is_video:
            raise OptionError(
                f"tracking follows objects through a video, but source {source.name} is"
                f" {'a picture' if len(source.files) == 1 else 'pictures'};"
                " leave it out (--track), or give a video, a camera or a stream"
            )

    @property
    def count(self) -> int:
        """How many ids were given so far."""
        return self._given

    def reset(self) -> None:
        """Forget all objects, as after a cut; ids go on from where they were.

        A time that goes back, as that of a source that starts again, does it too.
        """
        self._associations: dict[Key, _Association] = {}
        self._time: float | None = None
        self._steps: deque[float] = deque(maxlen=_KEPT_INTERVALS)

    def update(
        self,
        detections: Detections,
        phrases: Sequence[str],
        threshold: float | Sequence[float] | Mapping[str, float] = 0.5,
        *,
        time: float | None = None,
    ) -> Detections:
        """Take the next frame's boxes; return those above the threshold, with the tracks of their objects.

        Call it for every frame, also one without boxes. Prompt and threshold may change at any time; an object keeps
        its id if its phrase stays the same.

        Args:
            detections: of the frame. Where boxes below the threshold are among them, down to `WEAK` of it, an object
                whose score dips for a moment is followed meanwhile; they are not returned.
            phrases: of the prompt, one for each label, `EncodedPrompt.phrases`.
            threshold: as `Detector.detect` takes it. Any box above it may begin a track.
            time: of the frame, in seconds; None for one `interval` after the frame before.

        Returns:
            `detections` above the threshold, with `track` set.

        Raises:
            OptionError: a threshold out of range, or a label that is not in `phrases`.
            PromptError: a threshold for a phrase that is not among them.
        """
        limits = thresholds(phrases, threshold)
        labels = detections.labels
        if len(labels) and labels.max() >= len(limits):
            raise OptionError(f"label {labels.max()} is found, but there are {len(limits)} phrases; give them all")
        now = self._at(time)
        budget = max(self._memory, _MISSED_FRAMES * statistics.median(self._steps or [self._interval]))
        by_key: dict[Key, list[int]] = {key: [] for key in self._associations}
        keys = self._keys_of(phrases)
        for index, label in enumerate(labels.tolist()):
            by_key.setdefault(keys[label], []).append(index)
        track = np.full(len(detections), NO_TRACK, np.int64)
        for key, places in by_key.items():
            association = self._associations.get(key)
            if association is None:
                tracker = self._trackers.ByteTrackTracker(
                    frame_rate=1 / self._interval, iou=self._trackers.BIoU(_ENLARGED)
                )
                association = self._associations[key] = _Association(tracker, self._next)
            boxes = self._supervision.Detections(
                xyxy=detections.boxes[places].astype(np.float64),
                confidence=detections.scores[places],
                data={"place": np.arange(len(places))},
            )
            limit = limits[labels[places[0]]] if places else np.float32(1)
            track[places] = association.update(boxes, limit, now, budget)
            if association.is_empty:
                del self._associations[key]
        return replace(detections, track=track)[detections.scores > limits[labels]]

    def _next(self) -> int:
        self._given += 1
        return self._given

    def _at(self, time: float | None) -> float:
        """Return the frame's time, which always grows, and note how long it has been."""
        before = self._time
        if time is not None and before is not None and time < before - 2 * self._interval:
            self.reset()
            before = None
        if before is None:
            self._time = 0.0 if time is None else float(time)
            return self._time
        step = self._interval if time is None else max(float(time) - before, 1e-3 * self._interval)
        self._steps.append(step)
        self._time = before + step
        return self._time

    def _keys_of(self, phrases: Sequence[str]) -> list[Key]:
        """Return what identifies each class over prompts: its phrase, and which of several equal ones it is."""
        if self._phrases != tuple(phrases):
            seen: Counter[str] = Counter()
            self._keys = []
            for phrase in phrases:
                self._keys.append((phrase, seen[phrase]))
                seen[phrase] += 1
            self._phrases = tuple(phrases)
        return self._keys


class _Association:
    """The tracks of one phrase."""

    def __init__(self, tracker: Any, new_id: Callable[[], int]) -> None:
        self._tracker = tracker
        self._new_id = new_id
        self._ids: dict[int, int] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no object is known."""
        return not self._tracker.tracks

    def update(self, boxes: Any, limit: np.float32, time: float, budget: float) -> NDArray[np.int64]:
        """Return the tracks, (N,) int64, of N boxes whose `data["place"]` counts from 0."""
        # The package compares with "at least"; here a score must be above the threshold.
        above = float(np.nextafter(limit, np.float32(np.inf)))
        self._tracker.high_conf_det_threshold = self._tracker.track_activation_threshold = above
        self._tracker.maximum_time_without_update = budget
        track = np.full(len(boxes), NO_TRACK, np.int64)
        matched = self._tracker.update(boxes, timestamp=time)  # in another order
        for place, own in zip(matched.data.get("place", ()), matched.tracker_id.tolist(), strict=True):
            if own != -1:
                if own not in self._ids:
                    self._ids[own] = self._new_id()
                track[place] = self._ids[own]
        alive = {one.tracker_id for one in self._tracker.tracks}
        self._ids = {own: known for own, known in self._ids.items() if own in alive}
        return track


def _packages() -> tuple[Any, Any]:
    """Return `trackers` and `supervision`."""
    try:
        return importlib.import_module("trackers"), importlib.import_module("supervision")
    except ImportError as error:
        raise MissingPackage(_advice(error)) from error


def _advice(error: ImportError) -> str:
    if error.name in ("trackers", "supervision"):
        return f"tracking needs the package {error.name}, which is not installed; pip install 'glip-deploy[track]'"
    if ".so" in str(error):  # one of those that OpenCV opens windows with
        return (
            f"tracking needs OpenCV, which lacks a library of this system ({error});"
            " pip install --force-reinstall --no-deps opencv-python-headless, which does without"
        )
    return f"the package trackers cannot be imported ({error}); pip install 'glip-deploy[track]'"
