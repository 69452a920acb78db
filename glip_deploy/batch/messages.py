"""What goes to workers and comes back from them, also through files and between machines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from glip_deploy.prompts.syntax import PromptText

__all__ = ["Found", "Outcome", "Setup", "Unit"]


class Unit(msgspec.Struct, frozen=True, array_like=True):
    """A piece of work: a picture, or some frames of a video.

    Attributes:
        path: of the file, absolute, as the system spells it (names need not be UTF-8).
        name: what results call the file.
        video: whether it is a video.
        first: of a video, the index of the first frame.
        end: of a video, the index after that of the last frame; None for all that follow.
        frames: how many frames are expected, for the progress.
    """

    path: bytes
    name: str
    video: bool = False
    first: int = 0
    end: int | None = None
    frames: int = 1


class Found(msgspec.Struct, frozen=True, array_like=True):
    """The detections in one frame.

    Attributes:
        frame: index in the file, 0 for a picture.
        time: seconds from the start of a video; None for pictures and for frames without a time stamp.
        width: of the frame, in pixels.
        height: of the frame.
        boxes: x1, y1, x2, y2 in pixels of the frame, float32 numbers; best first.
        scores: float32 numbers.
        labels: index of the class in the prompt.
    """

    frame: int
    time: float | None
    width: int
    height: int
    boxes: list[tuple[float, float, float, float]]
    scores: list[float]
    labels: list[int]


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a unit.

    Attributes:
        name: of the unit.
        first: of the unit.
        end: of the unit.
        size: bytes of the file when it was read.
        modified: when the file was changed last, in nanoseconds since 1970.
        found: by frame; empty for a failure, or where a video ends before the unit.
        failure: why it failed; empty if it did not.
        fatal: the name of an error's class and its message, where a worker cannot work at all.
        notes: warnings that were logged meanwhile.
    """

    name: str
    first: int = 0
    end: int | None = None
    size: int = 0
    modified: int = 0
    found: list[Found] = []
    failure: str = ""
    fatal: tuple[str, str] | None = None
    notes: list[str] = []

    @property
    def objects(self) -> int:
        """Detections in all frames together."""
        return sum(len(one.scores) for one in self.found)


@dataclass(frozen=True)
class Setup:
    """What every worker does, whatever the unit.

    Attributes:
        model: folder of the bundle, absolute.
        manifest_sha256: of the bundle's manifest: a worker elsewhere must find the same bundle.
        prompt: what to look for, as `Detector.encode` takes it.
        thresholds: by class.
        classes_per_prompt: as `Detector.encode` takes it.
        max_detections: as `Detector.detect` takes it.
        stride: of a video, every how many frames.
        options: for `Detector.open`.
    """

    model: str
    manifest_sha256: str
    prompt: PromptText
    thresholds: list[float]
    classes_per_prompt: int | None = None
    max_detections: int | None = None
    stride: int = 1
    options: dict[str, Any] = field(default_factory=dict)
