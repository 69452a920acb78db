"""`glip-detect`: a bundle, a prompt and a source in; annotated files, JSON lines or COCO results out."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.video.base import Sink
    from glip_deploy.video.pictures import PictureSource
    from glip_deploy.video.pipeline import RunSummary
    from glip_deploy.video.video_in import VideoSource

__all__ = ["main"]

_EXAMPLES = """\
examples:
  glip-detect --model glip_t --prompt "person. traffic light" --source street.jpg --output out.jpg
  glip-detect --model glip_t --classes "cat,dog" --source photos/ --output annotated/ --coco results.json
  glip-detect --model glip_t --prompt "a man with a [green hat]" --source walk.mp4 --output walk_out.mp4
  glip-detect --model glip_t --class person --source rtsp://camera/stream --json - | jq .detections

JSON lines go to standard output if no output is named. Log, progress and summary go to standard error.
exit status: 0 done, 1 something is wrong with an input or output, 2 bad usage, 130 interrupted by Ctrl-C
(what was detected until then is written, and the video can be played).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `glip-detect`.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit status: 0 done, 1 for an error the user can put right (one line on standard error), 130
        after Ctrl-C, 141 if the reader of standard output went away. Bad usage exits with 2 from argparse.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    log = _LogHandler()
    logger = logging.getLogger("glip_deploy")
    before = logger.level
    logger.addHandler(log)
    logger.setLevel("ERROR" if args.quiet else args.log_level.upper())
    try:
        summary = _detect(parser, args, log)
    except GlipError as error:
        log.say(f"glip-detect: error: {error}")
        return 1
    except KeyboardInterrupt:
        log.say("glip-detect: interrupted")
        return 130
    except BrokenPipeError:
        _forget_stdout()
        return 141
    finally:
        logger.removeHandler(log)
        logger.setLevel(before)
    if not args.quiet:
        log.say(_in_words(summary))
    return 130 if summary.interrupted else 0


def _detect(parser: argparse.ArgumentParser, args: argparse.Namespace, log: _LogHandler) -> RunSummary:
    from glip_deploy.prompts.syntax import fold, mark
    from glip_deploy.video.open import open_source
    from glip_deploy.video.pipeline import run

    prompt = _prompt(args)
    phrases = mark(prompt).phrases
    own = {fold(name): value for name, value in args.class_threshold}
    for name, _ in args.class_threshold:
        if fold(name) not in map(fold, phrases):
            classes = ", ".join(phrases)
            parser.error(f'argument --class-threshold: "{name}" is not in the prompt; its classes: {classes}')
    if args.coco_categories is not None and args.coco is None:
        parser.error("argument --coco-categories: needs --coco FILE to have an effect")
    with open_source(
        args.source,
        stride=args.stride,
        max_frames=args.max_frames,
        timeout=args.timeout,
        reconnect=args.reconnect,
    ) as source:
        sinks = _sinks(args, source, phrases)  # before the model, so that nobody waits for a wrong folder
        from glip_deploy.detector import Detector

        options: dict[str, Any] = {}
        if args.no_cache or args.cache_dir is not None:
            options["cache_dir"] = None if args.no_cache else args.cache_dir
        with Detector.open(
            args.model,
            backend=args.backend,
            engines=args.engines,
            shortest_side=args.shortest_side,
            longest_side=args.longest_side or None,
            resize=args.resize,
            threads=args.threads,
            verify=not args.no_verify,
            **options,
        ) as detector:
            encoded = detector.encode(prompt)
            thresholds = [own.get(fold(phrase), args.threshold) for phrase in encoded.phrases]
            with _progress(args, source, log) as advance:
                return run(detector, source, encoded, sinks, threshold=thresholds, on_frame=advance)


def _prompt(args: argparse.Namespace) -> PromptText:
    if args.prompt_file is not None:
        from glip_deploy.prompts.files import read_prompt_file

        return read_prompt_file(args.prompt_file)
    return args.prompt if args.prompt is not None else list(args.class_names)


def _sinks(args: argparse.Namespace, source: PictureSource | VideoSource, phrases: Sequence[str]) -> list[Sink]:
    from glip_deploy.results.coco import read_coco_names
    from glip_deploy.video.sinks import CocoSink, JsonLinesSink

    sinks: list[Sink] = []
    if args.json is not None or args.output is args.coco is None:
        sinks.append(JsonLinesSink(args.json or "-"))
    if args.coco is not None:
        categories = image_ids = None
        if args.coco_categories is not None:
            categories, image_ids = read_coco_names(args.coco_categories)
        coco = CocoSink(args.coco, categories=categories, image_ids=image_ids)
        if categories is not None:
            for phrase in phrases:
                coco.category_of(phrase)
        sinks.append(coco)
    if args.output is not None:
        sinks.append(_annotated(args.output, source))
    return sinks


def _annotated(output: str, source: PictureSource | VideoSource) -> Sink:
    """The sink that fits the source: a picture, a folder of pictures, or a video."""
    from glip_deploy.files import refuse_overwriting
    from glip_deploy.video.pictures import PictureSource
    from glip_deploy.video.sinks import PICTURE_FORMATS, PictureSink
    from glip_deploy.video.video_out import VIDEO_SUFFIXES, VideoSink

    path = Path(output)
    suffix = path.suffix.lower()
    folder = output.endswith(("/", os.sep)) or path.is_dir() or not suffix
    if isinstance(source, PictureSource):
        if folder:
            if path.is_dir() and path.samefile(source.root):
                raise GlipError(f"--output {output} is the folder of the source itself; choose another one")
            return PictureSink(path, folder=True, root=source.root)
        if len(source.paths) > 1:
            raise GlipError(
                f"--output {output} is one file, but source {source.name} holds {len(source.paths)} pictures;"
                " give a folder"
            )
        if suffix in VIDEO_SUFFIXES:
            raise GlipError(
                f"--output {output} is a video, but source {source.name} is a picture;"
                f" end it in {' or '.join(PICTURE_FORMATS)}, or give a folder"
            )
        refuse_overwriting(str(source.paths[0]), path)
        return PictureSink(path)
    if folder:
        stem = re.sub(r"[^\w.-]+", "_", source.name if source.is_live else Path(source.name).stem).strip("_.")
        path = path / f"{stem or 'video'}.mp4"
    elif suffix not in VIDEO_SUFFIXES:
        raise GlipError(
            f"--output {output} cannot hold source {source.name}, a video;"
            f" end it in {' or '.join(sorted(VIDEO_SUFFIXES))}, or give a folder"
        )
    refuse_overwriting(source.name, path)
    return VideoSink(path, fps=source.fps, stride=source.stride, live=source.is_live, make_folder=folder)


@contextlib.contextmanager
def _progress(args: argparse.Namespace, source: PictureSource | VideoSource, log: _LogHandler) -> Iterator[Any]:
    """A bar with the live frames per second on standard error, if that is a terminal."""
    prints_data = args.json == "-" or args.json is args.output is args.coco is None
    if args.quiet or not sys.stderr.isatty() or (prints_data and sys.stdout.isatty()):
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:  # a part of the video extra; pictures work without it
        yield None
        return
    with tqdm(total=source.frame_count, unit=" frames", desc="detecting", file=sys.stderr) as bar:
        log.bar = bar
        try:
            yield lambda frame, found: bar.update()
        finally:
            log.bar = None


def _in_words(summary: RunSummary) -> str:
    asides = [f"{summary.skipped} unreadable"] if summary.skipped else []
    asides += [f"{summary.dropped} dropped"] if summary.dropped else []
    asides += ["interrupted"] if summary.interrupted else []
    times = ", ".join(
        f"{name} {stage.median_ms:.1f} ({stage.p95_ms:.1f})"
        for name, stage in (
            ("read", summary.reading),
            ("detect", summary.inference),
            ("write", summary.writing),
        )
    )
    return (
        f"glip-detect: {summary.detected} frame{'' if summary.detected == 1 else 's'}"
        f"{' (' + ', '.join(asides) + ')' if asides else ''}, {summary.objects} detections"
        f" in {summary.seconds:.2f} s, {summary.fps:.2f} fps; median (p95) ms: {times}"
    )


class _LogHandler(logging.Handler):
    """One line a record on standard error, above the progress bar if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        self.say(f"glip-detect: {record.levelname.lower()}: {record.getMessage()}")

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # nobody is left to be told
            if self.bar is not None:
                self.bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)


def _forget_stdout() -> None:
    """Send what is still buffered for a closed pipe nowhere, or the interpreter complains at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"glip-detect {version('glip-deploy')}")
        parser.exit()


class _CommaSeparated(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: object) -> None:
        namespace.class_names = values.split(",")


def _whole(least: int) -> Any:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return convert


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in [0, 1]")
    return value


def _class_threshold(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as person=0.4")
    return name.strip(), _probability(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glip-detect",
        description="Detect whatever you can name, in pictures and video, with an exported GLIP bundle.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("--model", required=True, metavar="BUNDLE", help="folder that glip-export wrote")

    what = parser.add_argument_group("what to look for (one of these)")
    one = what.add_mutually_exclusive_group(required=True)
    one.add_argument("--prompt", metavar="TEXT", help='"person. traffic light", or "a man with a [green hat]"')
    one.add_argument("--prompt-file", metavar="FILE", help="a prompt in a text file")
    one.add_argument("--class", dest="class_names", action="append", metavar="NAME", help="a class name; repeatable")
    one.add_argument(
        "--classes", action=_CommaSeparated, metavar="A,B,C", default=argparse.SUPPRESS, help="class names"
    )
    what.add_argument(
        "--threshold", type=_probability, default=0.5, metavar="P", help="score to exceed, 0 to 1 (default 0.5)"
    )
    what.add_argument(
        "--class-threshold",
        type=_class_threshold,
        action="append",
        default=[],
        metavar="NAME=P",
        help="the same for one class; repeatable",
    )

    where = parser.add_argument_group("where to look")
    where.add_argument(
        "--source",
        required=True,
        help="picture, folder, glob in quotes, video, camera number or device, rtsp:// or http:// address",
    )
    where.add_argument("--stride", type=_whole(1), default=1, metavar="N", help="only every Nth frame")
    where.add_argument("--max-frames", type=_whole(1), metavar="N", help="stop after N frames")
    where.add_argument(
        "--timeout",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="give up on a silent camera or stream after S seconds (default 10)",
    )
    where.add_argument(
        "--reconnect",
        type=_whole(0),
        default=0,
        metavar="N",
        help="open a lost camera or stream again, up to N times in a row (default 0)",
    )

    out = parser.add_argument_group("what to write")
    out.add_argument(
        "--output", metavar="PATH", help="annotated picture (.jpg, .png), video (.mp4, .mkv, .mov) or folder"
    )
    out.add_argument("--json", metavar="FILE", help="one JSON object a frame and line; - for standard output")
    out.add_argument("--coco", metavar="FILE", help="COCO results")
    out.add_argument(
        "--coco-categories",
        metavar="FILE",
        help="COCO annotation file from which category and image ids are taken, by name",
    )

    how = parser.add_argument_group("how to run")
    how.add_argument("--shortest-side", type=_whole(1), default=800, metavar="PX", help="resize to this (default 800)")
    how.add_argument(
        "--longest-side",
        type=_whole(0),
        default=1333,
        metavar="PX",
        help="but no longer than this (default 1333; 0 for no limit)",
    )
    how.add_argument(
        "--resize",
        choices=("exact", "fast"),
        default="exact",
        help="exact, as GLIP was evaluated; fast is quicker and changes results a little (default exact)",
    )
    how.add_argument("--backend", default="onnxruntime", help="onnxruntime (default) or tensorrt")
    how.add_argument("--engines", metavar="DIR", help="tensorrt: folder of engines (default: the first that fit)")
    how.add_argument("--threads", type=_whole(1), metavar="N", help="CPU threads (default: one a core)")
    how.add_argument("--no-verify", action="store_true", help="do not check the bundle's hashes")
    cache = how.add_mutually_exclusive_group()
    cache.add_argument("--cache-dir", metavar="DIR", help="where encoded prompts are kept between runs")
    cache.add_argument("--no-cache", action="store_true", help="keep no encoded prompts on disk")
    how.add_argument("--quiet", action="store_true", help="only errors on standard error")
    how.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="warning",
        help="(default warning)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
