"""Bundle to engines, all or nothing: built in a temporary folder beside the target, then renamed."""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.bundle.engines import ENGINES, EngineFile, EngineRecord, PluginRecord, TensorRecord
from glip_deploy.bundle.manifest import MANIFEST, Bundle
from glip_deploy.errors import GlipError
from glip_deploy.files import sha256_of
from glip_engines.trt import GraphJob, Settings, choose_flavour, target_of

if TYPE_CHECKING:
    import onnx_ir

    from glip_engines.trt import Flavour
    from glip_engines.worker import Environment, Worker

__all__ = [
    "BUCKETS",
    "FORMS",
    "GRAPHS",
    "PRECISIONS",
    "BuildOptions",
    "BuildResult",
    "Range",
    "build_engines",
    "parse_range",
    "parse_size",
]

PRECISIONS = ("fp32", "fp16", "bf16")
FORMS = ("native", "plugin")
BUCKETS = (16, 32, 64, 128, 256)
"""Prompt lengths that suit `BuildOptions.tokens`: prompts are padded to the next one. Each is an optimisation profile
of its own, with kernels of its own: quicker to run than one range, and as many times slower to build."""
GRAPHS = ("text", "image")
CELL = 32
"""Sides of a canvas are multiples of this."""
MAX_SIDE = 8192
PLUGIN_FILE = "libglip_deform.so"
"""The plugin's library in a folder of engines."""


@dataclass(frozen=True)
class Range:
    """Smallest, best and largest size of an axis."""

    least: int
    best: int
    most: int

    @classmethod
    def fixed(cls, size: int) -> Range:
        """One size only."""
        return cls(size, size, size)

    @property
    def is_fixed(self) -> bool:
        """Whether there is one size only."""
        return self.least == self.most

    def __str__(self) -> str:
        return str(self.best) if self.is_fixed else f"{self.least}:{self.best}:{self.most}"


@dataclass(frozen=True)
class BuildOptions:
    """What to build. None takes the default that `build_engines` describes."""

    flavour: str | None = None
    precision: str | None = None
    form: str | None = None
    plugin: Path | None = None
    height: Range | None = None
    width: Range | None = None
    tokens: tuple[Range, ...] | None = None
    """One optimisation profile each: fixed lengths (`BUCKETS`), or one range."""
    classes: Range | None = None
    batch: Range = Range(1, 1, 1)
    workspace: int | None = None
    """Bytes the builder may use for intermediate results of one layer."""
    timing_cache: Path | None = None
    optimization_level: int | None = None
    arch: str | None = None
    name: str | None = None
    """Of the folder under the bundle's `engines`."""
    overwrite: bool = False


@dataclass(frozen=True)
class BuildResult:
    """What was written."""

    path: Path
    record: EngineRecord


def parse_range(text: str, option: str) -> Range:
    """Read "N" or "MIN:BEST:MAX".

    Raises:
        GlipError: neither, or not in order.
    """
    match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}):(\d{1,9}))?", text.strip())
    if match is None:
        raise GlipError(f'{option} is "{text}"; write one number, or MIN:BEST:MAX such as 1:8:80')
    numbers = [int(part) for part in match.groups() if part is not None]
    if numbers[0] < 1:
        raise GlipError(f"{option} is {text}; the smallest is 1")
    if numbers != sorted(numbers):
        raise GlipError(f"{option} is {text}; write it in order, MIN:BEST:MAX")
    return Range.fixed(numbers[0]) if len(numbers) == 1 else Range(*numbers)


def parse_size(text: str, option: str) -> tuple[int, int]:
    """Read "HEIGHTxWIDTH", both multiples of 32.

    Raises:
        GlipError: something else.
    """
    match = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", text.strip())
    if match is None:
        raise GlipError(f'{option} is "{text}"; write HEIGHTxWIDTH such as 800x1344')
    height, width = (int(side) for side in match.groups())
    for side in (height, width):
        if side % CELL or not CELL <= side <= MAX_SIDE:
            near = min(max(-(-side // CELL) * CELL, CELL), MAX_SIDE)
            raise GlipError(
                f"{option} is {text}; both sides are multiples of {CELL} from {CELL} to {MAX_SIDE};"
                f" {near} is next to {side}"
            )
    return height, width


def build_engines(
    bundle_path: Path,
    options: BuildOptions,
    on_progress: Callable[[str, float, str], None] = lambda step, fraction, phase: None,
) -> BuildResult:
    """Build the text and the image engine of a bundle.

    In the plugin's form its library is compiled for the target, once per machine, unless one is given; a copy travels
    in the folder of engines, which then needs nothing else.

    Defaults: the flavour that is installed; fp16, or the bundle's own precision if it was exported in half; native
    operators unless a plugin library is given; canvases of every size the bundle's resizing rule makes; prompts of
    every length; 1 to 128 classes; one picture at a time; this machine's GPU.

    Args:
        bundle_path: an exported bundle; engines go into its folder `engines`.
        options: what to build.
        on_progress: called with the step ("text engine", "image engine"), its done fraction and what goes on.

    Raises:
        GlipError: bad options, not a bundle, flavour not installed, a target that does not exist, a graph that is
            refused, a full disk. Nothing is left behind.
    """
    from glip_engines.worker import Worker

    flavour = choose_flavour(options.flavour)
    bundle = Bundle.open(bundle_path)
    plan = _Plan.of(bundle, options, flavour)
    library = plan.plugin
    if plan.form == "plugin" and library is None:
        library = _compile_plugin(flavour, options.arch, on_progress)
    settings = Settings(
        flavour,
        plan.precision,
        options.arch,
        None if library is None else str(library),
        options.workspace,
        None if options.timing_cache is None else str(options.timing_cache),
        options.optimization_level,
    )
    with Worker(settings) as worker:
        target = _target(bundle, plan, flavour, worker.environment)
        with _temporary_sibling(target) as folder:
            engines = {f"{graph}.plan": _build_graph(worker, plan, graph, folder, on_progress) for graph in GRAPHS}
            here = worker.environment
            plugin = None
            if library is not None:
                plugin = PluginRecord(PLUGIN_FILE, sha256_of(library))
                shutil.copyfile(library, folder / PLUGIN_FILE)
            record = EngineRecord(
                flavour=flavour.value,
                version=here.version,
                compute_capability=here.compute_capability,
                gpu=here.gpu,
                precision=plan.precision,
                form=plan.form,
                plugin=plugin,
                manifest_sha256=sha256_of(bundle.path / MANIFEST),
                options=plan.command_options(),
                engines=engines,
            )
            record.write(folder)
            _deliver(folder, target, options.overwrite)
    return BuildResult(target, record)


@dataclass(frozen=True)
class _Plan:
    """Options with every default filled in, checked against the bundle."""

    bundle: Bundle
    options: BuildOptions
    precision: str
    form: str
    plugin: Path | None
    height: Range
    width: Range
    tokens: tuple[Range, ...]
    classes: Range

    @classmethod
    def of(cls, bundle: Bundle, options: BuildOptions, flavour: Flavour) -> _Plan:
        """Fill in and check.

        Raises:
            GlipError: the first option that cannot be, with what can.
        """
        precision = _precision(bundle, options.precision)
        plugin = None if options.plugin is None else options.plugin.resolve()
        form = options.form or ("native" if plugin is None else "plugin")
        if form not in FORMS:
            raise GlipError(f'form is "{form}"; legal is {" or ".join(FORMS)}')
        if form == "native" and plugin is not None:
            raise GlipError("--form native uses no plugin; leave out --plugin, or use --form plugin")
        if plugin is not None and not plugin.is_file():
            raise GlipError(f"--plugin {options.plugin} is not a file; leave it out and --form plugin compiles one")
        if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
            raise GlipError(f"--optimization-level is {options.optimization_level}; legal is 0 to 5")
        if options.workspace is not None and options.workspace < 1:
            raise GlipError(f"--workspace is {options.workspace} bytes; leave it out for no limit")
        if options.name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", options.name):
            raise GlipError(f'--name is "{options.name}"; legal are letters, digits, ".", "-" and "_", no leading dot')
        if options.timing_cache is not None and flavour.value == "tensorrt-rtx":
            raise GlipError(
                "tensorrt-rtx keeps no timing cache (it times nothing while building); leave out --timing-cache"
            )
        longest = -(-int(bundle.manifest["config"]["input"]["longest_side"]) // CELL) * CELL
        shortest = -(-int(bundle.manifest["config"]["input"]["shortest_side"]) // CELL) * CELL
        height = options.height or Range(CELL, min(shortest, longest), longest)
        width = options.width or Range(CELL, longest, longest)
        for name, axis in (("height", height), ("width", width)):
            if not axis.least <= axis.best <= axis.most:
                raise GlipError(
                    f"{name} is {axis.least} at least, {axis.best} at best, {axis.most} at most; put them in order"
                )
        tokens = options.tokens or (Range(1, min(BUCKETS[0], bundle.max_tokens), bundle.max_tokens),)
        for bucket in tokens:
            if bucket.most > bundle.max_tokens:
                raise GlipError(f"--tokens is {bucket}; this bundle's prompts have {bundle.max_tokens} tokens at most")
        classes = options.classes or Range(1, 8, 128)
        return cls(bundle, options, precision, form, plugin, height, width, tokens, classes)

    def command_options(self) -> str:
        """What to type after `glip-build BUNDLE` for the same engines; flavour and target are the machine's."""
        size = ["--size", f"{self.height.best}x{self.width.best}"]
        if not (self.height.is_fixed and self.width.is_fixed):
            size = []
            for option, name in (("--min", "least"), ("--opt", "best"), ("--max", "most")):
                size += [option, f"{getattr(self.height, name)}x{getattr(self.width, name)}"]
        words = ["--precision", self.precision, "--form", self.form, *size]
        words += ["--tokens", ",".join(str(bucket) for bucket in self.tokens)]
        words += ["--classes", str(self.classes), "--batch", str(self.options.batch)]
        for option, value in (
            ("--plugin", self.plugin),
            ("--workspace", None if self.options.workspace is None else f"{self.options.workspace}B"),
            ("--timing-cache", self.options.timing_cache),
            ("--optimization-level", self.options.optimization_level),
            ("--name", self.options.name),
        ):
            if value is not None:
                words += [option, str(value)]
        return shlex.join(words)

    def axes(self, graph: str) -> list[dict[str, Range]]:
        """Ranges of the named axes, one dictionary an optimisation profile."""
        if graph == "text":  # prompts are encoded one at a time, whatever the batch of pictures
            return [{"batch": Range.fixed(1), "tokens": bucket} for bucket in self.tokens]
        fixed = {"batch": self.options.batch, "height": self.height, "width": self.width, "classes": self.classes}
        return [{**fixed, "tokens": bucket} for bucket in self.tokens]


def _precision(bundle: Bundle, wanted: str | None) -> str:
    own = str(bundle.manifest.get("precision", "fp32"))
    if wanted is not None and wanted not in PRECISIONS:
        raise GlipError(f'precision is "{wanted}"; legal is {", ".join(PRECISIONS)}')
    if own == "fp32":
        return wanted or "fp16"
    if wanted not in (None, own):
        raise GlipError(
            f"bundle {bundle.path} was exported in {own} and cannot be built in {wanted};"
            f" leave out --precision, or export again with --precision fp32"
        )
    return own


def _compile_plugin(flavour: Flavour, arch: str | None, on_progress: Callable[[str, float, str], None]) -> Path:
    """The plugin for a named target, or for this machine's GPU.

    Raises:
        GlipError: no GPU and none named, a GPU the kernels are not written for, no compiler.
    """
    from glip_engines.compile import ARCHITECTURES, build_library

    target = target_of(flavour, arch)
    # Machine code runs on its own generation and the later members of it.
    fitting = [known for known in ARCHITECTURES if known // 10 == target // 10 and known <= target]
    if not fitting:
        known = ", ".join(f"SM{known}" for known in ARCHITECTURES)
        raise GlipError(f"the plugin has no kernels for SM{target}; it has them for {known}; use --form native")
    on_progress("plugin", 0.0, "compiling")
    library = build_library([fitting[-1]], tensorrt=True)
    on_progress("plugin", 1.0, "done")
    return library


# -- one graph ------------------------------------------------------------------------------------------------------


def _build_graph(
    worker: Worker,
    plan: _Plan,
    graph: str,
    folder: Path,
    on_progress: Callable[[str, float, str], None],
) -> EngineFile:
    """Rewrite a graph, build it in the worker, compare its borders with the manifest's."""
    step = f"{graph} engine"
    contract = plan.bundle.manifest["io"][graph]
    axes = plan.axes(graph)
    profiles = tuple(
        {
            row["name"]: tuple(
                tuple(side if isinstance(side, int) else getattr(ranges[side], which) for side in row["shape"])
                for which in ("least", "best", "most")
            )
            for row in contract["inputs"]
        }
        for ranges in axes
    )
    on_progress(step, 0.0, "rewriting the graph")
    # The rewritten graph is as large as the bundle's; it goes before the engine is written beside it for good.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".graph-") as scratch:
        onnx_file = Path(scratch) / contract["file"]
        pinned = {
            axis: ranges.least
            for axis, ranges in axes[0].items()
            if ranges.is_fixed and all(r[axis] == ranges for r in axes)
        }
        _rewrite(plan, contract["file"], pinned, onnx_file, worker.environment)
        built = worker.build(
            GraphJob(str(onnx_file), str(folder / f"{graph}.plan"), profiles),
            lambda fraction, phase: on_progress(step, fraction, phase),
        )
    on_progress(step, 1.0, "done")
    for given, rows in ((built.inputs, contract["inputs"]), (built.outputs, contract["outputs"])):
        _compare(graph, given, rows, pinned, worker.environment)
    file = folder / f"{graph}.plan"
    return EngineFile(
        sha256_of(file), file.stat().st_size, round(built.seconds, 2), built.inputs, built.outputs, profiles
    )


def _rewrite(plan: _Plan, source: str, pinned: Mapping[str, int], file: Path, here: Environment) -> None:
    """Write the graph in its precision and form, with the sizes that never change as numbers."""
    import onnx_ir

    from glip_engines.rewrite import for_tensorrt, use_native_ops, use_plugin
    from glip_engines.turing import products_as_sums

    model = onnx_ir.load(plan.bundle.path / source)
    if plan.precision != plan.bundle.manifest.get("precision", "fp32"):
        from glip_export.precision import to_precision

        model = to_precision(model, plan.precision)
    model = use_plugin(model) if plan.form == "plugin" else use_native_ops(model)
    model = for_tensorrt(model, old_parser=here.old_parser)
    if here.multiplies_half_only:
        model = products_as_sums(model)
    for value in model.graph.inputs:
        value.shape = onnx_ir.Shape([_pin(side, pinned) for side in value.shape or ()])
    onnx_ir.save(model, file, external_data=f"{file.name}.data", size_threshold_bytes=1024)


def _pin(side: int | onnx_ir.SymbolicDim, pinned: Mapping[str, int]) -> int | str | None:
    if isinstance(side, int):
        return side
    return pinned.get(side.value, side.value) if side.value is not None else None


def _compare(
    graph: str,
    built: Sequence[TensorRecord],
    rows: Sequence[Mapping[str, Any]],
    pinned: Mapping[str, int],
    here: Environment,
) -> None:
    """Raise unless the network's borders are the manifest's."""

    def text(name: str, dtype: str, shape: Sequence[object]) -> str:
        return f"{name} {dtype} [{', '.join(map(str, shape))}]"

    wanted = [(row["name"], row["dtype"], row["shape"]) for row in rows]
    for i in range(max(len(built), len(wanted))):
        ours = built[i] if i < len(built) else None
        name, dtype, shape = wanted[i] if i < len(wanted) else ("nothing", "", ())
        if dtype == "int64" and not here.has_int64:
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
            raise GlipError(
                f"the {graph} engine has {has} where the manifest says {text(name, dtype, shape)};"
                " export the bundle again with glip-export"
            )


# -- the folder -----------------------------------------------------------------------------------------------------


def _target(bundle: Bundle, plan: _Plan, flavour: Flavour, here: Environment) -> Path:
    """The folder to write; checked before a minute is spent."""
    slug = re.sub(r"[^a-z0-9]+", "-", (here.gpu or "").lower()).strip("-")
    # tensorrt_rtx builds for a compute capability, the full TensorRT for the GPU it runs on.
    place = slug if flavour.value == "tensorrt" and slug else f"sm{here.compute_capability}"
    name = plan.options.name or f"{place}-{flavour}-{here.version}-{plan.precision}-{plan.form}"
    target = (bundle.path / ENGINES / name).resolve()
    _check_target(target, plan.options.overwrite)
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise GlipError(f"engines {target} exist; add --overwrite, or another --name")


@contextmanager
def _temporary_sibling(target: Path) -> Iterator[Path]:
    """A folder on the same disk as `target`, gone afterwards whatever happens."""
    parent = target.parent
    made = not parent.exists()
    folder: Path | None = None
    try:
        parent.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{target.name[:64]}-"))
        yield folder
    except OSError as error:
        free = ""
        with suppress(OSError):
            free = f" {shutil.disk_usage(parent.parent).free / 1e9:.1f} GB are free there"
        raise GlipError(
            f"engines {target}: writing failed ({error.strerror or error}); nothing was written.{free}"
        ) from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if made:
            with suppress(OSError):  # it holds the engines unless the build failed
                parent.rmdir()


def _deliver(folder: Path, target: Path, overwrite: bool) -> None:
    """Rename into place; old engines are put aside first, so that a failure leaves one of the two whole."""
    _check_target(target, overwrite)  # again: another build may have ended in the meantime
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
    if not target.exists():
        folder.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:64]}-old-"))
    old.rmdir()
    target.rename(old)
    try:
        folder.rename(target)
    except BaseException:  # Ctrl-C included
        if not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
