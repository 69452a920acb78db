"""The one module that calls TensorRT: it parses a graph, builds an engine and writes it.

What differs between `tensorrt` 8.6, 10 and 11 and `tensorrt_rtx`, and is hidden here:

- Strong typing: always on in 11 and tensorrt_rtx, a flag of the network in 10 whose number changed (asked for by name),
  absent in 8.6, where the FP16 builder flag is set and layers of fp32 islands are pinned.
- Target: `tensorrt` builds on the GPU it serves; tensorrt_rtx builds for named compute capabilities, with no GPU near.
- Timing caches and progress monitors, which not all have; what a parser error carries.

TensorRT aborts the process on some faults: run a build in a process of its own (`glip_engines.worker`).
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.backends.trt_engine import find_creator
from glip_deploy.bundle.engines import TensorRecord
from glip_deploy.errors import EngineError, EngineMismatch, MissingPackage, OptionError
from glip_deploy.files import write_atomically
from glip_engines.flavours import Dialect, Flavour, Gpu, choose_flavour, current_gpu
from glip_engines.inspection import Expected, check_network, single_tensors
from glip_engines.messages import one_line
from glip_engines.progress import make_monitor
from glip_engines.rewriting.deformable import PLUGIN_DOMAIN, PLUGIN_OPERATOR, PLUGIN_VERSION
from glip_engines.support import check_pair

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["BuiltGraph", "GraphJob", "Settings", "Toolkit"]


@dataclass(frozen=True)
class Settings:
    """What all engines of one build share."""

    flavour: Flavour
    precision: str
    arch: str | None = None
    """"SM80" and the like; None is this machine's GPU."""
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
    """By optimization profile and input: smallest, best and largest shape."""
    expected: Mapping[str, Any] | None = None
    """An `Expected` as a dictionary, which the parsed network must have; None checks nothing."""


@dataclass(frozen=True)
class BuiltGraph:
    """Inputs and outputs of a network whose engine was written, and how long that took."""

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    seconds: float


class Toolkit:
    """One flavour of TensorRT, loaded, with the target it builds for.

    Args:
        settings: flavour, target and the rest.

    Attributes:
        dialect: flavour, version and the target's compute capability.
        gpu: this machine's GPU, if that is the target; None if the target was named.

    Raises:
        MissingPackage: the flavour is not installed, or cannot be loaded.
        OptionError: a target or a precision that this version does not have.
        EngineError: no GPU where one is needed, or one that this version does not support.
    """

    def __init__(self, settings: Settings) -> None:
        flavour = choose_flavour(settings.flavour)
        try:
            module: Any = importlib.import_module(flavour.module)
            version = str(module.__version__)
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            raise MissingPackage(
                f"{flavour} cannot be loaded ({error}); pip install 'glip-deploy[{flavour}]'"
            ) from None
        self._trt, self._settings = module, settings
        self._name = f"{flavour} {version}"
        self._flags = module.BuilderFlag.__members__
        self.gpu, compute_capability = self._target(flavour, settings.arch)
        self.dialect = Dialect(flavour, version, compute_capability)
        if self.gpu is not None:
            check_pair(self.dialect, self.gpu.name)
        if settings.precision == "bf16" and self.dialect.is_8:
            raise OptionError(f"{self._name} has no bf16; use --precision fp16")
        if self.dialect.multiplies_half_only and settings.precision != "fp16":
            raise OptionError(
                f"{flavour} builds for SM75 in fp16 only, not in {settings.precision}; use --precision fp16"
            )
        self._log = _logger(module, flavour)

    def architectures(self) -> dict[str, int]:
        """Return the targets a build may name, as this version lists them; none for the full TensorRT."""
        members = getattr(getattr(self._trt, "ComputeCapability", None), "__members__", {})
        return {name: int(name[2:]) for name in members if re.fullmatch(r"SM\d+", name)}

    def _target(self, flavour: Flavour, arch: str | None) -> tuple[Gpu | None, int]:
        """Return the GPU, or the compute capability that was named (by name: the enumeration takes any number)."""
        legal = self.architectures() if flavour is Flavour.RTX else {}
        if arch is not None:
            if not legal:
                raise OptionError(f"{flavour} builds for the GPU of its machine; leave out --arch, or use tensorrt-rtx")
            if arch.upper() not in legal:
                raise OptionError(f'--arch is "{arch}"; {self._name} builds for {", ".join(legal)}')
            return None, legal[arch.upper()]
        gpu = current_gpu()
        if gpu is None:
            instead = f"name one with --arch: {', '.join(legal)}" if legal else "build on the target machine"
            raise EngineError(f"there is no NVIDIA GPU or driver here to build for; {instead}")
        if legal and gpu.compute_capability not in legal.values():
            raise EngineError(
                f"{self._name} does not support {gpu.name} (SM{gpu.compute_capability});"
                f" it builds for {', '.join(legal)}; use --flavor tensorrt"
            )
        return gpu, gpu.compute_capability

    def load_plugin(self, library: str) -> None:
        """Load the library of the deformable convolution's plugin.

        Raises:
            EngineError: it cannot be loaded, or does not hold that plugin.
        """
        self._log.errors.clear()
        self._trt.init_libnvinfer_plugins(self._log, "")
        creator: Any = None
        registry: trt.IPluginRegistry = self._trt.get_plugin_registry()
        try:
            if registry.load_library(library) is not None:
                creator = find_creator(registry, PLUGIN_OPERATOR, str(PLUGIN_VERSION), PLUGIN_DOMAIN)
        except Exception as error:  # the bindings raise various things for a file that is no library
            self._log.errors.append(str(error))
        if creator is None:
            why = self._reason(f"it holds no TensorRT plugin {PLUGIN_DOMAIN}::{PLUGIN_OPERATOR} {PLUGIN_VERSION}")
            raise EngineError(f"plugin library {library} was refused ({why}); build it for {self._name}")

    def build(self, job: GraphJob, on_progress: Callable[[float, str], bool]) -> BuiltGraph:
        """Parse a graph, build its engine and write it.

        Args:
            job: what to build.
            on_progress: called with the done fraction and the name of the phase; returns False to stop.

        Raises:
            EngineError: the parser or the builder refused, the parser understood the graph otherwise than it is
                written, or the profiles do not fit.
            EngineMismatch: the timing cache is of another GPU or TensorRT.
            OSError: the engine or the timing cache could not be written.
        """
        started = time.perf_counter()
        builder, network = self._parse(job)
        if job.expected is not None:
            try:
                check_network(self._trt, network, Expected(**job.expected), typed=not self.dialect.is_8)
            except EngineError as error:
                raise EngineError(
                    f"the parser of {self._name} misread {Path(job.onnx).name}: it {error}; no engine was built."
                    " Use another version of it, and report this"
                ) from None
        config: trt.IBuilderConfig = builder.create_builder_config()
        self._configure(config)
        for profile in job.profiles:
            config.add_optimization_profile(self._profile(builder, profile))
        cache = self._open_timing_cache(config)
        if hasattr(self._trt, "IProgressMonitor"):
            config.progress_monitor = make_monitor(self._trt, on_progress)
        if self.dialect.is_8 and self._settings.precision == "fp16":
            self._pin_types(network, single_tensors(job.onnx))
        self._log.errors.clear()
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(f"{self._name} could not build {Path(job.onnx).name}: {self._reason()}")
        with Path(job.plan).open("wb") as file:
            file.write(plan)
        if cache is not None:
            write_atomically(cache, bytes(config.get_timing_cache().serialize()))
        inputs = tuple(_record(network.get_input(i)) for i in range(network.num_inputs))
        outputs = tuple(_record(network.get_output(i)) for i in range(network.num_outputs))
        return BuiltGraph(inputs, outputs, time.perf_counter() - started)

    def _parse(self, job: GraphJob) -> tuple[trt.Builder, trt.INetworkDefinition]:
        self._log.errors.clear()
        try:
            builder: trt.Builder = self._trt.Builder(self._log)
        except (TypeError, RuntimeError) as error:  # what the bindings raise for a null pointer
            raise EngineError(f"{self._name} cannot start: {self._reason(str(error))}") from None
        kinds = self._trt.NetworkDefinitionCreationFlag.__members__
        wanted = "EXPLICIT_BATCH" if self.dialect.is_8 else "STRONGLY_TYPED"
        network = builder.create_network(1 << int(kinds[wanted]) if wanted in kinds else 0)
        parser: trt.OnnxParser = self._trt.OnnxParser(network, self._log)
        parser_flags = getattr(getattr(self._trt, "OnnxParserFlag", None), "__members__", {})
        if (
            "NATIVE_INSTANCENORM" in parser_flags
        ):  # 8.6 has no layer for the group norms otherwise, but asks for a plugin
            parser.set_flag(parser_flags["NATIVE_INSTANCENORM"])
        if not parser.parse_from_file(job.onnx):
            raise EngineError(f"{self._name} refuses {Path(job.onnx).name}: {self._parser_error(parser)}")
        return builder, network

    def _parser_error(self, parser: trt.OnnxParser) -> str:
        if not parser.num_errors:
            return self._reason()
        error = parser.get_error(0)
        name, operator = (getattr(error, part, lambda: "")() for part in ("node_name", "node_operator"))
        where = f"node {name} ({operator}): " if name or operator else f"node number {error.node()}: "
        return where + one_line([error.desc()])

    def _configure(self, config: trt.IBuilderConfig) -> None:
        settings, module = self._settings, self._trt
        if self.dialect.flavour is Flavour.RTX:
            rtx_config: Any = config  # the type stubs are the full TensorRT's
            rtx_config.num_compute_capabilities = 1
            target = "CURRENT" if settings.arch is None else settings.arch.upper()
            rtx_config.set_compute_capability(getattr(module.ComputeCapability, target), 0)
        if settings.workspace is not None:
            config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace)
        if settings.optimization_level is not None:
            config.builder_optimization_level = settings.optimization_level
        if settings.precision == "fp16" and self.dialect.is_8:
            config.set_flag(self._flags["FP16"])
            config.set_flag(self._flags["OBEY_PRECISION_CONSTRAINTS"])
        previews = getattr(getattr(module, "PreviewFeature", None), "__members__", {})
        if "PROFILE_SHARING_0806" in previews:  # 8.6: several contexts may use one profile; always so later
            config.set_preview_feature(previews["PROFILE_SHARING_0806"], True)
        if (
            "REQUIRE_USER_ALLOCATION" in self._flags
        ):  # TensorRT-RTX may allocate while it runs otherwise: no CUDA graphs
            config.set_flag(self._flags["REQUIRE_USER_ALLOCATION"])
        if "TF32" in self._flags:  # its 10 bits are those of fp16, and fp32 is asked for where they do not suffice
            config.clear_flag(self._flags["TF32"])

    def _pin_types(self, network: trt.INetworkDefinition, single: frozenset[str]) -> None:
        """Keep fp32 islands in fp32 where there is no strong typing: casts alone do not bind the builder.

        What only moves data is pinned too: between a convolution that makes sampling positions and the sampling, the
        builder could round them in a reshape. Casts, constants and shapes have their type by what they are.

        Args:
            network: as parsed.
            single: names of the tensors that the graph has in fp32; a weakly typed network may report another type.
        """
        module = self._trt
        fixed = {getattr(module.LayerType, name) for name in ("SHAPE", "CONSTANT", "CAST")}
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            outputs = [layer.get_output(k) for k in range(layer.num_outputs)]
            pinned = [k for k, one in enumerate(outputs) if one.dtype == module.float32 or one.name in single]
            if pinned and layer.type not in fixed:
                layer.precision = module.float32
                for k in pinned:
                    layer.set_output_type(k, module.float32)

    def _profile(self, builder: trt.Builder, shapes: Mapping[str, Sequence[Sequence[int]]]) -> trt.IOptimizationProfile:
        profile: trt.IOptimizationProfile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            sides: Any = tuple(least), tuple(best), tuple(most)  # the bindings make Dims of tuples
            profile.set_shape(name, *sides)
        return profile

    def _open_timing_cache(self, config: trt.IBuilderConfig) -> Path | None:
        if self._settings.timing_cache is None:
            return None
        path = Path(self._settings.timing_cache)
        content = path.read_bytes() if path.is_file() else b""
        try:
            accepted = config.set_timing_cache(config.create_timing_cache(content), False)
        except (TypeError, RuntimeError):
            accepted = False
        if not accepted:
            raise EngineMismatch(f"timing cache {path} is of another GPU or TensorRT; delete it or name another file")
        return path

    def _reason(self, otherwise: str = "no reason given") -> str:
        """Return the first error that was logged, in one line: it is the cause, the rest are its consequences."""
        return one_line(self._log.errors) or otherwise


def _record(tensor: trt.ITensor) -> TensorRecord:
    names = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
    kind = tensor.dtype.name
    return TensorRecord(tensor.name, names.get(kind, kind.lower()), tuple(int(side) for side in tensor.shape[:]))


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
