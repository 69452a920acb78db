"""`glip-bench`: how fast, how much memory, how right, and where the time goes, on the machine at hand."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glip_bench.cli import options as opt
from glip_bench.cli.inputs import Inputs, find_inputs, own_picture
from glip_deploy.cli.app import VERSION, bad_option, examples, make_app, run_app
from glip_deploy.cli.console import say
from glip_deploy.errors import OptionError
from glip_deploy.files import check_file

if TYPE_CHECKING:
    from glip_bench.measuring.run import Settings
    from glip_bench.subjects.base import Options

__all__ = ["main"]

PROGRAM = "glip-bench"
SLOWER = 3
"""Exit status where a new result is worse than an old one."""
QUICK_SECONDS = 20.0
"""Of rounds with --quick; opening and measuring the memory take about as long again."""
FRAME_SIZE = opt.FrameSize(960, 1600)
SIDE, QUICK_SIDE = 800, 320
ROUNDS, QUICK_ROUNDS = 7, 5

OLD_OPTIONS = {"--accuracy": "accuracy", "--grounding": "grounding", "--floor": "floor", "--table": "paper"}
"""What stood for a command before there were commands."""

app = make_app(
    help="Measure each form of GLIP that can run here, piece by piece.",
    epilog=examples(
        "glip-bench run --quick",
        "glip-bench run --model glip_t/ --checkpoint glip_t.pth --runs 20 --json result.json",
        "glip-bench run --model glip_t/ --frames video.mp4 --frame 1920x1080 --frame-rate 30",
        "glip-bench sweep tokens=8,16,32,64,128,256 --model glip_t/ --report report/",
        "glip-bench classes names.txt --model glip_t/ --classes-per-prompt 40",
        "glip-bench compare old.json new.json",
        "glip-bench floor A100 --model glip_t/",
        "glip-bench paper",
        "glip-bench accuracy instances_val2017.json --images val2017/ --model glip_t/ --json accuracy.json",
        "glip-bench grounding flickr30k/test.txt --images flickr30k-images/ --model glip_t/",
        note="exit status: 0 done, 1 an error, 2 bad usage, 3 worse than an old result, 130 interrupted",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit status: 0 done, 1 an error with a one-line message, 2 bad usage, 3 a result worse than the one it is
        compared with, 130 after Ctrl-C.
    """
    return run_app(app, PROGRAM, with_command(sys.argv[1:] if argv is None else argv), extra="bench")


def with_command(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with a command in front: options alone mean one too, as before there were commands."""
    given = list(arguments)
    if not given or not given[0].startswith("-") or given[0] in ("-h", "--help", "--version"):
        return given
    for index, word in enumerate(given):
        option, equals, value = word.partition("=")
        rest = [*given[:index], *([value] if equals else []), *given[index + 1 :]]
        if option == "--table":
            rest = [other for other in rest if other != "paper"]
        if option in OLD_OPTIONS:
            return [OLD_OPTIONS[option], *rest]
        if option == "--compare" and sum(not other.startswith("-") for other in rest[index : index + 2]) == 2:
            return ["compare", *rest]
    return ["run", *given]


@app.callback()
def _root(version: VERSION = False) -> None:
    pass


@app.command()
def run(
    model: opt.Model = None,
    checkpoint: opt.Checkpoint = None,
    subjects: opt.Subjects = None,
    yardsticks: opt.Yardsticks = False,
    frames: opt.Frames = None,
    frame: opt.Frame = None,
    prompt: opt.Prompt = None,
    threshold: opt.Threshold = 0.5,
    shortest_side: opt.ShortestSide = None,
    longest_side: opt.LongestSide = 1333,
    sweep: opt.Sweeps = None,
    runs: opt.Runs = None,
    quick: opt.Quick = False,
    threads: opt.Threads = None,
    untrusted: opt.Untrusted = False,
    no_plugins: opt.NoPlugins = False,
    frame_rate: opt.FrameRate = None,
    no_memory: opt.NoMemory = False,
    no_details: opt.NoDetails = False,
    json: opt.Json = None,
    resume: opt.Resume = False,
    report: opt.Report = None,
    compare: opt.Compare = None,
    quiet: opt.Quiet = False,
) -> int:
    """Time every subject, piece by piece, in turn on the same frames; memory, blocks and prompts too."""
    from glip_bench.measuring.run import Settings
    from glip_bench.measuring.sweep import parse_sweep

    inputs = find_inputs(model, checkpoint, frames, prompt, quick=quick)
    side = shortest_side or (QUICK_SIDE if quick else SIDE)
    settings = Settings(
        _options(
            *(inputs, side, longest_side, threads),
            yardsticks=yardsticks,
            threshold=threshold,
            trusted=not untrusted,
            plugins=not no_plugins,
        ),
        inputs.frames or own_picture(),
        inputs.prompt,
        subjects=_names(subjects),
        frame_size=_pair(frame),
        rounds=runs or (QUICK_ROUNDS if quick else ROUNDS),
        budget=QUICK_SECONDS if quick else None,
        frame_rate=frame_rate,
        memory=not no_memory,
        details=not (no_details or quick),
        sweeps=tuple(parse_sweep(text) for text in sweep or ()),
    )
    return _measure(settings, json, resume, report, compare, _steps(quiet))


@app.command()
def sweep(
    context: typer.Context,
    axes: Annotated[
        list[str], typer.Argument(metavar="AXIS=A,B...", help="Values of tokens, classes, side, batch or bundle.")
    ],
    model: opt.Model = None,
    checkpoint: opt.Checkpoint = None,
    subjects: opt.Subjects = None,
    yardsticks: opt.Yardsticks = False,
    frames: opt.Frames = None,
    frame: opt.Frame = None,
    prompt: opt.Prompt = None,
    shortest_side: opt.ShortestSide = None,
    longest_side: opt.LongestSide = 1333,
    runs: opt.Runs = None,
    threads: opt.Threads = None,
    untrusted: opt.Untrusted = False,
    no_plugins: opt.NoPlugins = False,
    json: opt.Json = None,
    resume: opt.Resume = False,
    report: opt.Report = None,
    quiet: opt.Quiet = False,
) -> int:
    """Time every subject at several values of one size, after the rounds of `run` without memory and details."""
    given = {name: value for name, value in context.params.items() if name != "axes"}
    return run(**given, sweep=axes, no_memory=True, no_details=True)


@app.command()
def accuracy(
    context: typer.Context,
    annotations: Annotated[Path, typer.Argument(metavar="JSON", help="Annotations in the format of COCO or LVIS.")],
    images: opt.ImagesIfRun = None,
    model: opt.Model = None,
    checkpoint: opt.Checkpoint = None,
    subjects: opt.Subjects = None,
    shortest_side: opt.ShortestSide = None,
    longest_side: opt.LongestSide = 1333,
    limit: opt.Limit = None,
    classes_per_prompt: opt.ClassesPerPrompt = None,
    prompts: opt.CustomPrompts = None,
    predictions: opt.Predictions = None,
    threads: opt.Threads = None,
    untrusted: opt.Untrusted = False,
    no_plugins: opt.NoPlugins = False,
    json: opt.Json = None,
    resume: opt.Resume = False,
    quiet: opt.Quiet = False,
) -> None:
    """Compute average precision of every subject, as COCO's or LVIS's evaluation has it; no times."""
    if predictions is not None:
        _judge(context, annotations, predictions, json)
        return
    if images is None:
        raise bad_option("--images", "is needed; name the folder of the set's pictures")
    _quality(**{name: value for name, value in context.params.items() if name != "predictions"})


@app.command()
def grounding(
    context: typer.Context,
    annotations: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="JSON of captions with phrases, or test.txt of Flickr30K Entities."),
    ],
    images: opt.Images,
    model: opt.Model = None,
    checkpoint: opt.Checkpoint = None,
    subjects: opt.Subjects = None,
    shortest_side: opt.ShortestSide = None,
    longest_side: opt.LongestSide = 1333,
    limit: opt.Limit = None,
    threads: opt.Threads = None,
    untrusted: opt.Untrusted = False,
    no_plugins: opt.NoPlugins = False,
    json: opt.Json = None,
    resume: opt.Resume = False,
    quiet: opt.Quiet = False,
) -> None:
    """Compute recall@1, 5 and 10 of the phrases of captions; no times."""
    _quality(**context.params, grounding=True)


@app.command()
def classes(
    names: Annotated[Path, typer.Argument(metavar="FILE", help="Class names, as --prompt-file of glip-detect.")],
    model: opt.Model = None,
    classes_per_prompt: opt.ClassesPerPrompt = None,
    frames: opt.Frames = None,
    frame: opt.Frame = None,
    shortest_side: opt.ShortestSide = None,
    longest_side: opt.LongestSide = 1333,
    sample: opt.Sample = None,
    runs: opt.Runs = None,
    threads: opt.Threads = None,
    json: opt.Json = None,
    quiet: opt.Quiet = False,
) -> None:
    """Time a long list of classes in prompts that share the backbone, against a frame for every prompt."""
    from glip_bench.measuring.classes import ClassList, measure_classes, render_classes
    from glip_bench.reporting.results import write_result
    from glip_deploy.prompts.files import read_prompt_file

    inputs = find_inputs(model, frames=frames)
    listed = read_prompt_file(names)
    if not isinstance(listed, list):
        raise OptionError(f"{names} holds a caption; a list of class names is needed, one a line")
    _check(json)
    options = _options(inputs, shortest_side or SIDE, longest_side, threads)
    where = inputs.frames or own_picture()
    what = ClassList(options, listed, classes_per_prompt, where, _pair(frame), runs or ROUNDS, sample)
    result = measure_classes(what, _steps(quiet))
    if json is not None:
        write_result(json, result)
    typer.echo(render_classes(result))


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Result that --json wrote.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Another one of the same model and shape.")],
) -> int:
    """Compare two results; exit status 3 if the new one is worse beyond noise."""
    from glip_bench.reporting.results import read_result

    return _compare(read_result(old), read_result(new), old)


@app.command()
def floor(
    hardware: Annotated[str, typer.Argument(metavar="NAME", help="A GPU, such as A100, or cpu for this machine.")],
    model: opt.Model = None,
    frame: opt.Frame = None,
    prompt: opt.Prompt = None,
    shortest_side: opt.ShortestSide = None,
    longest_side: opt.LongestSide = 1333,
    json: opt.Json = None,
) -> None:
    """Count the work of one frame, and say how fast a machine could do it at best; nothing is run."""
    from glip_bench.limits.floor import describe_floor
    from glip_bench.limits.hardware import hardware as known
    from glip_bench.reporting.results import write_result
    from glip_bench.reporting.text import render_floor

    machine = None if hardware.lower() == "cpu" else known(hardware)  # a wrong name fails before the work
    inputs = find_inputs(model, prompt=prompt)
    options = _options(inputs, shortest_side or SIDE, longest_side, None)
    _check(json)
    result = describe_floor(options.bundle, inputs.prompt, options.canvas_of(_pair(frame)), machine)
    if json is not None:
        write_result(json, result)
    typer.echo(render_floor(result))


@app.command()
def paper(
    results: Annotated[
        Path | None,
        typer.Option("--results", metavar="DIR", help="Folder of result files. Default: benchmarks/results"),
    ] = None,
) -> None:
    """Print the paper's speeds and memory, and the measured ones beside them."""
    from glip_bench.reporting.paper import PAPER, measured_rows, paper_table, results_folder

    folder = results_folder() if results is None else results
    if not folder.is_dir():
        raise OptionError(f"--results {folder} is not a folder; name the one with result files")
    rows, left_out = measured_rows(folder)
    typer.echo(paper_table([*PAPER, *rows], left_out))


def _measure(
    settings: Settings,
    json: Path | None,
    resume: bool,
    report: Path | None,
    old_file: Path | None,
    on_step: Callable[[str], None],
) -> int:
    from glip_bench.measuring.run import run as measure
    from glip_bench.reporting.report import check_report, write_report
    from glip_bench.reporting.results import read_result, write_result
    from glip_bench.reporting.text import render

    _check(json, resume)
    if report is not None:
        check_report(report)
    previous = read_result(json) if resume and json is not None else None
    if previous is not None and previous["complete"]:
        on_step(f"{json} is complete; only what it lacks is measured")
    old = None if old_file is None else read_result(old_file)  # may be the very file that --json names

    def save(result: Mapping[str, Any]) -> None:
        if json is not None:
            write_result(json, result)

    def kept() -> str:
        there = json is not None and json.is_file()
        return f"what was measured is in {json}, --resume continues" if there else "nothing was written"

    with _interruption(kept):
        result = measure(settings, save, on_step, previous)
    typer.echo(render(result))
    if report is not None:
        typer.echo(f"\nreport: {write_report(result, report)}")
    if old is None:
        return 0
    typer.echo()
    return _compare(old, result, old_file)


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], name: Path | None) -> int:
    from glip_bench.reporting import compare

    changes, remarks = compare.compare(old, new)
    typer.echo(compare.render_comparison(changes, remarks, name))
    return SLOWER if any(change.worse for change in changes) else 0


def _judge(context: typer.Context, annotations: Path, predictions: Path, json: Path | None) -> None:
    """Judge results that are there already, for which no option of a run has a use."""
    from glip_bench.quality.accuracy import judge, render_accuracy
    from glip_bench.reporting.results import write_result

    for name in context.params:
        given = getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
        if given and name not in ("annotations", "predictions", "images", "json", "quiet"):
            raise bad_option(f"--{name.replace('_', '-')}", "has no use beside --predictions, for which nothing is run")
    _check(json)
    result = judge(annotations, predictions)
    if json is not None:
        write_result(json, result)
    typer.echo(render_accuracy(result))


def _quality(
    model: Path | None,
    checkpoint: Path | None,
    subjects: str | None,
    shortest_side: int | None,
    longest_side: int,
    threads: int | None,
    untrusted: bool,
    no_plugins: bool,
    json: Path | None,
    resume: bool,
    quiet: bool,
    **task: Any,
) -> None:
    """Measure accuracy; what was found is kept in a folder beside the result file until the run is done."""
    import shutil
    import tempfile

    from glip_bench.quality.accuracy import Task, measure, render_accuracy
    from glip_bench.reporting.results import write_result

    inputs = find_inputs(model, checkpoint)
    trust = {"trusted": not untrusted, "plugins": not no_plugins}
    options = _options(inputs, shortest_side or SIDE, longest_side, threads, **trust)
    _check(json, resume)
    with contextlib.ExitStack() as scratch:
        kept = "nothing was written"
        if json is None:
            work = Path(scratch.enter_context(tempfile.TemporaryDirectory()))
        else:
            kept = f"what was found is kept beside {json}, --resume continues"
            work = json.with_name(f"{json.name}.work")
        with _interruption(lambda: kept):
            what = Task(options, _names(subjects), **task)
            result = measure(what, work, resume, _steps(quiet), progress=not quiet)
    if json is not None:
        write_result(json, result)
        shutil.rmtree(work, ignore_errors=True)
    typer.echo(render_accuracy(result))


def _options(inputs: Inputs, shortest_side: int, longest_side: int, threads: int | None, **more: Any) -> Options:
    from glip_bench.subjects.base import Options

    return Options(inputs.bundle, inputs.checkpoint, shortest_side, longest_side or None, threads=threads, **more)


def _names(subjects: str | None) -> tuple[str, ...] | None:
    return None if subjects is None else tuple(name.strip() for name in subjects.split(",") if name.strip())


def _pair(frame: opt.FrameSize | None) -> tuple[int, int]:
    size = frame or FRAME_SIZE
    return size.height, size.width


def _check(json: Path | None, resume: bool = False) -> None:
    """Check, before the measurement, that the result can be written."""
    if json is not None:
        check_file(json)
    elif resume:
        raise bad_option("--resume", "needs a result file to continue; name it with --json FILE")


def _steps(quiet: bool) -> Callable[[str], None]:
    return (lambda step: None) if quiet else (lambda step: say(f"[{step}]"))


@contextlib.contextmanager
def _interruption(kept: Callable[[], str]) -> Iterator[None]:
    """Say on Ctrl-C what is left of the measurement."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"{PROGRAM}: interrupted, {kept()}")
        raise typer.Exit(130) from None


if __name__ == "__main__":
    sys.exit(main())
