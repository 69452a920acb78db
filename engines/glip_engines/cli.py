"""glip-build: a bundle gets TensorRT engines."""

from __future__ import annotations

import argparse
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    from glip_engines.builder import BuildOptions, BuildResult, Range

__all__ = ["check_options", "main"]

EXAMPLES = """\
examples:
  glip-build glip_t/                                          any picture, fp16, for this machine's GPU
  glip-build glip_t/ --size 800x1344 --tokens 16,32           one canvas, two prompt lengths: fastest
  glip-build glip_t/ --flavour tensorrt-rtx --arch SM86       on a machine without a GPU
  glip-build glip_t/ --form plugin                            deformable convolution by our kernels (needs nvcc)

Engines go to BUNDLE/engines/; the folder's name is printed. They belong to the GPU type and the TensorRT version they
were built for. Prompts are padded to the next length of --tokens; none longer than the last can be run.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status (0 done, 1 an error with a one-line message, 2 bad usage)."""
    args = _parser().parse_args(argv)
    started = time.perf_counter()
    try:
        from glip_engines.builder import build_engines

        options = _options(args)
        with _Progress(args.quiet) as progress:
            result = build_engines(args.bundle, options, progress.update)
    except GlipError as error:
        print(f"glip-build: error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(
            f"glip-build: error: {error.name or error} is not installed; pip install 'glip-deploy[build]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("glip-build: interrupted, nothing was written", file=sys.stderr)
        return 130
    if not args.quiet:
        _report(result, time.perf_counter() - started)
    print(result.path)
    return 0


def check_options(options: Sequence[str]) -> None:
    """Read what `glip-build BUNDLE` would be given, before there is a bundle.

    Raises:
        GlipError: an option out of range, or TensorRT is not installed.
        SystemExit: an option that does not exist (argparse has said so).
    """
    from glip_engines.trt import choose_flavour

    choose_flavour(_options(_parser().parse_args(["BUNDLE", *options])).flavour)


def _report(result: BuildResult, seconds: float) -> None:
    record = result.record
    for name, engine in record.engines.items():
        print(f"{name:<12}{engine.size / 1e6:>8.1f} MB{engine.seconds:>8.1f} s", file=sys.stderr)
    where = record.gpu or f"SM{record.compute_capability}"
    print(
        f"{record.flavour} {record.version}, {record.precision}, {record.form}, {where}: {seconds:.0f} s",
        file=sys.stderr,
    )


class _Progress:
    """A bar on a terminal, a line a step elsewhere, nothing if quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._step = ""
        self._bar: Any = None
        self._ended = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> _Progress:
        if not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            form = "{percentage:3.0f}% |{bar:24}| {desc} [{elapsed}]"
            self._bar = tqdm(total=100, bar_format=form, file=sys.stderr, leave=False)
            self._clock.start()
        return self

    def _tick(self) -> None:
        """Let the elapsed time run: a phase may take a minute."""
        while not self._ended.wait(0.5):
            self._bar.refresh()

    def update(self, step: str, fraction: float, phase: str) -> None:
        """Show what goes on; the bar begins anew with each engine and never goes back."""
        if self._bar is not None:
            percent = 100 * fraction
            self._bar.n = percent if step != self._step else max(self._bar.n, percent)
            self._bar.set_description_str(f"{step}: {phase}"[:60])
        elif not self._quiet and step != self._step:
            print(step, file=sys.stderr, flush=True)
        self._step = step

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._ended.set()
            self._clock.join()
            self._bar.close()


def _options(args: argparse.Namespace) -> BuildOptions:
    from glip_engines.builder import BuildOptions, parse_range

    height, width = _size(args)
    tokens = None
    if args.tokens is not None:
        tokens = tuple(parse_range(part, "--tokens") for part in args.tokens.split(","))
        if len(tokens) > 1 and any(not bucket.is_fixed for bucket in tokens):
            raise GlipError(f'--tokens is "{args.tokens}"; write lengths such as 16,32,64, or one range MIN:BEST:MAX')
        tokens = tuple(sorted(set(tokens), key=lambda bucket: bucket.most))
    return BuildOptions(
        flavour=args.flavour,
        precision=args.precision,
        form=args.form,
        plugin=args.plugin,
        height=height,
        width=width,
        tokens=tokens,
        classes=None if args.classes is None else parse_range(args.classes, "--classes"),
        batch=parse_range(args.batch, "--batch"),
        workspace=None if args.workspace is None else _bytes(args.workspace),
        timing_cache=args.timing_cache,
        optimization_level=args.optimization_level,
        arch=args.arch,
        name=args.name,
        overwrite=args.overwrite,
    )


def _size(args: argparse.Namespace) -> tuple[Range | None, Range | None]:
    from glip_engines.builder import Range, parse_size

    sizes = {option: getattr(args, option) for option in ("min", "opt", "max")}
    given = [f"--{option}" for option, text in sizes.items() if text is not None]
    if args.size is not None:
        if given:
            raise GlipError(f"--size fixes the canvas and excludes {given[0]}; use one or the other")
        height, width = parse_size(args.size, "--size")
        return Range.fixed(height), Range.fixed(width)
    if not given:
        return None, None
    if len(given) < 3:
        missing = [f"--{option}" for option, text in sizes.items() if text is None]
        raise GlipError(f"{' and '.join(given)} without {' and '.join(missing)}; give all three, or --size")
    least, best, most = (parse_size(text, f"--{option}") for option, text in sizes.items())
    for i, side in enumerate(("height", "width")):
        if not least[i] <= best[i] <= most[i]:
            raise GlipError(
                f"--min {sizes['min']}, --opt {sizes['opt']}, --max {sizes['max']}: their {side}s are {least[i]},"
                f" {best[i]}, {most[i]}; each must be at least the one before"
            )
    return Range(least[0], best[0], most[0]), Range(least[1], best[1], most[1])


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,12})\s*(B|K|M|G)?i?B?", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise GlipError(f'--workspace is "{text}"; write a size such as 512M or 2G')
    return int(match[1]) * {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30}[(match[2] or "B").upper()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glip-build",
        description="Build TensorRT engines of a bundle's text and image branch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="directory that glip-export wrote")
    target = parser.add_argument_group("target")
    target.add_argument("--flavour", metavar="NAME", help="tensorrt or tensorrt-rtx (default: whichever is installed)")
    target.add_argument("--arch", metavar="SM", help="tensorrt-rtx: build for SM80, say, with no GPU here")
    graph = parser.add_argument_group("graph")
    graph.add_argument("--precision", metavar="P", help="fp32, fp16 or bf16 (default: fp16)")
    graph.add_argument("--form", metavar="F", help="of deformable convolution: native operators or plugin")
    graph.add_argument("--plugin", type=Path, metavar="LIB", help="its library, if not to be compiled here")
    shapes = parser.add_argument_group("shapes", "one number, or MIN:BEST:MAX")
    shapes.add_argument("--size", metavar="HxW", help="one canvas, sides multiples of 32")
    for option, meaning in (("min", "smallest"), ("opt", "best"), ("max", "largest")):
        shapes.add_argument(f"--{option}", metavar="HxW", help=f"{meaning} canvas (default: as the bundle resizes)")
    shapes.add_argument(
        "--tokens",
        metavar="N,N",
        help="prompt lengths, 16,32,64 say, or one range (default: 1:16:256)",
    )
    shapes.add_argument("--classes", metavar="N", help="classes of a prompt (default: 1:8:128)")
    shapes.add_argument("--batch", metavar="N", default="1", help="pictures at a time (default: 1)")
    builder = parser.add_argument_group("builder")
    builder.add_argument("--workspace", metavar="SIZE", help="memory for intermediate results, 2G say")
    builder.add_argument("--timing-cache", type=Path, metavar="FILE", help="read and kept up to date")
    builder.add_argument("--optimization-level", type=int, metavar="0-5", help="more is slower to build")
    add("--name", metavar="NAME", help="of the folder (default: target, version, precision and form)")
    add("--overwrite", action="store_true", help="replace existing engines")
    add("--quiet", action="store_true", help="only errors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
