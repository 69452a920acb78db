"""What can be measured: the names of the subjects, and what each of them can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_bench.subjects.profile import Stage
    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.prompts.tokens import Prompt
    from glip_deploy.results.detections import Detections

__all__ = ["Options", "Piece", "Stopwatch", "Subject", "SubjectName"]


class SubjectName(StrEnum):
    """The forms of GLIP that can be measured, slowest first: the first one present is compared against."""

    TORCH_OFFICIAL = "torch-official"
    TORCH = "torch"
    ONNXRUNTIME_CPU = "onnxruntime-cpu"
    ONNXRUNTIME_CUDA = "onnxruntime-cuda"
    ONNXRUNTIME_TENSORRT = "onnxruntime-tensorrt"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    DETR_R50 = "detr-r50"
    GROUNDING_DINO_T = "grounding-dino-t"

    @property
    def needs_checkpoint(self) -> bool:
        """It runs the weights as released, not the exported graphs."""
        return self in (SubjectName.TORCH_OFFICIAL, SubjectName.TORCH)

    @property
    def is_yardstick(self) -> bool:
        """Another detector, measured only when asked for."""
        return self in (SubjectName.DETR_R50, SubjectName.GROUNDING_DINO_T)


class Piece(StrEnum):
    """The parts of one frame's way, in order; a subject has those it can tell apart."""

    RESIZE = "resize and canvas"
    TEXT = "text branch"
    TO_DEVICE = "host to device"
    IMAGE = "image branch"
    FROM_DEVICE = "device to host"
    SELECT = "threshold and NMS"
    WHOLE = "whole frame"


@dataclass(frozen=True)
class Options:
    """How a subject works; the same for all of one run."""

    bundle: Path
    checkpoint: Path | None = None
    shortest_side: int = 800
    longest_side: int | None = 1333
    threshold: float = 0.5
    threads: int | None = None
    yardsticks: bool = False
    """Where no subjects are named, other detectors too."""


class Subject(Protocol):
    """One form of GLIP, loaded."""

    name: SubjectName
    options: Options
    """Sides and threshold may be replaced between two runs."""
    stages: Mapping[Piece, float]
    """Seconds of each piece of the last run; the device has finished at the end of each."""

    def prepare(self, prompt: PromptText | Prompt) -> None:
        """Take in a prompt; all runs from here on look for it."""
        ...

    def run(self, frame: NDArray[np.uint8]) -> Detections:
        """Detect in one (H, W, 3) uint8 RGB frame; returns when the boxes are in host memory."""
        ...

    def run_batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detect in several frames of one size at once.

        Raises:
            GlipError: it does not take that many.
        """
        ...

    def profile(self, frame: NDArray[np.uint8], runs: int) -> Mapping[Stage, float] | None:
        """Return seconds per block of the image branch, mean of `runs`; None where it cannot tell."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Return what is peculiar to it: device, precision, tokens of the prompt as it runs them."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


class Stopwatch:
    """Times the pieces of one run.

    Args:
        wait: called before each reading of the clock: waits until the device has nothing left to do.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[Piece, float] = {}
        self._wait = wait

    @contextmanager
    def __call__(self, piece: Piece) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[piece] = time.perf_counter() - start
