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
from glip_bench.measuring.details import add_floors, time_ends, time_prompts, time_resizing
from glip_bench.measuring.frames import read_frames
from glip_bench.measuring.memory import measure_peak
from glip_bench.measuring.pace import follow
from glip_bench.measuring.sweep import Sweep, opened_once, run_sweep
from glip_bench.measuring.timing import Timing
from glip_bench.quality.agreement import compare_boxes
from glip_bench.reporting.results import SCHEMA
from glip_bench.subjects.base import Options, Piece, Subject, SubjectName
from glip_bench.subjects.open import choose, open_subjects
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import OptionError
from glip_deploy.prompts.tokens import parse_prompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.results.detections import Detections

__all__ = ["Settings", "run"]

PAUSE = 0.02
"""Seconds between two subjects: threads that wait for more work after a run must not slow the next one down."""
PACED_SECONDS = 3.0
LATE = 2.0
WEAK = 0.1
"""Score of the boxes that are compared where none is above the threshold."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    options: Options
    frames: str
    """A picture, folder, glob or video, of which the first eight frames are taken."""
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
class _Measured:
    """A subject, and what was measured of it."""

    subject: Subject
    found: Detections
    """In the first frame."""
    facts: dict[str, Any]
    """For the result file."""
    samples: dict[Piece, list[float]]
    """Milliseconds of each piece, one a round."""


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
        on_step: called with the name of each step as it begins.
        previous: an interrupted run of the same settings, to continue.

    Raises:
        GlipError: no frames, a subject unknown or absent, whatever a subject raises; `previous` has other settings.
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
    subjects: list[_Measured] = []
    try:
        for subject, seconds in open_subjects(names, settings.options, on_step):
            known = result["subjects"].get(str(subject.name), {})
            subjects.append(_begin(subject, seconds, frames[0], settings, known))
            if not subject.name.is_yardstick:  # of whose boxes nothing is expected
                subjects[-1].facts["agreement"] = _agreement(subjects[0], subjects[-1], frames[0], settings)
        _rounds(subjects, frames, settings, result, save, on_step)
        for one in subjects:
            _finish(one, frames, settings, on_step)
            save(result)
    finally:
        for one in subjects:
            one.subject.close()
    for one in subjects:  # closed by now: the processes have the machine to themselves
        if settings.budget is not None and time.perf_counter() - began > LATE * settings.budget:
            on_step("out of time: peak memory is left out")
            break
        _memory(one, settings, on_step)
        save(result)
    if settings.details:
        _details(result, subjects[0].found, frames, settings, on_step)
        save(result)
    chosen, options, prompt = settings.subjects, settings.options, settings.prompt
    with opened_once(chosen, options, on_step) as opened:
        for sweep in settings.sweeps:
            done: list[dict[str, Any]] = result.setdefault("sweeps", [])
            if not any(one["axis"] == sweep.axis and one["values"] == list(sweep.values) for one in done):
                rounds = max(3, settings.rounds // 2)
                measured = run_sweep(sweep, options, frames, prompt, rounds, opened, chosen, on_step)
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
    """Measure what lies apart from the rounds, as far as an interrupted run has not done so."""
    if "prompt_ms" not in result:
        on_step("prompts and resizing")
        result["prompt_ms"] = time_prompts(settings.options, settings.prompt)
        result["resize"] = time_resizing(frames[0], settings.options, settings.rounds)
    if "ends_ms" not in result:
        on_step("reading and drawing")
        result["ends_ms"] = time_ends(settings.frames, frames[0], found, settings.rounds)
    if "no_floor" not in result and not any("floor" in facts for facts in result["subjects"].values()):
        on_step("the hardware's limit")
        add_floors(result, Bundle.open(settings.options.bundle))


def _header(
    settings: Settings, frames: list[NDArray[np.uint8]], names: list[SubjectName], absent: dict[str, str]
) -> dict[str, Any]:
    bundle, options = Bundle.open(settings.options.bundle), settings.options
    prompt = parse_prompt(settings.prompt, bundle.tokenizer(), max_tokens=bundle.max_tokens)
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
            "fusion": bundle.manifest.config.head.fusion,
            "precision": bundle.manifest.precision,
            "checkpoint_sha256": bundle.manifest.checkpoint.sha256,
            "bundle": bundle.key,
        },
        "prompt": settings.prompt,
        "threshold": options.threshold,
        "threads": options.threads,
        "shape": {
            "batch": 1,
            "frame": list(settings.frame_size),
            "network": list(options.canvas_of(settings.frame_size)),
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
    """Raise an error if an interrupted run cannot be continued."""
    for what in ("machine", "versions", "model", "prompt", "threshold", "threads", "shape", "frames_sha256", "names"):
        old, new = previous.get(what), now[what]
        if what == "machine":
            old, new = ({**side, "cpu": processor(side["cpu"])} for side in (old or new, new))
        if old != new:
            other = what.removesuffix("_sha256")
            raise OptionError(f"--resume: the run in the file is of another {other}; start anew without --resume")


def _begin(
    subject: Subject, opened: float, frame: NDArray[np.uint8], settings: Settings, known: Mapping[str, Any]
) -> _Measured:
    """Run the first prompt and the first frame; the figures that an interrupted run has for them are kept."""
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
    return _Measured(subject, found, facts, samples)


def _agreement(first: _Measured, other: _Measured, frame: NDArray[np.uint8], settings: Settings) -> dict[str, Any]:
    """Compare what two subjects find in the first frame; weaker boxes where the first finds none."""
    threshold = settings.options.threshold if len(first.found) else WEAK
    theirs, ours = (_boxes(one, frame, threshold, settings) for one in (first, other))
    return {
        "with": str(first.subject.name),
        "threshold": threshold,
        **compare_boxes(theirs, ours).to_dict(),
    }


def _boxes(one: _Measured, frame: NDArray[np.uint8], threshold: float, settings: Settings) -> Detections:
    """Return what a subject finds in the first frame above a threshold."""
    if threshold == settings.options.threshold:
        return one.found
    subject = one.subject
    subject.options = replace(settings.options, threshold=threshold)
    found = subject.run(frame)
    subject.options = settings.options
    return found


def _rounds(
    subjects: Sequence[_Measured],
    frames: Sequence[NDArray[np.uint8]],
    settings: Settings,
    result: dict[str, Any],
    save: Callable[[Mapping[str, Any]], None],
    on_step: Callable[[str], None],
) -> None:
    """Run every subject once a round, A B A B ..., all on the same frame."""
    began = time.perf_counter()
    for number in range(result["rounds_done"], settings.rounds):
        over = settings.budget is not None and time.perf_counter() - began > settings.budget
        if over and result["rounds_done"]:
            on_step(f"out of time after {result['rounds_done']} rounds of {settings.rounds}")
            break
        on_step(f"round {number + 1} of {settings.rounds}")
        for one in subjects:
            time.sleep(PAUSE)
            start = time.perf_counter()
            one.subject.run(frames[number % len(frames)])
            seconds = {**one.subject.pieces, Piece.WHOLE: time.perf_counter() - start}
            for piece, value in seconds.items():
                one.samples.setdefault(piece, []).append(round(value * 1e3, 3))
        for one in subjects:
            one.facts["pieces_ms"] = {
                str(piece): {**Timing.of([ms / 1e3 for ms in values]).to_dict(), "samples": values}
                for piece, values in one.samples.items()
            }
            result["subjects"][str(one.subject.name)] = one.facts
        result["rounds_done"] = number + 1
        save(result)


def _finish(
    one: _Measured, frames: Sequence[NDArray[np.uint8]], settings: Settings, on_step: Callable[[str], None]
) -> None:
    """Measure what needs no taking of turns; each step only if an interrupted run has not done it."""
    subject, facts = one.subject, one.facts
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


def _memory(one: _Measured, settings: Settings, on_step: Callable[[str], None]) -> None:
    if settings.memory and "peak_resident_bytes" not in one.facts:
        name = one.subject.name
        on_step(f"{name}: peak memory")
        peak = measure_peak(name, settings.options, settings.prompt, settings.frame_size)
        one.facts |= {"peak_resident_bytes": peak.resident, "peak_device_bytes": peak.device}
