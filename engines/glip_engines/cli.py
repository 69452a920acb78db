"""`glip-build`: TensorRT engines of a bundle."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glip_deploy.cli.app import QUIET, VERSION, UsageError, bad_option, examples, make_app, run_app
from glip_deploy.cli.console import phase_progress, say

if TYPE_CHECKING:
    from glip_engines.builder import BuildResult
    from glip_engines.options import BuildOptions

__all__ = ["check_options", "main"]

_CHECK_ONLY = object()
"""Context object of a command line that is only checked."""

_USUAL_VERSION = "10.9"
"""TensorRT whose graphs `--onnx-only` writes; those of 10 and 11 differ in the trtexec commands only."""

app = make_app()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `glip-build`.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit status: 0 done, 1 an error with a one-line message, 2 bad usage, 130 after Ctrl-C.
    """
    return run_app(app, "glip-build", argv, extra="build")


def check_options(options: Sequence[str]) -> None:
    """Read what `glip-build BUNDLE` would be given, before there is a bundle.

    Raises:
        GlipError: an option is out of range, or TensorRT is not installed.
        glip_deploy.cli.app.UsageError: an option does not exist.
    """
    command = typer.main.get_command(app)
    with command.make_context("glip-build", ["BUNDLE", *options], obj=_CHECK_ONLY) as context:
        command.invoke(context)


def _option(name: str, panel: str, metavar: str | None, text: str, *aliases: str) -> Any:
    return typer.Option(name, *aliases, rich_help_panel=panel, metavar=metavar, help=text)


@app.command(
    epilog=examples(
        "glip-build glip_t/                                      any picture, fp16, for this machine's GPU",
        "glip-build glip_t/ --size 800x1344 --tokens 16,32       one canvas, two prompt lengths: fastest",
        "glip-build glip_t/ --flavor tensorrt-rtx --arch SM86   on a machine without a GPU",
        "glip-build glip_t/ --form plugin                        deformable convolution by this toolkit's kernels",
        "glip-build glip_t/ --onnx-only graphs/                  no engines: the graphs, and the trtexec commands",
        "glip-build glip_t/ --triton models/                     a model repository for Triton Inference Server",
        note="Engines go to BUNDLE/engines/, and the folder's name is printed. They belong to the GPU type and the\n"
        "TensorRT version they were built for. Prompts are padded to the next length of --tokens; none longer than\n"
        "the last can be run. A range is written MIN:BEST:MAX.",
    )
)
def build(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory that glip-export wrote.")],
    flavour: Annotated[
        str | None,
        _option("--flavor", "Target", "NAME", "tensorrt or tensorrt-rtx (default: the installed one).", "--flavour"),
    ] = None,
    arch: Annotated[
        str | None, _option("--arch", "Target", "SM", "tensorrt-rtx: build for SM80, say, with no GPU here.")
    ] = None,
    precision: Annotated[
        str | None, _option("--precision", "Graph", "P", "fp32, fp16 or bf16 (default: fp16).")
    ] = None,
    form: Annotated[
        str | None, _option("--form", "Graph", "F", "Of deformable convolution: native operators or plugin.")
    ] = None,
    plugin: Annotated[
        Path | None, _option("--plugin", "Graph", "LIB", "The plugin's library, if not to be compiled here.")
    ] = None,
    size: Annotated[str | None, _option("--size", "Shapes", "HxW", "One canvas, sides multiples of 32.")] = None,
    least: Annotated[
        str | None, _option("--min", "Shapes", "HxW", "Smallest canvas (default: as the bundle resizes).")
    ] = None,
    best: Annotated[
        str | None, _option("--opt", "Shapes", "HxW", "Best canvas (default: as the bundle resizes).")
    ] = None,
    most: Annotated[
        str | None, _option("--max", "Shapes", "HxW", "Largest canvas (default: as the bundle resizes).")
    ] = None,
    tokens: Annotated[
        str | None,
        _option("--tokens", "Shapes", "N,N", "Prompt lengths, 16,32,64 say, or one range (default: 1:16:256)."),
    ] = None,
    classes: Annotated[
        str | None, _option("--classes", "Shapes", "N", "Classes of a prompt (default: 1:8:128).")
    ] = None,
    batch: Annotated[str | None, _option("--batch", "Shapes", "N", "Pictures at a time (default: 1).")] = None,
    workspace: Annotated[
        str | None, _option("--workspace", "Builder", "SIZE", "Memory for intermediate results, 2G say.")
    ] = None,
    timing_cache: Annotated[
        Path | None, _option("--timing-cache", "Builder", "FILE", "Timings of kernels, read and kept up to date.")
    ] = None,
    optimization_level: Annotated[
        int | None, _option("--optimization-level", "Builder", "0-5", "More is slower to build.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the folder (default: target, version, precision and form).")
    ] = None,
    split: Annotated[
        bool,
        typer.Option(
            "--split", metavar="", help="Also the image branch in two parts: long lists of classes, several prompts."
        ),
    ] = False,
    onnx_only: Annotated[
        Path | None,
        _option("--onnx-only", "Graphs without engines", "DIR", "Write only the rewritten graphs, with a README."),
    ] = None,
    trt_version: Annotated[
        str | None,
        _option("--trt-version", "Graphs without engines", "V", "TensorRT to write them for: 8.6, 10.3, ... 11.1."),
    ] = None,
    triton: Annotated[
        Path | None,
        _option("--triton", "Triton", "DIR", "Write only a model repository for Triton, with a copy of the bundle."),
    ] = None,
    backend: Annotated[
        str | None,
        _option("--backend", "Triton", "NAME", "What runs the bundle (default: its engines if it has any)."),
    ] = None,
    instances: Annotated[
        int | None, _option("--instances", "Triton", "N", "Copies of the model, on each GPU if on GPUs (default: 1).")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace existing engines, graphs or Triton's model.")
    ] = False,
    no_verify: Annotated[
        bool, _option("--no-verify", "Builder", "", "Do not run the engines before they are delivered.")
    ] = False,
    quiet: QUIET = False,
    version: VERSION = False,
) -> int:
    """Build TensorRT engines of a bundle's text and image branch."""
    from glip_engines.builder import build_engines
    from glip_engines.flavours import choose_flavour
    from glip_engines.options import BuildOptions, Range, parse_bytes, parse_canvas, parse_range, parse_tokens

    started = time.perf_counter()
    height, width = parse_canvas(size, least, best, most)
    options = BuildOptions(
        flavour=flavour,
        precision=precision,
        form=form,
        plugin=plugin,
        height=height,
        width=width,
        tokens=None if tokens is None else parse_tokens(tokens),
        classes=None if classes is None else parse_range(classes, "--classes"),
        batch=Range.fixed(1) if batch is None else parse_range(batch, "--batch"),
        workspace=None if workspace is None else parse_bytes(workspace, "--workspace"),
        timing_cache=timing_cache,
        optimization_level=optimization_level,
        arch=arch,
        name=name,
        split=split,
        overwrite=overwrite,
        verify=not no_verify,
    )
    if trt_version is not None and onnx_only is None:
        raise bad_option("--trt-version", "needs --onnx-only DIR to have an effect")
    for option, value in (("--backend", backend), ("--instances", instances)):
        if value is not None and triton is None:
            raise bad_option(option, "needs --triton DIR to have an effect")
    if triton is not None and onnx_only is not None:
        raise UsageError("argument --triton: not allowed with argument --onnx-only")
    if triton is not None:
        return _write_repository(bundle, triton, options, backend, batch, 1 if instances is None else instances)
    if onnx_only is not None:
        return _write_graphs(bundle, onnx_only, options, trt_version or _USUAL_VERSION, quiet)
    if context.obj is _CHECK_ONLY:
        choose_flavour(flavour)
        return 0
    try:
        with phase_progress(quiet=quiet) as on_progress:
            result = build_engines(bundle, options, on_progress)
    except KeyboardInterrupt:
        say("glip-build: interrupted, nothing was written")
        return 130
    if not quiet:
        _report(result, time.perf_counter() - started, verify=not no_verify)
    print(result.path)
    return 0


def _write_graphs(bundle: Path, folder: Path, options: BuildOptions, version: str, quiet: bool) -> int:
    from glip_engines.onnx_only import write_graphs

    with phase_progress(quiet=quiet) as on_progress:
        print(write_graphs(bundle, folder, options, version, on_progress))
    return 0


def _write_repository(
    bundle: Path, folder: Path, options: BuildOptions, backend: str | None, batch: str | None, instances: int
) -> int:
    from glip_engines.triton_repository import write_repository

    if not options.batch.is_fixed:
        raise bad_option("--batch", f"is {batch}; with --triton it is one number, the most pictures in a run")
    most = None if batch is None else options.batch.most
    print(write_repository(bundle, folder, options, backend=backend, batch=most, instances=instances))
    return 0


def _report(result: BuildResult, seconds: float, *, verify: bool) -> None:
    record = result.record
    for name, engine in record.engines.items():
        say(f"{name:<12}{engine.size / 1e6:>8.1f} MB{engine.seconds:>8.1f} s")
    for row in result.checked or ():
        say(f"{row.graph}: {row.output} differ by {row.error:.2g} from ONNX Runtime's, {row.tolerance:.2g} is allowed")
    if result.checked is None and verify:
        say("not verified: there is no GPU here that runs these engines")
    where = record.gpu or f"SM{record.compute_capability}"
    say(f"{record.flavour} {record.version}, {record.precision}, {record.form}, {where}: {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
