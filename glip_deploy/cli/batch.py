"""`glip-batch`: many pictures and videos in; Parquet, COCO results and a list of failures out; may be interrupted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from glip_deploy.backends import BACKENDS, MAX_THREADS
from glip_deploy.cli import detector_options
from glip_deploy.cli.app import QUIET, VERSION, bad_option, examples, make_app, run_app
from glip_deploy.cli.arguments import (
    ClassThreshold,
    LogLevel,
    at_least,
    class_threshold,
    only_one_of,
    option,
    probability,
    share_of_gpus,
)
from glip_deploy.cli.console import frame_progress, is_terminal, log_lines, say, stderr_for_lines
from glip_deploy.cli.detector_options import HOW
from glip_deploy.errors import SourceError, listed
from glip_deploy.prompts.syntax import Phrases

if TYPE_CHECKING:
    from glip_deploy.batch.messages import Outcome
    from glip_deploy.batch.plan import Failure, MediaFile, Plan
    from glip_deploy.batch.results import Totals
    from glip_deploy.batch.run import Pool
    from glip_deploy.prompts.syntax import PromptText

__all__ = ["main"]

PROGRAM = "glip-batch"
WHAT, WHERE, WRITE = "What to look for", "Where to look", "What to write"
SECONDS = 10.0
"""Between two lines about the progress, where there is no terminal."""

app = make_app()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `glip-batch`.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit status; see `glip_deploy.cli.app`.
    """
    return run_app(app, PROGRAM, argv)


@app.command(
    epilog=examples(
        'glip-batch --model glip_t --prompt "person. traffic light" --source photos/ --output found/',
        'glip-batch --model glip_t --classes "cat,dog" --source "archive/**/*.jpg" --output found/ --workers 4',
        'glip-batch --model glip_t --prompt "person" --source videos/ --output found/ --workers 8 --ray 10.0.0.5:6379',
        note="""\
In the output folder: detections.parquet (a row for each picture and frame), coco.json, failures.json, and parts/, by
which a run that was interrupted, or had failures, goes on when the same command is given again.
exit status: 0 done, 1 something is wrong or files failed, 2 bad usage, 130 interrupted by Ctrl-C, 143 by SIGTERM.""",
    )
)
def batch(
    *,
    model: Annotated[str, option("BUNDLE", "Folder that glip-export wrote.")],
    prompt: Annotated[
        str | None, option("TEXT", '"person. traffic light", "a man with a [green hat]", or a sentence.', WHAT)
    ] = None,
    prompt_file: Annotated[Path | None, option("FILE", "A prompt in a text file.", WHAT)] = None,
    class_names: Annotated[list[str] | None, option("NAME", "A class name; repeatable.", WHAT, name="--class")] = None,
    classes: Annotated[str | None, option("A,B,C", "Class names in one list.", WHAT)] = None,
    phrases: Annotated[
        Phrases | None,
        option("HOW", "What a caption names: auto, whole (its noun phrases) or dots (what is between them).", WHAT),
    ] = None,
    classes_per_prompt: Annotated[
        int | None,
        option("N", "Divide a list of classes into prompts of N (default: as few as it takes).", WHAT, at_least(1)),
    ] = None,
    threshold: Annotated[float, option("P", "Keep only scores above this, from 0 to 1.", WHAT, probability)] = 0.5,
    class_thresholds: Annotated[
        list[ClassThreshold] | None,
        option("NAME=P", "The same for one class; repeatable.", WHAT, class_threshold, name="--class-threshold"),
    ] = None,
    max_detections: Annotated[
        int | None, option("N", "At most so many a frame (default: 100).", WHAT, at_least(1))
    ] = None,
    source: Annotated[str, option("SOURCE", "Folder, glob in quotes (** for subfolders), picture or video.", WHERE)],
    stride: Annotated[int, option("N", "Only every Nth frame of a video.", WHERE, at_least(1))] = 1,
    output: Annotated[str, option("DIR", "Folder for results, and for what is done so far.", WRITE)],
    coco_categories: Annotated[
        Path | None, option("FILE", "COCO annotation file from which category and image ids are taken, by name.", WRITE)
    ] = None,
    workers: Annotated[int, option("N", "Workers; more than one run on Ray.", HOW, at_least(1, 100_000))] = 1,
    ray: Annotated[
        str | None,
        option(
            "ADDRESS",
            "HOST:PORT of a Ray cluster, auto for the one this machine belongs to, or local (default for N > 1).",
            HOW,
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        option("G", "GPUs of each, or a fraction of one; needs a GPU --backend.", HOW, share_of_gpus),
    ] = None,
    threads: Annotated[
        int | None,
        option(
            "N", "CPU threads of each worker (default: the cores, divided among them).", HOW, at_least(1, MAX_THREADS)
        ),
    ] = None,
    shortest_side: detector_options.SHORTEST_SIDE = 800,
    longest_side: detector_options.LONGEST_SIDE = 1333,
    resize: detector_options.RESIZE = None,
    backend: detector_options.BACKEND = "onnxruntime",
    precision: detector_options.PRECISION = None,
    engines: detector_options.ENGINES = None,
    untrusted: detector_options.UNTRUSTED = False,
    no_plugins: detector_options.NO_PLUGINS = False,
    no_verify: detector_options.NO_VERIFY = False,
    log_level: Annotated[LogLevel, option("LEVEL", "debug, info, warning or error.", HOW)] = LogLevel.WARNING,
    quiet: QUIET = False,
    version: VERSION = False,
) -> int:
    """Detect in many pictures and videos, on one machine or a Ray cluster; interrupted runs go on where they were."""
    choices = {"--prompt": prompt, "--prompt-file": prompt_file, "--class": class_names, "--classes": classes}
    only_one_of(choices, required=True)
    if phrases is not None and prompt is None and prompt_file is None:
        raise bad_option("--phrases", "needs --prompt or --prompt-file to have an effect")
    if classes_per_prompt is not None and prompt is not None:
        raise bad_option("--classes-per-prompt", "divides a list; use it with --classes, --class or --prompt-file")
    if gpus_per_worker is not None and backend in ("onnxruntime", "openvino"):
        raise bad_option("--gpus-per-worker", f"has no effect with --backend {backend}, which runs on the CPU")

    from glip_deploy.backends import check_trusted
    from glip_deploy.batch.messages import Setup
    from glip_deploy.batch.plan import list_files, make_plan
    from glip_deploy.batch.record import Job, open_job
    from glip_deploy.batch.results import RESULTS, write_results
    from glip_deploy.batch.run import run_units
    from glip_deploy.bundle.manifest import Bundle
    from glip_deploy.files import check_folder
    from glip_deploy.prompts.files import read_prompt_file
    from glip_deploy.prompts.syntax import Caption, fold, mark
    from glip_deploy.results.coco import CocoIds, read_coco_names

    _check_pyarrow()
    if ray is not None:
        from glip_deploy.batch.cluster import check_address

        check_address(ray)
    if backend not in BACKENDS:
        raise bad_option("--backend", f"{backend!r} is unknown; legal is {', '.join(BACKENDS)}")
    check_trusted(backend, not untrusted)
    text: PromptText
    if prompt_file is not None:
        text = read_prompt_file(prompt_file)
    elif prompt is not None:
        text = prompt
    else:
        text = class_names or (classes or "").split(",")
    marked = mark(text, phrases or Phrases.AUTO)
    if isinstance(text, str):  # what is a phrase is decided here, not by what a worker has installed
        text = Caption(marked.caption, marked.spans, marked.phrases)
    labels = list(marked.phrases)
    own = {fold(one.name): one.value for one in class_thresholds or ()}
    known = {fold(label) for label in labels}
    for one in class_thresholds or ():
        if fold(one.name) not in known:
            raise bad_option(
                "--class-threshold", f'"{listed([one.name])}" is not in the prompt; its classes: {listed(labels)}'
            )
    limits = [own.get(fold(label), threshold) for label in labels]
    ids = CocoIds(*(read_coco_names(coco_categories) if coco_categories is not None else ()))
    ids.check(labels)

    with log_lines(PROGRAM, "error" if quiet else log_level, "glip_deploy"):
        files = list_files(source)
        folder = Path(output)
        check_folder(folder)
        bundle = Bundle.open(model, verify=False)  # every worker checks the hashes
        _check_prompt(bundle, text, classes_per_prompt)
        kept: dict[str, Any] = {
            "backend": backend,
            "precision": precision,
            "engines": engines,
            "shortest-side": shortest_side,
            "longest-side": longest_side,
            "resize": resize,
            "stride": stride,
            "threshold": limits,
            "max-detections": max_detections,
            "classes-per-prompt": classes_per_prompt,
        }
        job = Job(
            format_version=Job.newest,
            bundle=bundle.manifest_sha256,
            source=source.encode("utf-8", "backslashreplace").decode(),
            prompt=_plain(text),
            options=kept,
        )
        setup = Setup(
            model=os.path.abspath(model),  # noqa: PTH100 (links are not followed)
            manifest_sha256=bundle.manifest_sha256,
            prompt=text,
            thresholds=limits,
            classes_per_prompt=classes_per_prompt,
            max_detections=max_detections,
            stride=stride,
            options={
                "backend": backend,
                "precision": precision,
                "engines": os.path.abspath(engines) if engines and os.path.isdir(engines) else engines,  # noqa: PTH100, PTH112
                "shortest_side": shortest_side,
                "longest_side": longest_side or None,
                "resize": resize,
                "verify": not no_verify,
                "trusted": not untrusted,
                "plugins": not no_plugins,
            },
        )
        with open_job(folder, job, RESULTS) as recorder:
            show = not quiet
            with frame_progress(len(files), "looking what is left", show=show) as step:
                plan = make_plan(files, recorder, stride, step)
            if plan.done and show:
                say(f"{PROGRAM}: {plan.done} of {_files(len(files))} are done already")
            pool = _pool(setup, workers=workers, address=ray, threads=threads, gpus=gpus_per_worker)
            began = time.monotonic()
            native = log_level is LogLevel.DEBUG or not _on_ray(workers, ray, gpus_per_worker)
            with (
                stderr_for_lines(wanted=not native),
                redirect_stdout(None if not native else sys.stdout),  # where Ray prints what its processes report
                _progress(plan, show=show) as advance,
            ):
                failures = run_units(plan, files, recorder, pool, advance)
            seconds = time.monotonic() - began
            totals = write_results(files, recorder, failures, labels, ids)
    if show:
        say(_in_words(totals, plan, seconds))
    return _end(files, failures, folder)


def _check_pyarrow() -> None:
    from glip_deploy.errors import MissingPackage

    try:
        import pyarrow
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise MissingPackage(f'Parquet needs PyArrow ({error}); pip install "glip-deploy[ray]"') from error


def _check_prompt(bundle: Any, text: PromptText, classes_per_prompt: int | None) -> None:
    """Tokenize the prompt, so that one that does not fit is refused before workers are started."""
    from glip_deploy.prompts.chunks import parse_chunks
    from glip_deploy.prompts.syntax import Caption
    from glip_deploy.prompts.tokens import parse_prompt

    tokenizer = bundle.tokenizer()
    if isinstance(text, str | Caption):
        if classes_per_prompt is not None:
            raise bad_option("--classes-per-prompt", "divides a list, but the prompt is a caption")
        parse_prompt(text, tokenizer, max_tokens=bundle.max_tokens)
    else:
        parse_chunks(text, tokenizer, max_tokens=bundle.max_tokens, classes_per_prompt=classes_per_prompt)


def _plain(text: PromptText) -> Any:
    """Return a prompt as JSON has it."""
    if is_dataclass(text):
        return asdict(text)
    return [asdict(name) if is_dataclass(name) else name for name in text]


def _on_ray(workers: int, address: str | None, gpus: float | None) -> bool:
    return workers > 1 or address is not None or gpus is not None


def _pool(setup: Any, *, workers: int, address: str | None, threads: int | None, gpus: float | None) -> Pool:
    """Return one worker in this process, or a pool on Ray where there are several, an address or GPUs to assign."""
    if not _on_ray(workers, address, gpus):
        from glip_deploy.batch.run import OwnProcess

        return OwnProcess(setup, threads)
    from glip_deploy.batch.ray_pool import RayPool

    return RayPool(setup, workers=workers, address=address or "local", threads=threads, gpus=gpus or 0)


@contextmanager
def _progress(plan: Plan, *, show: bool) -> Iterator[Callable[[Outcome], None]]:
    """Show what is done: a bar on a terminal, elsewhere a line every 10 seconds."""
    began = said = time.monotonic()
    done = failed = 0
    terminal = is_terminal()
    with frame_progress(plan.frames, "detecting", show=show) as step:

        def advance(outcome: Outcome) -> None:
            nonlocal said, done, failed
            frames = len(outcome.found)
            done += frames
            failed += bool(outcome.failure)
            for _ in range(frames or 1):
                step()
            now = time.monotonic()
            if show and not terminal and now - said >= SECONDS:
                said = now
                asides = f", {failed} failed" if failed else ""
                say(f"{PROGRAM}: {done} of {plan.frames} frames, {done / (now - began):.2f} a second{asides}")

        yield advance


def _in_words(totals: Totals, plan: Plan, seconds: float) -> str:
    pictures = f"{totals.pictures} picture{'' if totals.pictures == 1 else 's'}"
    videos = f", {totals.video_frames} frames of videos" if totals.video_frames else ""
    now = f"; {plan.frames} in this run, {seconds:.2f} s" if plan.units else "; nothing was left to do"
    return f"{PROGRAM}: {pictures}{videos}, {totals.objects} detections{now}"


def _end(files: Sequence[MediaFile], failures: Sequence[Failure], folder: Path) -> int:
    from glip_deploy.batch.results import FAILURES

    if not failures:
        return 0
    failed = len({failure.name for failure in failures})
    raise SourceError(
        f"{failed} of {_files(len(files))} failed, listed in {folder / FAILURES}; the same command tries them again;"
        f" first: {failures[0].reason}"
    )


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
