"""Many classes in one frame: a long list in prompts that share the backbone, against a frame for every prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import TYPE_CHECKING, Any

from glip_bench.machine.host import describe_machine, versions
from glip_bench.measuring.frames import read_frames
from glip_bench.measuring.memory import resident
from glip_bench.subjects.base import Options
from glip_deploy.detector import Detector
from glip_deploy.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.prompts.encoded import EncodedPrompt

__all__ = ["ClassList", "measure_classes", "render_classes"]


@dataclass(frozen=True)
class ClassList:
    """What is measured.

    Attributes:
        options: of the bundle, on ONNX Runtime's CPU provider.
        names: the classes.
        classes_per_prompt: as `Detector.encode` takes it.
        frames: a source, of which the first frame is taken.
        frame_size: (height, width) of the frame, in pixels.
        rounds: so many times each.
        sample: time only so many of the prompts, spread evenly over the list; None for all of them.
    """

    options: Options
    names: Sequence[str]
    classes_per_prompt: int | None
    frames: str
    frame_size: tuple[int, int]
    rounds: int
    sample: int | None


@dataclass
class _Times:
    """Seconds by round: of the clock, and of the processors, which other work on the machine disturbs less."""

    wall: list[float]
    processor: list[float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "wall": [round(value, 3) for value in self.wall],
            "processor": [round(value, 3) for value in self.processor],
        }


def measure_classes(what: ClassList, on_step: Callable[[str], None] = lambda step: None) -> dict[str, Any]:
    """Measure and return a result file's content.

    Three things are timed in turn, A B C A B C ...: one prompt, and all timed prompts, in one frame with the parts of
    the image branch; and each of these prompts in a frame of its own with the whole image graph. Where only a sample
    is timed, the seconds of all prompts follow from one prompt and from what each further one adds.

    Raises:
        OptionError: the bundle lacks the two parts.
        GlipError: whatever the detector raises.
    """
    (frame, *_) = read_frames(what.frames, what.frame_size)
    with ExitStack() as opened:
        parts = opened.enter_context(_open(what.options))
        if not parts.bundle.is_split:
            raise OptionError(f"bundle {what.options.bundle} lacks backbone.onnx and head.onnx; export it again")
        on_step("prompts")
        prompt = parts.encode(list(what.names), classes_per_prompt=what.classes_per_prompt)
        chosen = _chosen(prompt.chunks, what.sample)
        on_step(f"memory and first frame, {len(chosen)} of {len(prompt.chunks)} prompts")
        parts.detect_prompts(frame, [*chosen, chosen[0]], what.options.threshold, color="rgb")
        peak = resident()
        whole = opened.enter_context(_open(what.options))  # after the memory of the parts is known
        whole.detect(frame, chosen[0], what.options.threshold, color="rgb")
        times = {name: _Times([], []) for name in ("one", "together", "apart")}
        for number in range(what.rounds):
            on_step(f"round {number + 1} of {what.rounds}")
            _time(times["one"], lambda: parts.detect(frame, chosen[0], what.options.threshold, color="rgb"))
            _time(times["together"], lambda: parts.detect_prompts(frame, chosen, what.options.threshold, color="rgb"))
            _time(times["apart"], lambda: _apart(whole, frame, chosen, what.options.threshold))
    return {
        "schema": 1,
        "kind": "classes",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "versions": versions(),
        "model": {"variant": parts.bundle.variant, "checkpoint_sha256": parts.bundle.manifest.checkpoint.sha256},
        "threads": what.options.threads,
        "frame": list(what.frame_size),
        "network": list(what.options.canvas_of(what.frame_size)),
        "classes": len(prompt.phrases),
        "prompts": len(prompt.chunks),
        "tokens": [len(chunk.embedding) for chunk in prompt.chunks],
        "timed_tokens": [len(chunk.embedding) for chunk in chosen],
        "seconds": {name: value.to_dict() for name, value in times.items()},
        "frame_seconds": {
            kind: _totals({name: getattr(value, kind) for name, value in times.items()}, prompt, chosen)
            for kind in ("wall", "processor")
        },
        "peak_resident_bytes": peak,
    }


def _open(options: Options) -> Detector:
    return Detector.open(
        options.bundle,
        shortest_side=options.shortest_side,
        longest_side=options.longest_side,
        threads=options.threads,
        cache_dir=None,
    )


def _chosen(chunks: Sequence[EncodedPrompt], sample: int | None) -> list[EncodedPrompt]:
    count = min(sample or len(chunks), len(chunks))
    return [chunks[(2 * i + 1) * len(chunks) // (2 * count)] for i in range(count)]


def _apart(detector: Detector, frame: NDArray[np.uint8], prompts: Sequence[EncodedPrompt], threshold: float) -> None:
    for prompt in prompts:
        detector.detect(frame, prompt, threshold, color="rgb")


def _time(times: _Times, work: Callable[[], object]) -> None:
    clocks = time.perf_counter(), time.process_time()
    work()
    times.wall.append(time.perf_counter() - clocks[0])
    times.processor.append(time.process_time() - clocks[1])


def _totals(seconds: dict[str, list[float]], prompt: EncodedPrompt, chosen: Sequence[EncodedPrompt]) -> dict[str, Any]:
    """Return seconds a frame for all prompts together and apart: minimum and median over the rounds."""
    timed, count = len(chosen), len(prompt.chunks)
    together, apart = [], []
    for one, several, each in zip(seconds["one"], seconds["together"], seconds["apart"], strict=True):
        further = (several - one) / (timed - 1) if timed > 1 else 0.0
        together.append(several + further * (count - timed))
        apart.append(each / timed * count)
    ratio = [ours / theirs for ours, theirs in zip(together, apart, strict=True)]
    return {
        name: {"minimum": round(min(values), 3), "median": round(median(values), 3)}
        for name, values in (("together", together), ("apart", apart), ("ratio", ratio))
    }


def render_classes(result: dict[str, Any]) -> str:
    """Return the result as text."""
    height, width = result["network"]
    timed, count = len(result["timed_tokens"]), result["prompts"]
    lines = [
        f"{result['model']['variant']}, {result['classes']} classes in {count} prompts of up to"
        f" {max(result['tokens'])} tokens, {height}x{width}",
        f"{timed} of {count} prompts timed" + ("" if timed == count else "; the figures for all are calculated"),
        f"peak memory {result['peak_resident_bytes'] / 1e9:.2f} GB",
        f"{'seconds a frame, minimum (median)':<36}{'together':>20}{'a frame each':>20}{'ratio':>16}",
    ]
    for kind, name in (("wall", "clock"), ("processor", "processors")):
        cells = [
            f"{result['frame_seconds'][kind][key]['minimum']:.2f} ({result['frame_seconds'][kind][key]['median']:.2f})"
            for key in ("together", "apart", "ratio")
        ]
        lines.append(f"{name:<36}{cells[0]:>20}{cells[1]:>20}{cells[2]:>16}")
    return "\n".join(lines)
