"""What glip-bench's options set in motion."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glip_deploy.errors import GlipError

__all__ = ["dispatch"]

Step = Callable[[str], None]

# 14 tokens, as the reference timings of the official code have.
PROMPT = "person. bicycle. car. traffic light. hair drier"


@dataclass(frozen=True)
class Quick:
    """What --quick measures where nothing is named."""

    bundle: str
    checkpoint: str | None = None
    frames: str | None = None
    prompt: str | None = None


# `make demo` leaves them there. GLIP-nano knows pictograms, and is small enough for the forms in torch.
QUICK = (
    Quick(
        "build/demo/glip_nano",
        "examples/nano/glip_nano.pth",
        "examples/nano/media/scene.jpg",
        "dog. red apple. bicycle. guitar. penguin. owl",
    ),
    Quick("build/demo/glip_t"),
)
SLOWER = 3  # exit status
QUICK_SECONDS = 20.0  # of rounds; opening and measuring the memory take about as long again


def dispatch(args: argparse.Namespace, on_step: Step) -> tuple[str, int]:
    """Do what the options ask for.

    Args:
        args: of the program's parser.
        on_step: told what begins.

    Returns:
        (text for stdout, exit status).

    Raises:
        GlipError: anything the user can put right.
    """
    from glip_bench.reporting.report import check_folder
    from glip_bench.reporting.results import check_target

    if args.table is not None:
        return _table(args), 0
    if args.compare is not None and len(args.compare) == 2:
        return _compare(*args.compare)
    check_target(args.json)
    check_folder(args.report)
    if args.resume and args.json is None:
        raise GlipError("--resume goes on with the run in a result file; name it with --json FILE")
    if args.floor is not None:
        return _floor(args), 0
    if args.accuracy is not None or args.grounding is not None:
        return _accuracy(args, on_step), 0
    return _measure(args, on_step)


def _measure(args: argparse.Namespace, on_step: Step) -> tuple[str, int]:
    from glip_bench.measuring.run import run
    from glip_bench.reporting.results import read_result, write_result
    from glip_bench.reporting.text import render

    previous = read_result(args.json) if args.resume else None
    if previous is not None and previous["complete"]:
        on_step(f"{args.json} is complete; only what it lacks is measured")

    def save(result: Mapping[str, Any]) -> None:
        if args.json is not None:
            write_result(args.json, result)

    old = None if args.compare is None else read_result(args.compare[0])  # may be the very file --json names
    result = run(_settings(args), save, on_step, previous)
    text, status = render(result), 0
    if args.report is not None:
        from glip_bench.reporting.report import write_report

        text += f"\n\nreport: {write_report(result, args.report)}"
    if old is not None:
        verdict, status = _compared(old, result, args.compare[0])
        text += f"\n\n{verdict}"
    return text, status


def _compare(old: Path, new: Path) -> tuple[str, int]:
    from glip_bench.reporting.results import read_result

    return _compared(read_result(old), read_result(new), old)


def _compared(old: Mapping[str, Any], new: Mapping[str, Any], name: Path) -> tuple[str, int]:
    from glip_bench.reporting.compare import compare, render_comparison

    changes, remarks = compare(old, new)
    return render_comparison(changes, remarks, name), SLOWER if any(change.worse for change in changes) else 0


def _table(args: argparse.Namespace) -> str:
    from glip_bench.reporting.paper import PAPER, measured_rows, paper_table, results_folder

    folder = results_folder() if args.results is None else args.results
    if not folder.is_dir():
        raise GlipError(f"--results {folder} is not a folder; name the one with result files")
    rows, left_out = measured_rows(folder)
    return paper_table([*PAPER, *rows], left_out)


def _settings(args: argparse.Namespace) -> Any:
    from glip_bench.measuring.run import Settings
    from glip_bench.measuring.sweep import parse_sweep

    options = _options(args)
    return Settings(
        options=options,
        frames=args.frames if args.frames is not None else str(_own_picture()),
        prompt=args.prompt or PROMPT,
        subjects=_subjects(args),
        frame_size=args.frame,
        rounds=args.runs or (5 if args.quick else 7),
        budget=QUICK_SECONDS if args.quick else None,
        frame_rate=args.frame_rate,
        memory=not args.no_memory,
        details=not (args.no_details or args.quick),
        sweeps=tuple(parse_sweep(text) for text in args.sweep),
    )


def _subjects(args: argparse.Namespace) -> tuple[str, ...] | None:
    return None if args.subjects is None else tuple(s.strip() for s in args.subjects.split(",") if s.strip())


def _options(args: argparse.Namespace) -> Any:
    from glip_bench.subjects.base import Options

    if args.longest_side < 0:
        raise GlipError(f"longest_side is {args.longest_side}; legal is 1 or more pixels, or 0 for no limit")
    return Options(
        bundle=_bundle(args),
        checkpoint=args.checkpoint,
        shortest_side=args.shortest_side or (320 if args.quick else 800),
        longest_side=args.longest_side or None,
        threshold=args.threshold,
        threads=args.threads,
        yardsticks=args.yardsticks,
    )


def _accuracy(args: argparse.Namespace, on_step: Step) -> str:
    """Measure accuracy; what was found lies in a folder beside the result file, so that a run can be gone on with."""
    import shutil
    import tempfile

    from glip_bench.quality.accuracy import Task, measure, render_accuracy
    from glip_bench.reporting.results import write_result

    if args.accuracy is not None and args.grounding is not None:
        raise GlipError("--accuracy and --grounding are two measurements; name one")
    if args.images is None:
        raise GlipError("the pictures' folder is not named; give it with --images DIR")
    annotations = args.accuracy if args.accuracy is not None else args.grounding
    task = Task(
        options=_options(args),
        subjects=_subjects(args),
        annotations=annotations,
        images=args.images,
        grounding=args.grounding is not None,
        limit=args.limit,
        classes_a_prompt=args.classes_per_prompt,
    )
    if args.json is None:
        with tempfile.TemporaryDirectory() as work:
            return render_accuracy(measure(task, Path(work), on_step=on_step))
    work_folder = args.json.with_name(args.json.name + ".work")
    result = measure(task, work_folder, args.resume, on_step)
    write_result(args.json, result)
    shutil.rmtree(work_folder, ignore_errors=True)
    return render_accuracy(result)


def _bundle(args: argparse.Namespace) -> Path:
    if args.model is not None:
        return Path(args.model)
    if not args.quick:
        raise GlipError("no model is named; give the bundle that glip-export wrote with --model DIR")
    for quick in QUICK:
        if (Path(quick.bundle) / "manifest.json").is_file():
            args.checkpoint = args.checkpoint or _if_there(quick.checkpoint)
            if args.frames is None and _if_there(quick.frames) is not None:
                args.frames = quick.frames
                args.prompt = args.prompt or quick.prompt
            return Path(quick.bundle)
    places = ", ".join(quick.bundle for quick in QUICK)
    raise GlipError(f"--quick finds no bundle in {places}; run `make demo`, or name one with --model")


def _if_there(file: str | None) -> Path | None:
    return Path(file) if file is not None and Path(file).is_file() else None


def _own_picture() -> Path:
    """Find the photograph that travels with glip-export, without importing torch."""
    from importlib.util import find_spec

    spec = find_spec("glip_export")
    if spec is None or not spec.submodule_search_locations:
        raise GlipError("glip_export and its picture are not installed; name one with --frames")
    return Path(spec.submodule_search_locations[0]) / "data" / "picture.jpg"


def _floor(args: argparse.Namespace) -> str:
    """Count the work of one frame and say how fast a machine could do it."""
    from dataclasses import asdict

    from glip_bench.limits.floor import Shape, by_stage, count_image_branch, floor_of, hardware, measure_cpu
    from glip_bench.reporting.results import write_result
    from glip_bench.reporting.text import render_floor
    from glip_deploy import Bundle
    from glip_deploy.frames.geometry import network_size
    from glip_deploy.prompts.tokens import parse_prompt

    machine = None if args.floor.lower() == "cpu" else hardware(args.floor)  # a wrong name fails before the work
    bundle = Bundle.open(_bundle(args))
    prompt = parse_prompt(args.prompt or PROMPT, bundle.tokenizer(), max_tokens=bundle.max_tokens)
    resized = network_size(args.frame[0], args.frame[1], args.shortest_side or 800, args.longest_side or None)
    height, width = (-(-side // 32) * 32 for side in resized)
    shape = Shape(height, width, tokens=len(prompt.input_ids), classes=len(prompt))
    work = count_image_branch(bundle, shape)
    machine = machine or measure_cpu()
    precision = "fp32" if machine.name == "cpu" else "fp16"
    result = {
        "kind": "floor",
        "variant": bundle.variant,
        "shape": asdict(shape),
        "gmac_by_stage": {stage.value: round(macs / 1e9, 3) for stage, macs in by_stage(work).items()},
        "weights": sum(one.weights for one in work),
        "hardware": asdict(machine),
        "precision": precision,
        "floor_ms": {
            name: round(seconds * 1e3, 4) for name, seconds in asdict(floor_of(work, shape, machine, precision)).items()
        },
    }
    if args.json is not None:
        write_result(args.json, result)
    return render_floor(result)
