"""The rewritten graphs alone, for people who build engines themselves: with trtexec, in Triton or DeepStream.

Neither TensorRT nor a GPU is needed. The graphs are those that `glip-build` gives the TensorRT of that version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from glip_deploy.bundle.contract import PARTS
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import OptionError, OutputError
from glip_deploy.files import deliver_folder, not_written, temporary_sibling
from glip_engines.flavours import Dialect, Flavour
from glip_engines.options import BuildOptions
from glip_engines.plan import GRAPHS, Plan
from glip_engines.rewriting import rewrite_file

__all__ = ["README", "write_graphs"]

README = "README.md"
_ANY_GPU = 80
"""The full TensorRT reads the same graph for every GPU."""
_UNUSED = {
    "flavour": "--flavor",
    "arch": "--arch",
    "plugin": "--plugin",
    "workspace": "--workspace",
    "timing_cache": "--timing-cache",
    "optimization_level": "--optimization-level",
    "name": "--name",
}
"""Options that are about building."""


def write_graphs(
    bundle_path: Path,
    folder: Path,
    options: BuildOptions,
    version: str,
    on_progress: Callable[[str, float, str], None] = lambda step, fraction, phase: None,
) -> Path:
    """Write `text.onnx` and `image.onnx` as a TensorRT version reads them, and a README with the trtexec commands.

    Args:
        bundle_path: an exported bundle.
        folder: what to make; it appears whole or not at all. One that exists is replaced with `options.overwrite`, if
            it was written by this function.
        options: precision, form and shapes; of the full TensorRT.
        version: of TensorRT, "8.6" or "10.9" say.
        on_progress: called with the step ("text graph", "image graph"), its done fraction and the phase.

    Returns:
        The folder.

    Raises:
        OptionError: an option that cannot be used, or has nothing to do with graphs.
        BundleError: not a bundle, or a node that engines are not built with.
        OutputError: the folder exists, or cannot be written. Nothing is left behind, whatever is raised.
    """
    for name, option in _UNUSED.items():
        if getattr(options, name) is not None:
            raise OptionError(f"{option} has no effect on the graphs that --onnx-only writes; leave it out")
    dialect = _dialect(version)
    bundle = Bundle.open(bundle_path)
    plan = Plan.of(bundle, options, Flavour.TENSORRT)
    if plan.precision == "bf16" and dialect.is_8:
        raise OptionError(f"TensorRT {version} has no bf16; use --precision fp16")
    target = folder.resolve()
    _check_target(target, options.overwrite)
    try:
        with temporary_sibling(target) as scratch:
            for graph in plan.graphs:
                on_progress(f"{graph} graph", 0.0, "rewriting the graph")
                bundle.load(partial(_write_graph, plan, dialect, graph, scratch))
            (scratch / README).write_text(_readme(plan, dialect), encoding="utf-8")
            _check_target(target, options.overwrite)
            deliver_folder(scratch, target, overwrite=options.overwrite)
    except OSError as error:
        raise not_written(target, error) from None
    return target


def _write_graph(plan: Plan, dialect: Dialect, graph: str, target: Path, source: Path) -> None:
    rewrite_file(
        source / plan.bundle.manifest.io[graph].file,
        target / f"{graph}.onnx",
        dialect,
        precision=plan.lowering,
        form=plan.form,
        pinned=plan.pinned(graph),
    )


def _dialect(version: str) -> Dialect:
    if not re.fullmatch(r"(8\.6|1[01]\.\d+)(\.\d+)*", version):
        raise OptionError(f'--trt-version is "{version}"; legal is 8.6, or 10.0 to 11 such as 10.9')
    return Dialect(Flavour.TENSORRT, version, _ANY_GPU)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    ours = {README, *(f"{graph}.onnx{suffix}" for graph in (*GRAPHS, *PARTS) for suffix in ("", ".data"))}
    if not target.is_dir() or not {path.name for path in target.iterdir()} <= ours:
        raise OutputError(f"--onnx-only {target} holds something else and is not replaced; name another folder")
    if any(target.iterdir()) and not overwrite:
        raise OutputError(f"--onnx-only {target} exists; add --overwrite, or name another folder")


# -- the README -----------------------------------------------------------------------------------------------------


def _readme(plan: Plan, dialect: Dialect) -> str:
    manifest = plan.bundle.manifest
    return "\n".join(
        [
            f"# {plan.bundle.variant} for TensorRT {dialect.version}, {plan.precision}, {plan.form} form",
            "",
            "Written by `glip-build --onnx-only` from a bundle of glip-deploy; SHA-256 of its manifest:",
            f"`{plan.bundle.manifest_sha256}`.",
            "",
            "The text graph runs once for a prompt, the image graph for every picture. What to feed them:"
            if not plan.options.split
            else "The text graph runs once for a prompt, the image graph for every picture; or, for several prompts,"
            " the backbone graph for every picture and the head graph for each prompt on it. What to feed them:",
            "",
            "| graph | input | type | axes | |",
            "|---|---|---|---|---|",
            *(
                f"| {graph}.onnx | {tensor.name} | {_dtype(tensor.dtype, dialect)} |"
                f" {', '.join(map(str, tensor.shape))} | {tensor.meaning} |"
                for graph in plan.graphs
                for tensor in manifest.io[graph].inputs
            ),
            "",
            "## Engines",
            "",
            *(f"    {_command(plan, dialect, graph)}\n" for graph in plan.graphs),
            *_notes(plan, dialect),
        ]
    )


def _dtype(dtype: str, dialect: Dialect) -> str:
    return "int32" if dtype == "int64" and dialect.is_8 else dtype


def _command(plan: Plan, dialect: Dialect, graph: str) -> str:
    words = ["trtexec", f"--onnx={graph}.onnx", f"--saveEngine={graph}.plan", "--noTF32"]
    if not dialect.is_8 and dialect.major < 11:  # networks of 11 are always strongly typed
        words.append("--stronglyTyped")
    if dialect.is_8 and plan.precision == "fp16":
        words += ["--fp16", "--precisionConstraints=obey"]
    if plan.form == "plugin":
        words.append("--dynamicPlugins=libglip_deform_tensorrt.so")
    profiles, pinned = plan.profiles(graph), plan.pinned(graph)
    dynamic = [
        tensor.name
        for tensor in plan.bundle.manifest.io[graph].inputs
        if any(isinstance(side, str) and side not in pinned for side in tensor.shape)
    ]
    for which, option in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
        # One profile here: from the shortest prompt to the longest, best for the first.
        of = profiles[-1] if option == "--maxShapes" else profiles[0]
        shapes = ",".join(f"{name}:{_sides(of[name][which])}" for name in dynamic)
        words += [f"{option}={shapes}"] if shapes else []
    return " ".join(words)


def _sides(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _notes(plan: Plan, dialect: Dialect) -> list[str]:
    notes = []
    if len(plan.tokens) > 1:
        notes.append(
            "`glip-build` makes one optimization profile for each prompt length; these commands make one range."
        )
    if dialect.is_8 and plan.precision == "fp16":
        notes.append(
            "TensorRT 8.6 is weakly typed: it may compute in fp16 what the graph has in fp32 (sampling positions, group"
            " norms, sums over all locations), and trtexec does not prevent it. `glip-build` does, layer by layer;"
            " with trtexec, prefer `--precision fp32`."
        )
    if dialect.may_missample_in_half and plan.form == "native" and plan.precision != "fp32":
        notes.append(
            f"TensorRT 10.14.1 and newer are reported to sample wrongly in {plan.precision} networks like this one"
            " (pytorch/TensorRT issue 4074). `glip-build` compares every engine with the bundle before it delivers it;"
            " trtexec does not. Compare the engine's results with ONNX Runtime's, or use `--form plugin`."
        )
    if plan.form == "plugin":
        notes.append(
            "The library of `glip::ModulatedDeformConv` is built by `cmake -S engines -B build/engines"
            " -DTENSORRT_HOME=...` in a checkout of glip-deploy, with the headers of this TensorRT."
        )
    notes.append(
        "trtexec does not check what the parser understood, and `glip-build` does. GridSample has no mode on purpose:"
        " its default is bilinear, while TensorRT 10 and 11 take the name that ONNX gives it since opset 20 for"
        " nearest neighbor."
        if plan.form == "native"
        else "trtexec does not check what the parser understood, and `glip-build` does."
    )
    return [line for note in notes for line in (note, "")]
