"""The one file that knows TensorRT's flavours: `tensorrt` 8.6, 10 and 11, and `tensorrt_rtx`.

What differs, and is hidden here:

- Strong typing: always on in 11 and tensorrt_rtx, a flag of the network in 10 whose number changed (asked for by name),
  absent in 8.6, where the FP16 builder flag is set and layers of fp32 islands are pinned.
- int64: 8.6 has none at its borders, the same tensors are int32 there.
- Target: `tensorrt` builds on the GPU it serves; tensorrt_rtx builds for named compute capabilities, with no GPU near.
- Timing caches and their absence, progress monitors and theirs, what a parser error carries.

TensorRT aborts the process on some faults: run a build in a process of its own (`glip_engines.worker`).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.bundle.engines import TensorRecord
from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = [
    "BuiltGraph",
    "Flavour",
    "Gpu",
    "GraphJob",
    "Settings",
    "Toolkit",
    "choose_flavour",
    "current_gpu",
    "installed",
    "library_folder",
    "target_of",
]


class Flavour(StrEnum):
    """Which TensorRT."""

    TENSORRT = "tensorrt"
    RTX = "tensorrt-rtx"

    @property
    def module(self) -> str:
        """The Python module."""
        return self.value.replace("-", "_")


@dataclass(frozen=True)
class Gpu:
    """The GPU of this machine that a build would use."""

    name: str
    compute_capability: int
    """80 for 8.0."""


@dataclass(frozen=True)
class Settings:
    """What holds for every engine of one build."""

    flavour: Flavour
    precision: str
    arch: str | None = None
    """SM80 and the like; None is this machine's GPU."""
    plugin: str | None = None
    """Library to load."""
    workspace: int | None = None
    """Bytes."""
    timing_cache: str | None = None
    optimization_level: int | None = None


@dataclass(frozen=True)
class GraphJob:
    """One engine to build."""

    onnx: str
    plan: str
    """Where to write the engine."""
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]
    """By optimisation profile and input: smallest, best and largest shape."""


@dataclass(frozen=True)
class BuiltGraph:
    """What came of it."""

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    seconds: float


def installed(flavour: Flavour) -> bool:
    """Whether the Python module is there (type stubs alone, which make an empty package, do not count)."""
    spec = importlib.util.find_spec(flavour.module)
    return spec is not None and spec.origin is not None


def choose_flavour(wanted: str | None) -> Flavour:
    """The flavour asked for, or the one that is installed (the full TensorRT where both are).

    Raises:
        GlipError: not a flavour, or not installed.
    """
    if wanted is None:
        for flavour in Flavour:
            if installed(flavour):
                return flavour
        raise GlipError(
            "neither tensorrt nor tensorrt-rtx is installed; pip install 'glip-deploy[tensorrt]' on the target machine,"
            " or 'glip-deploy[tensorrt-rtx]', which also builds without a GPU"
        )
    try:
        flavour = Flavour(wanted)
    except ValueError:
        raise GlipError(f'flavour is "{wanted}"; legal is {" or ".join(Flavour)}') from None
    if not installed(flavour):
        raise GlipError(f"{flavour} is not installed; pip install 'glip-deploy[{flavour}]'")
    return flavour


def library_folder(flavour: Flavour) -> Path | None:
    """Where the wheel keeps its shared libraries; None if they are the system's."""
    for name in (f"{flavour.module}_libs",):
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations if spec is not None else None) or ():
            return Path(place)
    return None


def current_gpu() -> Gpu | None:
    """Ask the driver for the first visible GPU; None without a driver or a GPU."""
    name, device, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        calls = (
            cuda.cuInit(0),
            cuda.cuDeviceGet(ctypes.byref(device), 0),
            cuda.cuDeviceGetName(name, len(name), device),
            cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device),
            cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
        )
    except (OSError, AttributeError):
        return None
    return None if any(calls) else Gpu(name.value.decode(errors="replace"), 10 * major.value + minor.value)


def target_of(flavour: Flavour, arch: str | None) -> int:
    """The compute capability a build is for, without loading TensorRT; `Toolkit` checks that it can be.

    Raises:
        GlipError: not an SM and a number, or none named and no GPU here.
    """
    if arch is not None:
        match = re.fullmatch(r"SM(\d{2,3})", arch.upper())
        if match is None:
            raise GlipError(f'--arch is "{arch}"; write SM and a compute capability, SM80 say')
        return int(match[1])
    gpu = current_gpu()
    if gpu is None:
        instead = "name one with --arch, SM80 say" if flavour is Flavour.RTX else "build on the target machine"
        raise GlipError(f"there is no NVIDIA GPU or driver here to build for; {instead}")
    return gpu.compute_capability


_LOGGERS: dict[Flavour, Any] = {}
"""TensorRT keeps the first logger of a process for good, so there is one."""


def _logger(module: Any, flavour: Flavour) -> Any:
    if flavour not in _LOGGERS:

        class Log(module.ILogger):  # type: ignore[misc]  # the base class is known at run time only
            """Keeps errors for the message that ends the build."""

            def __init__(self) -> None:
                super().__init__()
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity <= module.ILogger.Severity.ERROR:
                    self.errors.append(message)

        _LOGGERS[flavour] = Log()
    return _LOGGERS[flavour]


class Toolkit:
    """One flavour of TensorRT, loaded, with the target it builds for.

    Args:
        settings: flavour, target, plugin and the rest.

    Attributes:
        version: of the flavour.
        gpu: this machine's GPU, if that is the target; None if the target was named.
        compute_capability: the target's.

    Raises:
        GlipError: not installed or not loadable, no such target, no GPU where one is needed, a plugin library that
            cannot be loaded, a precision this version has not.
    """

    def __init__(self, settings: Settings) -> None:
        flavour = choose_flavour(settings.flavour)
        try:
            module: Any = importlib.import_module(flavour.module)
            version = str(module.__version__)
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            raise GlipError(f"{flavour} cannot be loaded ({error}); pip install 'glip-deploy[{flavour}]'") from None
        self.flavour, self.version, self._trt, self._settings = flavour, version, module, settings
        self._major = int(version.split(".", maxsplit=1)[0])
        self._flags = module.BuilderFlag.__members__
        self.strongly_typed = "STRONGLY_TYPED" in module.NetworkDefinitionCreationFlag.__members__
        if settings.precision == "bf16" and not self.strongly_typed:
            raise GlipError(f"{flavour} {version} has no bf16; use --precision fp16")
        self.gpu, self.compute_capability = self._target(settings.arch)
        if self.multiplies_half_only and settings.precision != "fp16":
            raise GlipError(
                f"{flavour} builds for SM75 in fp16 only, not in {settings.precision}; use --precision fp16"
            )
        self._log = _logger(module, flavour)
        if settings.plugin is not None:
            self._load_plugin(settings.plugin)

    @property
    def has_int64(self) -> bool:
        """Whether int64 inputs and outputs stay so; int32 otherwise."""
        return self.flavour is Flavour.RTX or self._major >= 10

    @property
    def old_parser(self) -> bool:
        """Whether the parser knows opset 17 only (TensorRT 8.6)."""
        return self.flavour is Flavour.TENSORRT and self._major < 10

    @property
    def multiplies_half_only(self) -> bool:
        """Whether matrices are multiplied in fp16 alone, and bf16 is unknown (see `glip_engines.turing`)."""
        return self.flavour is Flavour.RTX and self.compute_capability == 75

    def architectures(self) -> dict[str, int]:
        """Targets a build may name, as this version lists them; none for the full TensorRT."""
        members = getattr(getattr(self._trt, "ComputeCapability", None), "__members__", {})
        return {name: int(name[2:]) for name in members if re.fullmatch(r"SM\d+", name)}

    def _target(self, arch: str | None) -> tuple[Gpu | None, int]:
        """The GPU, or the compute capability that was named (by name: the enumeration takes any number)."""
        legal = self.architectures() if self.flavour is Flavour.RTX else {}
        if arch is not None:
            if not legal:
                raise GlipError(
                    f"{self.flavour} builds for the GPU of its machine; leave out --arch, or use tensorrt-rtx"
                )
            if arch.upper() not in legal:
                raise GlipError(f'--arch is "{arch}"; {self.flavour} {self.version} builds for {", ".join(legal)}')
            return None, legal[arch.upper()]
        gpu = current_gpu()
        if gpu is None:
            instead = f"name one with --arch: {', '.join(legal)}" if legal else "build on the target machine"
            raise GlipError(f"there is no NVIDIA GPU or driver here to build for; {instead}")
        if legal and gpu.compute_capability not in legal.values():
            raise GlipError(
                f"{self.flavour} {self.version} does not support {gpu.name} (SM{gpu.compute_capability});"
                f" it builds for {', '.join(legal)}; use --flavour tensorrt"
            )
        return gpu, gpu.compute_capability

    def _load_plugin(self, library: str) -> None:
        trt_module = self._trt
        self._log.errors.clear()
        trt_module.init_libnvinfer_plugins(self._log, "")
        before = len(self._creators())
        handle: Any = None
        try:
            registry: trt.IPluginRegistry = trt_module.get_plugin_registry()
            handle = registry.load_library(library)
        except Exception as error:  # bindings raise what they like for a library that is none
            self._log.errors.append(str(error))
        if handle is None or len(self._creators()) == before:
            why = self._reason("it holds no TensorRT plugin")
            raise GlipError(f"plugin library {library} was refused ({why}); build it for {self.flavour} {self.version}")

    def _creators(self) -> Sequence[Any]:
        registry: trt.IPluginRegistry = self._trt.get_plugin_registry()
        creators: Sequence[Any] = getattr(registry, "all_creators", None) or registry.plugin_creator_list
        return creators

    def build(self, job: GraphJob, on_progress: Callable[[float, str], bool]) -> BuiltGraph:
        """Parse a graph, build its engine and write it.

        Args:
            job: what to build.
            on_progress: called with the done fraction and the name of what goes on; returns False to stop.

        Raises:
            GlipError: the parser or the builder refused, or the profiles do not fit.
            OSError: the engine or the timing cache could not be written.
        """
        started = time.perf_counter()
        builder, network = self._parse(job)
        config: trt.IBuilderConfig = builder.create_builder_config()
        self._configure(config)
        for profile in job.profiles:
            config.add_optimization_profile(self._profile(builder, profile))
        cache = self._open_timing_cache(config)
        if hasattr(self._trt, "IProgressMonitor"):
            config.progress_monitor = _monitor(self._trt, on_progress)
        if not self.strongly_typed and self._settings.precision == "fp16":
            self._pin_types(config, network)
        self._log.errors.clear()
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise GlipError(f"{self.flavour} {self.version} could not build {Path(job.onnx).name}: {self._reason()}")
        with Path(job.plan).open("wb") as file:
            file.write(plan)
        if cache is not None:
            self._save_timing_cache(config, cache)
        inputs = tuple(self._record(network.get_input(i)) for i in range(network.num_inputs))
        outputs = tuple(self._record(network.get_output(i)) for i in range(network.num_outputs))
        return BuiltGraph(inputs, outputs, time.perf_counter() - started)

    def _parse(self, job: GraphJob) -> tuple[trt.Builder, trt.INetworkDefinition]:
        trt_module = self._trt
        self._log.errors.clear()
        try:
            builder: trt.Builder = trt_module.Builder(self._log)
        except (TypeError, RuntimeError) as error:  # the bindings' words for a null pointer
            raise GlipError(f"{self.flavour} {self.version} cannot start: {self._reason(str(error))}") from None
        kinds = trt_module.NetworkDefinitionCreationFlag.__members__
        wanted = ("STRONGLY_TYPED",) if self.strongly_typed else ("EXPLICIT_BATCH",)
        network = builder.create_network(sum(1 << int(kinds[name]) for name in wanted if name in kinds))
        parser: trt.OnnxParser = trt_module.OnnxParser(network, self._log)
        if not parser.parse_from_file(job.onnx):
            raise GlipError(
                f"{self.flavour} {self.version} refuses {Path(job.onnx).name}: {self._parser_error(parser)}"
            )
        return builder, network

    def _parser_error(self, parser: trt.OnnxParser) -> str:
        if not parser.num_errors:
            return self._reason()
        error = parser.get_error(0)
        name, operator = (getattr(error, part, lambda: "")() for part in ("node_name", "node_operator"))
        where = f"node {name} ({operator}): " if name or operator else f"node number {error.node()}: "
        return where + _one_line([error.desc()])

    def _configure(self, config: trt.IBuilderConfig) -> None:
        settings, trt_module = self._settings, self._trt
        if self.flavour is Flavour.RTX:
            rtx_config: Any = config  # the stubs are the full TensorRT's
            rtx_config.num_compute_capabilities = 1
            target = "CURRENT" if settings.arch is None else settings.arch.upper()
            rtx_config.set_compute_capability(getattr(trt_module.ComputeCapability, target), 0)
        if settings.workspace is not None:
            config.set_memory_pool_limit(trt_module.MemoryPoolType.WORKSPACE, settings.workspace)
        if settings.optimization_level is not None:
            config.builder_optimization_level = settings.optimization_level
        if settings.precision == "fp16" and not self.strongly_typed:
            config.set_flag(self._flags["FP16"])
            config.set_flag(self._flags["OBEY_PRECISION_CONSTRAINTS"])
        previews = getattr(getattr(trt_module, "PreviewFeature", None), "__members__", {})
        if "PROFILE_SHARING_0806" in previews:  # 8.6: several contexts may use one profile; always so later
            config.set_preview_feature(previews["PROFILE_SHARING_0806"], True)
        if settings.precision == "fp32" and "TF32" in self._flags:
            config.clear_flag(self._flags["TF32"])  # fp32 is asked for to compare with fp32

    def _pin_types(self, config: trt.IBuilderConfig, network: trt.INetworkDefinition) -> None:
        """Without strong typing, keep the graph's fp32 islands fp32: its casts alone bind nobody."""
        trt_module = self._trt
        moving = {getattr(trt_module.LayerType, name) for name in ("SHAPE", "CONSTANT", "CAST", "SHUFFLE", "IDENTITY")}
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            single = any(layer.get_output(k).dtype == trt_module.float32 for k in range(layer.num_outputs))
            if single and layer.type not in moving:
                layer.precision = trt_module.float32

    def _profile(self, builder: trt.Builder, shapes: Mapping[str, Sequence[Sequence[int]]]) -> trt.IOptimizationProfile:
        profile: trt.IOptimizationProfile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            sides: Any = tuple(least), tuple(best), tuple(most)  # the bindings make Dims of tuples
            profile.set_shape(name, *sides)
        return profile

    def _open_timing_cache(self, config: trt.IBuilderConfig) -> Path | None:
        if self._settings.timing_cache is None:
            return None
        if self.flavour is Flavour.RTX:
            raise GlipError(
                "tensorrt-rtx keeps no timing cache (it times nothing while building); leave out --timing-cache"
            )
        path = Path(self._settings.timing_cache)
        content = path.read_bytes() if path.is_file() else b""
        try:
            accepted = config.set_timing_cache(config.create_timing_cache(content), False)
        except (TypeError, RuntimeError):
            accepted = False
        if not accepted:
            raise GlipError(f"timing cache {path} is of another GPU or TensorRT; delete it or name another file")
        return path

    def _save_timing_cache(self, config: trt.IBuilderConfig, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
        temporary.replace(path)

    def _record(self, tensor: trt.ITensor) -> TensorRecord:
        names = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
        kind = tensor.dtype.name
        return TensorRecord(tensor.name, names.get(kind, kind.lower()), tuple(int(side) for side in tensor.shape[:]))

    def _reason(self, otherwise: str = "no reason given") -> str:
        """The first error logged is the cause, the rest its consequences."""
        return _one_line(self._log.errors) or otherwise


NO_GPU = re.compile(r"cudaError (35|100)|catchCudaError|CUDA initialization failure")
"""What tensorrt_rtx logs at every fault on a machine without a GPU; it explains nothing."""


def _one_line(messages: Sequence[str]) -> str:
    """The first telling line of TensorRT's messages, without its own source locations."""
    lines = [line.strip() for message in messages for line in message.splitlines()]
    told = [
        line for line in lines if line and not NO_GPU.search(line) and not re.match(r"(\[\d+\] )?Invalid Node", line)
    ]
    if not told:
        return ""
    line = re.sub(r"^\S*::\S+: Error Code \d+: ", "", told[0])
    line = re.sub(r"\.? In \S+ at \S+:\d+", "", line)
    return line[:400]


class _Fractions:
    """How much of nested phases is done; called from several threads."""

    def __init__(self, on_progress: Callable[[float, str], bool]) -> None:
        self._lock = threading.Lock()
        self._phases: dict[str, list[int]] = {}
        """Innermost last: steps and steps done."""
        self._on_progress = on_progress

    def start(self, name: str, steps: int) -> None:
        with self._lock:
            self._phases[name] = [max(1, steps), 0]

    def step(self, name: str, index: int) -> bool:
        with self._lock:
            if name in self._phases:
                self._phases[name][1] = index + 1
            fraction = 0.0
            for steps, done in reversed(self._phases.values()):
                fraction = min(1.0, (done + fraction) / steps)
            return self._on_progress(fraction, name)

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)


def _monitor(module: Any, on_progress: Callable[[float, str], bool]) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # the base class is known at run time only
        """Passes TensorRT's phases on."""

        def __init__(self) -> None:
            super().__init__()
            self.fractions = _Fractions(on_progress)

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self.fractions.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self.fractions.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            self.fractions.finish(phase_name)

    return Monitor()
