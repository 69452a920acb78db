"""One measurement: the same frames and prompt through every subject in turn, saved after every round."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from glip_bench.machine.gpus import describe_gpus
from glip_bench.machine.host import describe_machine, processor, versions
from glip_bench.measuring.details import add_floors, crop_to, time_ends, time_prompts, time_resizing
from glip_bench.measuring.memory import measure_peak
from glip_bench.measuring.pace import follow
from glip_bench.measuring.sweep import Sweep, run_sweep
from glip_bench.measuring.timing import Timing
from glip_bench.quality.agreement import compare_boxes
from glip_bench.reporting.results import SCHEMA
from glip_bench.subjects.base import Options, Piece, Subject, SubjectName
from glip_bench.subjects.open import choose, open_subjects
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import GlipError
from glip_deploy.frames import make_canvas
from glip_deploy.prompts.tokens import parse_prompt
from glip_deploy.video.open import open_source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.results.detections import Detections

__all__ = ["Settings", "read_frames", "run"]

FRAMES = 8
PAUSE = 0.02  # seconds; threads that spin for more work after a run must not slow the next subject down
PACED_SECONDS = 3.0
LATE = 2.0
WEAK = 0.1  # boxes above it are compared where none is above the threshold


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    options: Options
    frames: str
    """A picture, folder, glob or video; the first eight frames of it."""
    prompt: str | list[str]
    subjects: tuple[str, ...] | None = None
    """None for every one that can run."""
    frame_size: tuple[int, int] = (960, 1600)
    """(height, width) of the frames, in pixels; 960x1600 is resized to 800x1333, a canvas of 800x1344."""
    rounds: int = 7
    budget: float | None = None
    """Seconds after which no further round begins, and, twice as many, no measuring of memory; None for no limit."""
    frame_rate: float | None = None
    memory: bool = True
    details: bool = True
    """Blocks of the image branch, cost of prompts, resizing, reading and drawing, the hardware's limit."""
    sweeps: tuple[Sweep, ...] = ()


@dataclass
class _Progress:
    """What was measured of one subject."""

    subject: Subject
    found: Detections
    """In the first frame."""
    facts: dict[str, Any]
    """For the result file."""
    samples: dict[Piece, list[float]]
    """Milliseconds of each piece, one a round."""


def read_frames(spec: str, size: tuple[int, int], count: int = FRAMES) -> list[NDArray[np.uint8]]:
    """Read the first frames of a source, each cropped and resized to (height, width).

    Raises:
        GlipError: there is no such source, or not one frame in it.
    """
    with open_source(spec, max_frames=count) as source:
        frames = [crop_to(frame.image, size) for frame in source]
    if not frames:
        raise GlipError(f"{spec} gave no frames; name a picture, a folder of pictures or a video")
    return frames


def run(
    settings: Settings,
    save: Callable[[Mapping[str, Any]], None] = lambda result: None,
    on_step: Callable[[str], None] = lambda step: None,
    previous: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure and return a result file's content.

    Args:
        settings: see `Settings`.
        save: given the result so far after every round and every later step.
        on_step: told what begins.
        previous: an interrupted run of the same settings, to be gone on with.

    Raises:
        GlipError: no frames, a subject unknown or absent, whatever a subject raises; `previous` is of other settings.
    """
    began = time.perf_counter()
    names, absent = choose(settings.subjects, settings.options)
    frames = read_frames(settings.frames, settings.frame_size)
    result = _header(settings, frames, names, absent)
    if previous is not None:
        _check_same(previous, result)
        result["rounds_done"] = previous["rounds_done"]
        result["subjects"] = previous["subjects"]
        kept = ("prompt_ms", "resize", "ends_ms", "sweeps")
        result |= {key: previous[key] for key in kept if key in previous}
    everyone: list[_Progress] = []
    compared = settings.options.threshold
    try:
        for subject, seconds in open_subjects(names, settings.options, on_step):
            known = result["subjects"].get(str(subject.name), {})
            everyone.append(_begin(subject, seconds, frames[0], settings, known))
            first = everyone[0]
            if subject.name.is_yardstick:  # other boxes are no fault
                continue
            if first is everyone[-1] and not len(first.found):  # nothing to compare: weaker boxes have to do
                compared = WEAK
            theirs, ours = (_boxes(one, frames[0], compared, settings) for one in (first, everyone[-1]))
            agreement = compare_boxes(theirs, ours)
            everyone[-1].facts["agreement"] = {
                "with": str(first.subject.name),
                "threshold": compared,
                **agreement.to_dict(),
            }
        _rounds(everyone, frames, settings, result, save, on_step)
        for progress in everyone:
            _finish(progress, frames, settings, on_step)
            save(result)
    finally:
        for progress in everyone:
            progress.subject.close()
    for progress in everyone:  # closed by now: the processes have the machine to themselves
        if settings.budget is not None and time.perf_counter() - began > LATE * settings.budget:
            on_step("out of time: peak memory is left out")
            break
        _memory(progress, settings, on_step)
        save(result)
    if settings.details:
        _details(result, everyone[0].found, frames, settings, on_step)
        save(result)
    for sweep in settings.sweeps:
        done: list[dict[str, Any]] = result.setdefault("sweeps", [])
        if not any(one["axis"] == sweep.axis and one["values"] == list(sweep.values) for one in done):
            rounds = max(3, settings.rounds // 2)
            measured = run_sweep(sweep, settings.options, frames, settings.prompt, rounds, settings.subjects, on_step)
            done.append({**measured, "values": list(sweep.values)})
            save(result)
    result["complete"] = True
    save(result)
    return result


def _details(
    result: dict[str, Any],
    found: Detections,
    frames: Sequence[NDArray[np.uint8]],
    settings: Settings,
    on_step: Callable[[str], None],
) -> None:
    """What is measured apart from the rounds; of a run gone on with, only what it lacks."""
    if "prompt_ms" not in result:
        on_step("prompts and resizing")
        result["prompt_ms"] = time_prompts(settings.options, settings.prompt)
        result["resize"] = time_resizing(frames[0], settings.options, settings.rounds)
    if "ends_ms" not in result:
        on_step("reading and drawing")
        result["ends_ms"] = time_ends(settings.frames, frames[0], found, settings.rounds)
    if not any("floor" in facts for facts in result["subjects"].values()):
        on_step("the hardware's limit")
        add_floors(result, Bundle.open(settings.options.bundle))


def _header(
    settings: Settings, frames: list[NDArray[np.uint8]], names: list[SubjectName], absent: dict[str, str]
) -> dict[str, Any]:
    bundle, options = Bundle.open(settings.options.bundle), settings.options
    prompt = parse_prompt(settings.prompt, bundle.tokenizer(), max_tokens=bundle.max_tokens)
    canvas = make_canvas(
        frames[:1], color="rgb", shortest_side=options.shortest_side, longest_side=options.longest_side
    )
    return {
        "schema": SCHEMA,
        "kind": "detection",
        "complete": False,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "gpus": [gpu.to_dict() for gpu in describe_gpus()],
        "versions": versions(),
        "model": {
            "variant": bundle.variant,
            "fusion": bool(bundle.manifest["config"]["head"]["fusion"]),
            "precision": bundle.manifest.get("precision"),
            "checkpoint_sha256": bundle.manifest["checkpoint"]["sha256"],
            "bundle": bundle.key,
        },
        "prompt": settings.prompt,
        "threshold": options.threshold,
        "threads": options.threads,
        "shape": {
            "batch": 1,
            "frame": list(settings.frame_size),
            "network": [int(side) for side in canvas.frames.shape[1:3]],
            "tokens": len(prompt.input_ids),
            "classes": len(prompt),
        },
        "frames_sha256": hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest(),
        "names": [str(name) for name in names],
        "absent": absent,
        "rounds_done": 0,
        "subjects": {},
    }


def _check_same(previous: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise where an interrupted run cannot be gone on with."""
    for what in ("machine", "versions", "model", "prompt", "threshold", "threads", "shape", "frames_sha256", "names"):
        old, new = previous.get(what), now[what]
        if what == "machine":
            old, new = ({**side, "cpu": processor(side["cpu"])} for side in (old or new, new))
        if old != new:
            raise GlipError(f"--resume: the run in the file is of another {what.removesuffix('_sha256')}; start anew")


def _begin(
    subject: Subject, opened: float, frame: NDArray[np.uint8], settings: Settings, known: Mapping[str, Any]
) -> _Progress:
    """First prompt, first frame, and the boxes in it; of a run gone on with, its figures for these are kept."""
    start = time.perf_counter()
    subject.prepare(settings.prompt)
    prepared = time.perf_counter()
    found = subject.run(frame)
    first = time.perf_counter() - prepared
    facts = {
        **subject.describe(),
        "open_seconds": round(opened, 3),
        "first_prompt_seconds": round(prepared - start, 3),
        "first_frame_seconds": round(first, 3),
        "detections": len(found),
        **known,
    }
    samples = {Piece(name): list(timing["samples"]) for name, timing in known.get("pieces_ms", {}).items()}
    return _Progress(subject, found, facts, samples)


def _boxes(progress: _Progress, frame: NDArray[np.uint8], threshold: float, settings: Settings) -> Detections:
    """Return what a subject finds in the first frame above a threshold."""
    if threshold == settings.options.threshold:
        return progress.found
    subject = progress.subject
    subject.options = replace(settings.options, threshold=threshold)
    found = subject.run(frame)
    subject.options = settings.options
    return found


def _rounds(
    everyone: Sequence[_Progress],
    frames: Sequence[NDArray[np.uint8]],
    settings: Settings,
    result: dict[str, Any],
    save: Callable[[Mapping[str, Any]], None],
    on_step: Callable[[str], None],
) -> None:
    """A B A B ...: every subject once a round, all on the same frame."""
    began = time.perf_counter()
    for number in range(result["rounds_done"], settings.rounds):
        over = settings.budget is not None and time.perf_counter() - began > settings.budget
        if over and result["rounds_done"]:
            on_step(f"out of time after {result['rounds_done']} rounds of {settings.rounds}")
            break
        on_step(f"round {number + 1} of {settings.rounds}")
        for progress in everyone:
            time.sleep(PAUSE)
            start = time.perf_counter()
            progress.subject.run(frames[number % len(frames)])
            seconds = {**progress.subject.stages, Piece.WHOLE: time.perf_counter() - start}
            for piece, value in seconds.items():
                progress.samples.setdefault(piece, []).append(round(value * 1e3, 3))
        for progress in everyone:
            progress.facts["pieces_ms"] = {
                str(piece): {**Timing.of([ms / 1e3 for ms in values]).to_dict(), "samples": values}
                for piece, values in progress.samples.items()
            }
            result["subjects"][str(progress.subject.name)] = progress.facts
        result["rounds_done"] = number + 1
        save(result)


def _finish(
    progress: _Progress, frames: Sequence[NDArray[np.uint8]], settings: Settings, on_step: Callable[[str], None]
) -> None:
    """What needs no taking of turns; each step only if an earlier run has not done it."""
    subject, facts = progress.subject, progress.facts
    if settings.frame_rate is not None and facts.get("frame_rate", {}).get("rate") != settings.frame_rate:
        on_step(f"{subject.name} at {settings.frame_rate:g} frames a second")
        count = max(3, round(settings.frame_rate * PACED_SECONDS))
        pace = follow(lambda index: subject.run(frames[index % len(frames)]), settings.frame_rate, count)
        facts["frame_rate"] = pace.to_dict()
    if settings.details and "stages_ms" not in facts:
        on_step(f"{subject.name} block by block")
        stages = subject.profile(frames[0], max(1, min(3, settings.rounds // 2)))
        facts["stages_ms"] = (
            None if stages is None else {str(name): round(seconds * 1e3, 3) for name, seconds in stages.items()}
        )


def _memory(progress: _Progress, settings: Settings, on_step: Callable[[str], None]) -> None:
    if settings.memory and "peak_resident_bytes" not in progress.facts:
        name = progress.subject.name
        on_step(f"{name}: peak memory")
        peak = measure_peak(name, settings.options, settings.prompt, settings.frame_size)
        progress.facts |= {"peak_resident_bytes": peak.resident, "peak_device_bytes": peak.device}
