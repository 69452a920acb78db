"""`glip-detect`: a bundle, a prompt and a source in; annotated files, JSON lines, COCO results or labels out."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from glip_deploy.cli import detector_options
from glip_deploy.cli.app import QUIET, VERSION, bad_option, examples, make_app, run_app
from glip_deploy.cli.arguments import (
    ClassThreshold,
    LogLevel,
    at_least,
    class_threshold,
    flag,
    only_one_of,
    option,
    probability,
    seconds,
)
from glip_deploy.cli.console import frame_progress, log_lines, say, stdout_for_data
from glip_deploy.cli.detector_options import HOW
from glip_deploy.errors import OutputError, listed
from glip_deploy.prompts.syntax import Phrases

if TYPE_CHECKING:
    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.video.base import Sink
    from glip_deploy.video.pictures import PictureSource
    from glip_deploy.video.pipeline import RunSummary
    from glip_deploy.video.video_in import VideoSource

__all__ = ["main"]

PROGRAM = "glip-detect"
WHAT, WHERE, WRITE = "What to look for", "Where to look", "What to write"

app = make_app()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `glip-detect`.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit status; see `glip_deploy.cli.app`.
    """
    return run_app(app, PROGRAM, argv)


@app.command(
    epilog=examples(
        'glip-detect --model glip_t --prompt "person. traffic light" --source street.jpg --output out.jpg',
        'glip-detect --model glip_t --classes "cat,dog" --source photos/ --output annotated/ --coco results.json',
        'glip-detect --model glip_t --prompt "A dog chases a red ball." --source park.jpg --output out.jpg',
        'glip-detect --model glip_t --prompt "a man with a [green hat]" --source walk.mp4 --output walk_out.mp4',
        'glip-detect --model glip_t --prompt "person" --prompt "a [red car]" --source street.jpg',
        "glip-detect --model glip_t --class person --source walk.mp4 --track --output walk_out.mp4",
        "glip-detect --model glip_t --class person --source rtsp://camera/stream --json - | jq .detections",
        note="""\
JSON lines go to standard output if no output is named. Log, progress and summary go to standard error.
exit status: 0 done, 1 something is wrong with an input or output, 2 bad usage, 130 interrupted by Ctrl-C,
143 by SIGTERM (what was detected until then is written, and the video can be played).""",
    )
)
def detect(
    *,
    model: Annotated[str, option("BUNDLE", "Folder that glip-export wrote.")],
    prompt: Annotated[
        list[str] | None,
        option("TEXT", '"person. traffic light", "a man with a [green hat]", or a sentence; repeatable.', WHAT),
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
    threshold: Annotated[float, option("P", "Show only scores above this, from 0 to 1.", WHAT, probability)] = 0.5,
    class_thresholds: Annotated[
        list[ClassThreshold] | None,
        option("NAME=P", "The same for one class; repeatable.", WHAT, class_threshold, name="--class-threshold"),
    ] = None,
    max_detections: Annotated[
        int | None, option("N", "At most so many a frame and prompt (default: 100).", WHAT, at_least(1))
    ] = None,
    track: Annotated[
        bool, flag("--track", "Of video: an id for each object that stays with it from frame to frame.", WHAT)
    ] = False,
    source: Annotated[
        str,
        option(
            "SOURCE",
            "Picture, folder, glob in quotes, video, camera number or device, rtsp:// or http:// address.",
            WHERE,
        ),
    ],
    stride: Annotated[int, option("N", "Only every Nth frame.", WHERE, at_least(1))] = 1,
    max_frames: Annotated[int | None, option("N", "Stop after N frames.", WHERE, at_least(1))] = None,
    timeout: Annotated[
        float, option("S", "Give up on a silent camera or stream after S seconds.", WHERE, seconds)
    ] = 10.0,
    reconnect: Annotated[
        int, option("N", "Open a lost camera or stream again, up to N times in a row.", WHERE, at_least(0))
    ] = 0,
    output: Annotated[
        str | None, option("PATH", "Annotated picture (.jpg, .png), video (.mp4, .mkv, .mov) or folder.", WRITE)
    ] = None,
    json: Annotated[
        str | None, option("FILE", "A line of JSON for each frame and prompt; - for standard output.", WRITE)
    ] = None,
    coco: Annotated[str | None, option("FILE", "COCO results.", WRITE)] = None,
    coco_categories: Annotated[
        Path | None, option("FILE", "COCO annotation file from which category and image ids are taken, by name.", WRITE)
    ] = None,
    label_studio: Annotated[
        str | None, option("FILE", "Of pictures: tasks with predictions, to import into Label Studio.", WRITE)
    ] = None,
    yolo: Annotated[
        str | None, option("DIR", "Of pictures: YOLO label files in DIR/labels, class names in DIR/classes.txt.", WRITE)
    ] = None,
    shortest_side: detector_options.SHORTEST_SIDE = 800,
    longest_side: detector_options.LONGEST_SIDE = 1333,
    resize: detector_options.RESIZE = None,
    backend: detector_options.BACKEND = "onnxruntime",
    precision: detector_options.PRECISION = None,
    engines: detector_options.ENGINES = None,
    untrusted: detector_options.UNTRUSTED = False,
    no_plugins: detector_options.NO_PLUGINS = False,
    threads: detector_options.THREADS = None,
    no_verify: detector_options.NO_VERIFY = False,
    cache_dir: Annotated[str | None, option("DIR", "Where encoded prompts are kept between runs.", HOW)] = None,
    no_cache: Annotated[bool, flag("--no-cache", "Keep no encoded prompts on disk.", HOW)] = False,
    log_level: Annotated[LogLevel, option("LEVEL", "debug, info, warning or error.", HOW)] = LogLevel.WARNING,
    quiet: QUIET = False,
    version: VERSION = False,
) -> int:
    """Detect whatever you can name, in pictures and video, with an exported GLIP bundle."""
    choices = {"--prompt": prompt, "--prompt-file": prompt_file, "--class": class_names, "--classes": classes}
    only_one_of(choices, required=True)
    only_one_of({"--cache-dir": cache_dir, "--no-cache": no_cache})
    if phrases is not None and prompt is None and prompt_file is None:
        raise bad_option("--phrases", "needs --prompt or --prompt-file to have an effect")
    if classes_per_prompt is not None and prompt is not None:
        raise bad_option("--classes-per-prompt", "divides a list; use it with --classes, --class or --prompt-file")
    if coco_categories is not None and coco is None:
        raise bad_option("--coco-categories", "needs --coco FILE to have an effect")

    from glip_deploy.prompts.files import read_prompt_file
    from glip_deploy.prompts.syntax import fold, mark
    from glip_deploy.video.base import check_sinks
    from glip_deploy.video.open import open_source
    from glip_deploy.video.pipeline import run
    from glip_deploy.video.tracking import Tracker

    texts: list[PromptText]
    if prompt_file is not None:
        texts = [read_prompt_file(prompt_file)]
    elif prompt is not None:
        texts = [*prompt]
    else:
        texts = [class_names or (classes or "").split(",")]
    how = phrases or Phrases.AUTO
    labels_of = [mark(text, how).phrases for text in texts]
    labels = [label for of_prompt in labels_of for label in of_prompt]
    own = {fold(one.name): one.value for one in class_thresholds or ()}
    known = {fold(label) for label in labels}
    for one in class_thresholds or ():
        if fold(one.name) not in known:
            raise bad_option(
                "--class-threshold", f'"{listed([one.name])}" is not in the prompt; its classes: {listed(labels)}'
            )

    with (
        log_lines(PROGRAM, "error" if quiet else log_level, "glip_deploy"),
        open_source(source, stride=stride, max_frames=max_frames, timeout=timeout, reconnect=reconnect) as frames,
        ExitStack() as outputs,
    ):
        # Outputs are checked before the model is loaded, which may take long.
        to_stdout = json == "-" or all(one is None for one in (json, output, coco, label_studio, yolo))
        if to_stdout:
            outputs.enter_context(stdout_for_data())
        sinks: list[Sink] = [] if json is None and not to_stdout else [_json_lines(json, prompt, labels_of)]
        sinks += [] if coco is None else [_coco(coco, coco_categories, labels)]
        sinks += [] if output is None else [_annotated(output, frames)]
        sinks += [] if label_studio is None else [_label_studio(label_studio, frames, model)]
        sinks += [] if yolo is None else [_yolo(yolo, frames, labels)]
        inputs = {prompt_file: "the prompt file", coco_categories: "the file of COCO categories"}
        if os.path.isdir(model):  # noqa: PTH112 (Path.is_dir raises where a name is too long)
            inputs |= dict.fromkeys(Path(model).iterdir(), "a file of the bundle")
        tracker = Tracker.of(frames) if track else None
        check_sinks(frames, sinks, {path: what for path, what in inputs.items() if path is not None})

        from glip_deploy.detector import Detector

        options: dict[str, Any] = {}
        if no_cache or cache_dir is not None:
            options["cache_dir"] = cache_dir
        with Detector.open(
            model,
            backend=backend,
            precision=precision,
            engines=engines,
            shortest_side=shortest_side,
            longest_side=longest_side or None,
            resize=resize,
            threads=threads,
            verify=not no_verify,
            trusted=not untrusted,
            plugins=not no_plugins,
            **options,
        ) as detector:
            per_prompt = {} if classes_per_prompt is None else {"classes_per_prompt": classes_per_prompt}
            encoded = [detector.encode(text, phrases=how, **per_prompt) for text in texts]
            thresholds = [[own.get(fold(phrase), threshold) for phrase in one.phrases] for one in encoded]
            several = len(encoded) > 1
            # A bar would run through data that are printed on the same terminal.
            show = not quiet and not (to_stdout and sys.stdout.isatty())
            with frame_progress(frames.frame_count, "detecting", show=show) as advance:
                summary = run(
                    detector,
                    frames,
                    encoded if several else encoded[0],
                    sinks,
                    threshold=thresholds if several else thresholds[0],
                    max_detections=max_detections,
                    tracker=tracker,
                    on_frame=lambda frame, found: advance(),
                )
    if not quiet:
        say(_in_words(summary))
    return 130 if summary.interrupted else 0


def _json_lines(json: str | None, prompts: Sequence[str] | None, labels: Sequence[Sequence[str]]) -> Sink:
    from glip_deploy.video.sinks import JsonLinesSink

    several = prompts is not None and len(prompts) > 1
    return JsonLinesSink(json or "-", list(zip(prompts or (), map(len, labels), strict=True)) if several else ())


def _coco(coco: str, categories_file: Path | None, phrases: Sequence[str]) -> Sink:
    from glip_deploy.results.coco import read_coco_names
    from glip_deploy.video.sinks import CocoSink

    categories = image_ids = None
    if categories_file is not None:
        categories, image_ids = read_coco_names(categories_file)
    sink = CocoSink(coco, categories=categories, image_ids=image_ids)
    sink.ids.check(phrases)
    return sink


def _label_studio(label_studio: str, source: PictureSource | VideoSource, model: str) -> Sink:
    from glip_deploy.video.label_sinks import LabelStudioSink

    root = _pictures("--label-studio", source).root
    return LabelStudioSink(label_studio, root, model_version=Path(model).resolve().name)


def _yolo(yolo: str, source: PictureSource | VideoSource, phrases: Sequence[str]) -> Sink:
    from glip_deploy.video.label_sinks import YoloSink

    return YoloSink(yolo, _pictures("--yolo", source).root, phrases)


def _pictures(name: str, source: PictureSource | VideoSource) -> PictureSource:
    from glip_deploy.video.pictures import PictureSource

    if isinstance(source, PictureSource):
        return source
    raise OutputError(
        f"{name} labels pictures, but source {source.name} is a video or a camera; save its frames as pictures first,"
        " or use --json"
    )


def _annotated(output: str, source: PictureSource | VideoSource) -> Sink:
    """Return the sink that fits the source: a picture, a folder of pictures, or a video."""
    from glip_deploy.video.pictures import PictureSource
    from glip_deploy.video.sinks import PICTURE_FORMATS, PictureSink
    from glip_deploy.video.video_out import VIDEO_FORMATS, VideoSink

    path = Path(output)
    suffix = path.suffix.lower()
    exists = os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises where a name is too long)
    folder = exists or output.endswith(("/", os.sep)) or not suffix
    if isinstance(source, PictureSource):
        if folder:
            if exists and path.samefile(source.root):
                raise OutputError(f"--output {output} is the folder of the source itself; choose another one")
            return PictureSink(path, folder=True, root=source.root)
        if len(source.files) > 1:
            raise OutputError(
                f"--output {output} is one file, but source {source.name} holds {len(source.files)} pictures;"
                " give a folder"
            )
        if suffix in VIDEO_FORMATS:
            raise OutputError(
                f"--output {output} is a video, but source {source.name} is a picture;"
                f" end it in {' or '.join(PICTURE_FORMATS)}, or give a folder"
            )
        return PictureSink(path)
    if folder:
        stem = re.sub(r"[^\w.-]+", "_", source.name if source.is_live else Path(source.name).stem).strip("_.")
        path = path / f"{stem or 'video'}.mp4"
    elif suffix not in VIDEO_FORMATS:
        raise OutputError(
            f"--output {output} cannot hold source {source.name}, a video;"
            f" end it in {' or '.join(sorted(VIDEO_FORMATS))}, or give a folder"
        )
    return VideoSink(path, fps=source.fps, stride=source.stride, live=source.is_live, make_folder=folder)


def _in_words(summary: RunSummary) -> str:
    asides = [f"{summary.skipped} unreadable"] if summary.skipped else []
    asides += [f"{summary.dropped} dropped"] if summary.dropped else []
    asides += ["interrupted"] if summary.interrupted else []
    objects = f"{summary.objects} detections" + (f", {summary.tracks} tracks" if summary.tracks else "")
    stages = {"read": summary.reading, "detect": summary.inference, "write": summary.writing}
    times = ", ".join(f"{name} {stage.median_ms:.1f} ({stage.p95_ms:.1f})" for name, stage in stages.items())
    return (
        f"{PROGRAM}: {summary.detected} frame{'' if summary.detected == 1 else 's'}"
        f"{' (' + ', '.join(asides) + ')' if asides else ''}, {objects}"
        f" in {summary.seconds:.2f} s, {summary.fps:.2f} fps; median (p95) ms: {times}"
    )


if __name__ == "__main__":
    sys.exit(main())
