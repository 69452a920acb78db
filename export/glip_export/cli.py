"""glip-export: an official checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    from glip_export.bundle_writer import ExportResult

__all__ = ["main"]

EXAMPLES = """\
examples:
  glip-export --model glip_tiny_model_o365_goldg.pth --output glip_t/
  glip-export --model glip_large_model.pth --output glip_l/ --config configs/pretrain/glip_Swin_L.yaml
  glip-export --model glip_t.pth --engine="--size 800x1344 --tokens 16,32"

The variant, GLIP-T (A), (B), (C), GLIP-T, GLIP-L or a prompt-tuned one, is recognised from the file. Every graph is
compared with torch on a real picture before the bundle is delivered.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status (0 done, 1 an error with a one-line message, 2 bad usage)."""
    args = _parser().parse_args(argv)
    started = time.perf_counter()
    try:
        builder = None
        if args.engine is not None:  # a mistake in the options is reported before the export, not after it
            from glip_export.engine_builder import find_engine_builder

            builder = find_engine_builder()
            builder.check_options(_words(args.engine))
        from glip_export.bundle_writer import export_bundle, steps

        with _Progress(len(steps(args.precision)), args.quiet) as progress:
            output = args.output if args.output is not None else Path(args.model.stem)
            result = export_bundle(
                args.model,
                output,
                config_file=args.config,
                precision=args.precision,
                raw_outputs=args.raw_outputs,
                overwrite=args.overwrite,
                on_step=progress.step,
            )
    except GlipError as error:
        print(f"glip-export: error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(
            f"glip-export: error: {error.name or error} is not installed; pip install 'glip-deploy[export]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("glip-export: interrupted, nothing was written", file=sys.stderr)
        return 130
    if not args.quiet:
        _report(result, time.perf_counter() - started)
    if builder is None:
        return 0
    # The bundle stays whatever comes of the engines.
    return builder.main([str(result.path), *_words(args.engine), *(["--quiet"] if args.quiet else [])])


def _words(options: str) -> list[str]:
    try:
        return shlex.split(options)
    except ValueError as error:
        raise GlipError(f"--engine is {options!r} ({error}); close the quotation mark") from None


def _report(result: ExportResult, seconds: float) -> None:
    manifest = result.manifest
    out = sys.stderr
    if result.ignored:
        shown = ", ".join(result.ignored[:4]) + (", ..." if len(result.ignored) > 4 else "")
        print(
            f"{len(result.ignored)} tensors inference does not use were ignored (listed in the manifest): {shown}",
            file=out,
        )
    print(f"{'graph':<12}{'output':<38}{'max abs':>10}{'max rel':>10}{'allowed':>10}", file=out)
    for row in manifest["parity"]:
        mean = f"  mean: {row['mean_abs']:.1e}" if "mean_abs" in row else ""
        print(
            f"{row['graph']:<12}{row['output']:<38}{row['max_abs']:>10.1e}{row['max_rel']:>10.1e}"
            f"{row['tolerance']:>10.0e}{mean}",
            file=out,
        )
    size = sum(file["bytes"] for file in manifest["files"].values())
    print(f"{manifest['variant']}: {size / 1e6:.0f} MB in {seconds:.0f} s", file=out)
    print(result.path)


class _Progress:
    """A bar on a terminal, a line a step elsewhere, nothing if quiet."""

    def __init__(self, steps: int, quiet: bool) -> None:
        self._steps, self._quiet, self._begun = steps, quiet, 0
        self._bar: Any = None
        self._ended = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> _Progress:
        if not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            form = "{n_fmt}/{total_fmt} |{bar:24}| {desc} [{elapsed}]"
            self._bar = tqdm(total=self._steps, bar_format=form, file=sys.stderr, leave=False)
            self._clock.start()
        return self

    def _tick(self) -> None:
        """Let the elapsed time run: a step may take 20 seconds."""
        while not self._ended.wait(0.5):
            self._bar.refresh()

    def step(self, name: str) -> None:
        """Say that a step begins, and so that the one before is done."""
        self._begun += 1
        if self._bar is not None:
            self._bar.update(self._begun - 1 - self._bar.n)
            self._bar.set_description_str(name)
        elif not self._quiet:
            print(f"[{self._begun}/{self._steps}] {name}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._ended.set()
            self._clock.join()
            self._bar.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glip-export",
        description="Export an official GLIP checkpoint to a bundle: two ONNX graphs, tokenizer, parity report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="official .pth checkpoint")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the bundle's directory (default: the checkpoint's name without .pth)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="official YAML, to check and complete the file")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="of weights and activations; fp16 halves the files (default: fp32)",
    )
    parser.add_argument(
        "--raw-outputs", action="store_true", help="let the image graph also give logits, deltas and centerness"
    )
    parser.add_argument(
        "--engine",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help="then build TensorRT engines, with these options of glip-build (see glip-build --help)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    parser.add_argument("--quiet", action="store_true", help="only errors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
