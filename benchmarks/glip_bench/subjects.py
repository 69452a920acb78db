"""What can be measured: each form of GLIP behind the same four calls, and why one is not there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_bench.stages import Stage
    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.prompts.tokens import Prompt
    from glip_deploy.results.detections import Detections

__all__ = ["Options", "Piece", "Stopwatch", "Subject", "SubjectName", "absence", "choose", "open_subjects"]


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


def absence(name: SubjectName, options: Options) -> str | None:
    """Say in a line why a subject cannot run here; None where it can.

    Only looks: nothing is loaded but ONNX Runtime's list of providers.
    """
    if name.needs_checkpoint:
        return _torch_absence(options.checkpoint)
    if name.is_yardstick:
        from glip_bench.subject_yardstick import yardstick_absence

        return yardstick_absence()
    if name in (SubjectName.TENSORRT, SubjectName.TENSORRT_RTX):
        from glip_bench.subject_engine import engine_absence

        return engine_absence(name, options.bundle)
    from glip_bench.subject_onnx import provider_absence

    return provider_absence(name)


def _torch_absence(checkpoint: Path | None) -> str | None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        return "torch is not installed; pip install 'glip-deploy[export]'"
    if find_spec("glip_export") is None:
        return "glip_export is not installed; pip install 'glip-deploy[export]'"
    if checkpoint is None:
        return "it runs the released weights; name them with --checkpoint glip_t.pth"
    return None


def choose(names: Sequence[str] | None, options: Options) -> tuple[list[SubjectName], dict[str, str]]:
    """Decide what runs.

    Args:
        names: asked for, in order; None for every one that can run.
        options: see `Options`.

    Returns:
        (those that run, reason by name of those that cannot).

    Raises:
        GlipError: an unknown name, or one asked for that cannot run, or none that can.
    """
    legal = ", ".join(SubjectName)
    if names is not None:
        wanted = []
        for name in dict.fromkeys(names):
            if name not in SubjectName.__members__.values():
                raise GlipError(f'subject "{name}" is unknown; legal are {legal}')
            wanted.append(SubjectName(name))
        if not wanted:
            raise GlipError(f"no subjects are named; legal are {legal}")
        for one in wanted:
            reason = absence(one, options)
            if reason is not None:
                raise GlipError(f"subject {one} cannot run: {reason}")
        return wanted, {}
    reasons = {name: absence(name, options) for name in SubjectName if options.yardsticks or not name.is_yardstick}
    present = [name for name, reason in reasons.items() if reason is None]
    if not present:
        raise GlipError(f"no subject can run here; onnxruntime-cpu: {reasons[SubjectName.ONNXRUNTIME_CPU]}")
    return present, {str(name): reason for name, reason in reasons.items() if reason is not None}


def open_subjects(
    names: Sequence[SubjectName], options: Options, on_step: Callable[[str], None] = lambda step: None
) -> Iterator[tuple[Subject, float]]:
    """Load subjects one after another; gives each with the seconds that took.

    The two torch subjects share one copy of the weights, which the first of them is charged for.

    Raises:
        GlipError: a damaged bundle or checkpoint, a checkpoint that is not the bundle's, an engine that fails.
    """
    from glip_deploy.bundle.manifest import Bundle

    bundle = Bundle.open(options.bundle)
    weights: Any = None
    for name in names:
        on_step(f"open {name}")
        start = time.perf_counter()
        subject: Subject
        if name.needs_checkpoint:
            from glip_bench.subject_torch import TorchSubject, load_weights

            weights = weights or load_weights(options, bundle)
            subject = TorchSubject(name, options, bundle, weights)
        elif name.is_yardstick:
            from glip_bench.subject_yardstick import YardstickSubject

            subject = YardstickSubject(name, options, bundle)
        elif name in (SubjectName.TENSORRT, SubjectName.TENSORRT_RTX):
            from glip_bench.subject_engine import open_engine_subject

            subject = open_engine_subject(name, options, bundle)
        else:
            from glip_bench.subject_onnx import open_onnx_subject

            subject = open_onnx_subject(name, options, bundle)
        yield subject, time.perf_counter() - start
