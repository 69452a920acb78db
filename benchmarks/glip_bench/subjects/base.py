"""What can be measured: the names of the subjects, and what each of them does."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.detector import FrameStep
from glip_deploy.errors import PromptError
from glip_deploy.frames.geometry import canvas_size, network_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.prompts.tokens import Prompt
    from glip_deploy.results.detections import Detections

__all__ = ["Options", "Piece", "Stopwatch", "Subject", "SubjectName"]


class SubjectName(StrEnum):
    """The forms of GLIP that can be measured, slowest first: the others are compared with the first that is present."""

    TORCH_OFFICIAL = "torch-official"
    TORCH = "torch"
    ONNXRUNTIME_CPU = "onnxruntime-cpu"
    ONNXRUNTIME_CUDA = "onnxruntime-cuda"
    ONNXRUNTIME_TENSORRT = "onnxruntime-tensorrt"
    ONNXRUNTIME_NV_TENSORRT_RTX = "onnxruntime-nv-tensorrt-rtx"
    OPENVINO = "openvino"
    OPENVINO_BF16 = "openvino-bf16"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    DETR_R50 = "detr-r50"
    GROUNDING_DINO_T = "grounding-dino-t"

    @property
    def needs_checkpoint(self) -> bool:
        """Whether it runs the weights as released, not the exported graphs."""
        return self in (SubjectName.TORCH_OFFICIAL, SubjectName.TORCH)

    @property
    def is_yardstick(self) -> bool:
        """Whether it is another detector, which is measured only when asked for."""
        return self in (SubjectName.DETR_R50, SubjectName.GROUNDING_DINO_T)


class Piece(StrEnum):
    """The parts of a frame's way through a subject, in order; a subject has those that it can tell apart."""

    RESIZE = FrameStep.RESIZE
    TEXT = "text branch"
    TO_DEVICE = "host to device"
    IMAGE = FrameStep.IMAGE
    FROM_DEVICE = "device to host"
    SELECT = FrameStep.SELECT
    WHOLE = "whole frame"


@dataclass(frozen=True)
class Options:
    """How a subject works; the same for all subjects of a run."""

    bundle: Path
    checkpoint: Path | None = None
    shortest_side: int = 800
    """Pixels; frames are resized to it."""
    longest_side: int | None = 1333
    """Pixels; None for no limit."""
    threshold: float = 0.5
    threads: int | None = None
    """CPU threads; None for one a core."""
    trusted: bool = True
    """False refuses native code of the bundle: engines, plugin libraries."""
    plugins: bool = True
    """False loads no plugin library."""
    max_detections: int | None = None
    """Of a picture and prompt; None for as many as the bundle says."""
    yardsticks: bool = False
    """Whether other detectors run too where no subjects are named."""

    def canvas_of(self, frame_size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width), in pixels, of the network's input for one frame of (height, width)."""
        return canvas_size([network_size(*frame_size, self.shortest_side, self.longest_side)])


class Subject(ABC):
    """One form of GLIP, loaded.

    Attributes:
        name: which one.
        options: sides and threshold may be replaced between two runs.
        pieces: seconds of each piece of the last run; a device has finished its work at the end of each.
    """

    def __init__(self, name: SubjectName, options: Options) -> None:
        self.name = name
        self.options = options
        self.pieces: Mapping[Piece, float] = {}

    @abstractmethod
    def prepare(self, prompt: PromptText | Prompt) -> None:
        """Take in a prompt; all runs from here on look for it."""

    def run(self, frame: NDArray[np.uint8]) -> Detections:
        """Detect in one (H, W, 3) uint8 RGB frame; return when the boxes are in host memory."""
        return self.run_batch([frame])[0]

    @abstractmethod
    def run_batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detect in several frames of one size at once.

        Raises:
            PromptError: the subject does not take that many, or no prompt was prepared.
        """

    shares_frames = False
    """Whether `run_prompts` does what several prompts have in common once for a frame."""

    def run_prompts(self, frame: NDArray[np.uint8], prompts: Sequence[PromptText | Prompt]) -> list[Detections]:
        """Detect what each of several prompts names in one frame, as `run` takes it."""
        found = []
        for prompt in prompts:
            self.prepare(prompt)
            found.append(self.run(frame))
        return found

    def profile(self, frame: NDArray[np.uint8], runs: int) -> Mapping[str, float] | None:
        """Return the seconds that each block of the image branch takes in a frame, mean of `runs`; None if unknown."""
        return None

    @abstractmethod
    def describe(self) -> Mapping[str, Any]:
        """Return what is particular to the subject: device, precision, tokens of the prompt as it runs them."""

    @abstractmethod
    def close(self) -> None:
        """Free its memory."""

    def _no_prompt(self) -> PromptError:
        return PromptError(f"{self.name} has no prompt yet; call prepare first")


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
