"""The build: both graphs of a bundle rewritten, built and recorded in a folder that appears whole or not at all."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.bundle.engines import ENGINES, RECORD_VERSION, EngineFile, EngineRecord, PluginRecord, TensorRecord
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import BundleError, EngineError, OptionError, OutputError
from glip_deploy.files import deliver_folder, not_written, sha256_of, temporary_sibling
from glip_engines.compile import build_library, code_for
from glip_engines.flavours import Flavour, choose_flavour, current_gpu, target_of
from glip_engines.inspection import Expected
from glip_engines.plan import Plan
from glip_engines.rewriting import rewrite_file
from glip_engines.trt import GraphJob, Settings

if TYPE_CHECKING:
    from glip_deploy.bundle.contract import TensorContract
    from glip_engines.flavours import Dialect
    from glip_engines.options import BuildOptions
    from glip_engines.verify import Checked
    from glip_engines.worker import Environment, Worker

    Progress = Callable[[str, float, str], None]

__all__ = ["BuildResult", "build_engines"]

PLUGIN_FILE = "libglip_deform.so"
"""The plugin's library in a folder of engines."""


@dataclass(frozen=True)
class BuildResult:
    """The folder that was written, and its record."""

    path: Path
    record: EngineRecord
    checked: tuple[Checked, ...] | None
    """How far the engines are from the bundle's graphs; None where they were not run."""


def build_engines(
    bundle_path: Path, options: BuildOptions, on_progress: Progress = lambda step, fraction, phase: None
) -> BuildResult:
    """Build the text and the image engine of a bundle.

    With `form="plugin"` the plugin's library is compiled for the target, once per machine, unless one is given; a copy
    lies in the folder of engines, which then needs nothing else.

    Defaults: the flavour that is installed; fp16, or the bundle's own precision if it was exported in half; native
    operators unless a plugin library is given; canvases of every size the bundle's resizing rule makes; prompts of
    every length; 1 to 128 classes; one picture at a time; this machine's GPU.

    Where a GPU is at hand that the engines are for, they are run before they are delivered, and compared with the
    bundle's graphs (`glip_engines.verify`).

    Args:
        bundle_path: an exported bundle; engines go into its folder `engines`.
        options: what to build.
        on_progress: called with the step ("text engine", "image engine"), its done fraction and the phase.

    Raises:
        OptionError: an option that cannot be used, a target that does not exist among them.
        BundleError: not a bundle, or graphs that do not agree with its manifest.
        MissingPackage: the flavour, or a compiler for the plugin, is not installed.
        EngineError: TensorRT refuses a graph, the plugin cannot be compiled, there is no GPU where one is needed, or an
            engine computes something else than its graph.
        OutputError: engines of that name exist, or the disk is full. Nothing is left behind, whatever is raised.
    """
    from glip_engines.worker import Worker

    flavour = choose_flavour(options.flavour)
    bundle = Bundle.open(bundle_path)
    plan = Plan.of(bundle, options, flavour)
    if plan.form == "plugin" and sys.platform == "win32":
        raise EngineError("--form plugin needs Linux, whose shared library the plugin is; use --form native")
    if plan.form == "plugin" and plan.plugin is None:
        code_for(target_of(flavour, options.arch))  # refused before TensorRT is loaded
    settings = Settings(
        flavour,
        plan.precision,
        options.arch,
        options.workspace,
        None if options.timing_cache is None else str(options.timing_cache),
        options.optimization_level,
    )
    with Worker(settings) as worker:
        here = worker.environment
        _check_verification(plan, here.dialect)
        target = (bundle.path / ENGINES / (options.name or _default_name(plan, here))).resolve()
        _check_target(target, options.overwrite)  # before a minute is spent
        library = plan.plugin
        if plan.form == "plugin":
            library = library or _compile_plugin(here.dialect, on_progress)
            worker.load_plugin(library)
        try:
            with temporary_sibling(target) as folder:
                engines = {
                    f"{graph}.plan": _build_graph(worker, plan, graph, folder, on_progress) for graph in plan.graphs
                }
                plugin = None
                if library is not None:
                    shutil.copyfile(library, folder / PLUGIN_FILE)
                    plugin = PluginRecord(PLUGIN_FILE, sha256_of(folder / PLUGIN_FILE))
                record = EngineRecord(
                    format_version=RECORD_VERSION,
                    flavour=flavour.value,
                    version=here.dialect.version,
                    compute_capability=here.dialect.compute_capability,
                    gpu=here.gpu,
                    precision=plan.precision,
                    form=plan.form,
                    plugin=plugin,
                    manifest_sha256=bundle.manifest_sha256,
                    options=plan.command_options(),
                    engines=engines,
                )
                record.write(folder)
                checked = None
                if options.verify and _runs_here(here):
                    on_progress("verification", 0.0, "running the engines")
                    checked = tuple(worker.verify(bundle.path, folder))
                    on_progress("verification", 1.0, "done")
                _check_target(target, options.overwrite)  # another build may have ended in the meantime
                deliver_folder(folder, target, overwrite=options.overwrite)
        except OSError as error:
            raise not_written(target, error) from None
    return BuildResult(target, record, checked)


def _compile_plugin(dialect: Dialect, on_progress: Progress) -> Path:
    on_progress("plugin", 0.0, "compiling")
    library = build_library([dialect.compute_capability], tensorrt=dialect)
    on_progress("plugin", 1.0, "done")
    return library


def _check_verification(plan: Plan, dialect: Dialect) -> None:
    """Refuse to leave an engine unverified where TensorRT itself is reported to be wrong."""
    doubtful = dialect.may_missample_in_half and plan.form == "native" and plan.precision != "fp32"
    if doubtful and not plan.options.verify:
        raise OptionError(
            f"--no-verify: tensorrt {dialect.version} is reported to sample wrongly in {plan.precision} engines of the"
            " native form; leave it out, or use --form plugin or --precision fp32"
        )


def _runs_here(here: Environment) -> bool:
    """Return whether this machine has a GPU that the engines were built for, so that they can be verified."""
    gpu = current_gpu()
    return gpu is not None and gpu.compute_capability == here.dialect.compute_capability


def _default_name(plan: Plan, here: Environment) -> str:
    """Return the name of the folder: target, flavour and its version, precision and form."""
    slug = re.sub(r"[^a-z0-9]+", "-", (here.gpu or "").lower()).strip("-")
    # TensorRT-RTX builds for a compute capability, the full TensorRT for the GPU it runs on.
    full = here.dialect.flavour is Flavour.TENSORRT
    place = slug if full and slug else f"sm{here.dialect.compute_capability}"
    return f"{place}-{here.dialect.flavour}-{here.dialect.version}-{plan.precision}-{plan.form}"


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise OutputError(f"engines {target} exist; add --overwrite, or another --name")


# -- one graph ------------------------------------------------------------------------------------------------------


def _build_graph(worker: Worker, plan: Plan, graph: str, folder: Path, on_progress: Progress) -> EngineFile:
    """Rewrite a graph, build it in the worker, and compare its inputs and outputs with the manifest's."""
    step = f"{graph} engine"
    contract = plan.bundle.manifest.io[graph]
    profiles, pinned, dialect = plan.profiles(graph), plan.pinned(graph), worker.environment.dialect
    file = folder / f"{graph}.plan"
    on_progress(step, 0.0, "rewriting the graph")
    # The rewritten graph is as large as the bundle's; it is removed before the engine is written beside it.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".graph-") as scratch:
        onnx_file = Path(scratch) / contract.file
        model = plan.bundle.load(
            lambda source: rewrite_file(
                source / contract.file, onnx_file, dialect, precision=plan.lowering, form=plan.form, pinned=pinned
            )
        )
        built = worker.build(
            GraphJob(str(onnx_file), str(file), profiles, asdict(Expected.of(model))),
            lambda fraction, phase: on_progress(step, fraction, phase),
        )
    on_progress(step, 1.0, "done")
    for given, rows in ((built.inputs, contract.inputs), (built.outputs, contract.outputs)):
        _compare(graph, given, rows, pinned, dialect)
    return EngineFile(
        sha256_of(file), file.stat().st_size, round(built.seconds, 2), built.inputs, built.outputs, profiles
    )


def _compare(
    graph: str,
    built: Sequence[TensorRecord],
    rows: Sequence[TensorContract],
    pinned: Mapping[str, int],
    dialect: Dialect,
) -> None:
    """Raise BundleError unless a network's inputs or outputs are the manifest's."""

    def text(name: str, dtype: str, shape: Sequence[object]) -> str:
        return f"{name} {dtype} [{', '.join(map(str, shape))}]"

    wanted: list[tuple[str, str, tuple[str | int, ...]]] = [(row.name, row.dtype, row.shape) for row in rows]
    for i in range(max(len(built), len(wanted))):
        ours = built[i] if i < len(built) else None
        name, dtype, shape = wanted[i] if i < len(wanted) else ("nothing", "", ())
        if dtype == "int64" and dialect.is_8:
            dtype = "int32"
        fits = ours is not None and (ours.name, ours.dtype, len(ours.shape)) == (name, dtype, len(shape))
        if fits and ours is not None:
            for side, axis in zip(ours.shape, shape, strict=True):
                legal = {axis} if isinstance(axis, int) else {-1, pinned.get(axis, -1)}
                # An output's size may follow from fixed inputs: TensorRT then knows more than the manifest.
                computed = isinstance(axis, str) and axis not in pinned and side > 0
                fits = fits and (side in legal or computed)
        if not fits:
            has = "nothing" if ours is None else text(ours.name, ours.dtype, ours.shape)
            raise BundleError(
                f"the {graph} engine has {has} where the manifest says {text(name, dtype, shape)};"
                " export the bundle again with glip-export"
            )
