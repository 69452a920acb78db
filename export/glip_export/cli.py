"""`glip-export`: a GLIP checkpoint becomes a bundle."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glip_deploy.cli.app import QUIET, VERSION, bad_option, examples, make_app, run_app
from glip_deploy.cli.console import Steps, one_line, say
from glip_deploy.errors import OptionError

if TYPE_CHECKING:
    from glip_export.bundle_writer import ExportResult

__all__ = ["main"]

app = make_app()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `glip-export`.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit status: 0 done, 1 an error with a one-line message, 2 bad usage, 130 after Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else argv
    return run_app(app, "glip-export", _with_engine_options(words), extra="export")


def _with_engine_options(words: Sequence[str]) -> list[str]:
    """Return the arguments with `--engine` and what follows it as one word: the value may be left out.

    The next word is the value unless it is an option; a word with spaces is a value even if it begins with a hyphen.
    """
    joined: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--engine":
            given = bool(rest) and (not rest[0].startswith("-") or " " in rest[0])
            word = f"--engine={rest.pop(0) if given else ''}"
        joined.append(word)
    return joined


@app.command(
    epilog=examples(
        "glip-export --model glip_tiny_model_o365_goldg.pth --output glip_t/",
        "glip-export --model glip_large_model.pth --output glip_l/ --config configs/pretrain/glip_Swin_L.yaml",
        'glip-export --model glip_t.pth --engine="--size 800x1344 --tokens 16,32"',
        note="The variant, GLIP-T (A), (B), (C), GLIP-T, GLIP-L or a prompt-tuned one, is recognized from the file,\n"
        "which may have the official names or mmdetection's.\n"
        "Every graph is compared with torch on a real picture before the bundle is delivered.",
    )
)
def export(
    model: Annotated[Path, typer.Option(metavar="FILE", readable=False, help="GLIP .pth checkpoint.")],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", readable=False, help="The bundle's folder (default: the checkpoint's name without .pth)."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", readable=False, help="Official YAML, to check and complete the file.")
    ] = None,
    precision: Annotated[
        str, typer.Option(metavar="P", help="Of weights and activations: fp32 or fp16, which halves the files.")
    ] = "fp32",
    raw_outputs: Annotated[
        bool,
        typer.Option("--raw-outputs", metavar="", help="Let the image graph also give logits, deltas and centerness."),
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="[OPTIONS]",
            help="Then build TensorRT engines, with these options of glip-build (see glip-build --help).",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace an existing bundle.")] = False,
    quiet: QUIET = False,
    version: VERSION = False,
) -> int:
    """Export a GLIP checkpoint to a bundle: ONNX graphs, tokenizer, parity report."""
    from glip_export.bundle_writer import BUNDLE_PRECISIONS, export_bundle, steps

    started = time.perf_counter()
    if precision not in BUNDLE_PRECISIONS:
        raise bad_option(
            "--precision", f'"{precision}" is not a precision of bundles; legal: {", ".join(BUNDLE_PRECISIONS)}'
        )
    builder, options = None, _words(engine or "")
    if engine is not None:  # a mistake in the options is reported before the export, not after it
        from glip_export.engine_builder import find_engine_builder

        builder = find_engine_builder()
        builder.check_options(options)
    try:
        with Steps(len(steps(precision)), quiet=quiet) as progress:
            result = export_bundle(
                model,
                Path(model.stem) if output is None else output,
                config_file=config,
                precision=precision,
                raw_outputs=raw_outputs,
                overwrite=overwrite,
                on_step=progress.step,
            )
    except KeyboardInterrupt:
        say("glip-export: interrupted, nothing was written")
        return 130
    if not quiet:
        _report(result, time.perf_counter() - started)
    if builder is None:
        return 0
    # The bundle stays whatever comes of the engines.
    return builder.main([str(result.path), *options, *(["--quiet"] if quiet else [])])


def _words(options: str) -> list[str]:
    try:
        return shlex.split(options)
    except ValueError as error:
        raise OptionError(f"--engine is {options!r} ({str(error).lower()}); close the quotation mark") from None


def _report(result: ExportResult, seconds: float) -> None:
    manifest = result.manifest
    if result.ignored:
        shown = one_line(", ".join(name[:100] for name in result.ignored[:4]))
        more = ", ..." if len(result.ignored) > 4 else ""
        say(
            f"{len(result.ignored)} tensors inference does not use were ignored (listed in the manifest): {shown}{more}"
        )
    say(f"{'graph':<15}{'output':<38}{'max abs':>10}{'max rel':>10}{'allowed':>10}")
    for row in manifest["parity"]:
        mean = f"  mean: {row['mean_abs']:.1e}" if "mean_abs" in row else ""
        say(
            f"{row['graph']:<15}{row['output']:<38}{row['max_abs']:>10.1e}{row['max_rel']:>10.1e}"
            f"{row['tolerance']:>10.0e}{mean}"
        )
    size = sum(file["bytes"] for file in manifest["files"].values())
    say(f"{manifest['variant']}: {size / 1e6:.0f} MB in {seconds:.0f} s")
    print(result.path)


if __name__ == "__main__":
    sys.exit(main())
