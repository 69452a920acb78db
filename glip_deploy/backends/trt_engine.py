"""One TensorRT engine and its execution contexts, for every version that `glip_deploy.backends.tensorrt` runs.

Contexts have no memory of their own. A backend lends all of its contexts one buffer, since they never run at once; with
dynamic shapes each would otherwise take as much as the largest shape of its engine needs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import EngineError, EngineMismatch, OutputError
from glip_deploy.files import cache_folder, check_private, write_atomically

if TYPE_CHECKING:
    import tensorrt

__all__ = ["Engine", "find_creator"]

_log = logging.getLogger(__name__)


class Engine:
    """One deserialized engine, shared by clones; each has its own contexts, made here.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        runtime: its runtime.
        file: the plan.
        record: what `build.json` says of it.
        gpu: name of the GPU, which compiled kernels are kept for.

    Raises:
        EngineMismatch: the plan is not the one of the record.
        EngineError: the plan cannot be loaded.
    """

    def __init__(self, trt: Any, runtime: tensorrt.Runtime, file: Path, record: Any, gpu: str) -> None:
        self._trt, self.file, self.record = trt, file, record
        plan = file.read_bytes()
        if hashlib.sha256(plan).hexdigest() != record.sha256:  # what was checked before may have been replaced
            raise EngineMismatch(f"{file} was changed while it was opened; build it again with glip-build")
        engine: Any = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"{file} cannot be loaded; build it again with glip-build, adding --overwrite")
        self.engine = engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        reads = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if reads[name])
        self.outputs = tuple(name for name in names if not reads[name])
        self.dtypes = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        # TensorRT's own property is deprecated from 10.1 on, where one that counts more has another name.
        two = hasattr(engine, "device_memory_size_v2")
        self.memory = int(engine.device_memory_size_v2 if two else engine.device_memory_size)
        self._config: Any = None
        self._cache: Any = None
        if hasattr(engine, "create_runtime_config"):
            self._configure(gpu)

    @property
    def profiles(self) -> tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]:
        """Legal shapes, by optimization profile and input."""
        profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...] = self.record.profiles
        return profiles

    def context(self, memory: int) -> tensorrt.IExecutionContext | None:
        """Return a new execution context; None where the GPU has not enough memory.

        Args:
            memory: address of at least `self.memory` bytes in GPU memory; of contexts that share it one runs at a time.
        """
        made: Any
        strategies = getattr(self._trt, "ExecutionContextAllocationStrategy", None)
        if self._config is not None:
            made = self.engine.create_execution_context(self._config)
        elif strategies is not None:
            made = self.engine.create_execution_context(strategies.USER_MANAGED)
        else:  # 8.6
            made = self.engine.create_execution_context_without_device_memory()
        if made is None:
            return None
        if hasattr(made, "set_device_memory"):
            made.set_device_memory(memory, self.memory)
        else:
            made.device_memory = memory
        context: tensorrt.IExecutionContext = made
        return context

    # -- TensorRT-RTX ---------------------------------------------------------------------------------------------

    def _configure(self, gpu: str) -> None:
        """Prepare the settings of contexts where a context has some (TensorRT-RTX, and the full TensorRT lately)."""
        trt: Any = self._trt
        self._config = self.engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # Otherwise kernels for the shapes that are met are compiled in the background, and a CUDA graph recorded
            # meanwhile would keep the fallback kernels.
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self._config.dynamic_shapes_kernel_specialization_strategy = eager
        if hasattr(self._config, "create_runtime_cache"):
            self._cache = self._config.create_runtime_cache()
            self._cache_file = _cache_file(self.record.sha256, str(trt.__version__), gpu)
            self._known = b""
            with suppress(OSError, OutputError, RuntimeError):  # none yet, or one that is not to be trusted
                if self._cache_file is not None:
                    check_private(self._cache_file.parent)
                    self._known = self._cache_file.read_bytes()
                    self._cache.deserialize(self._known)  # False for another driver's: compiled again
            self._config.set_runtime_cache(self._cache)

    def keep_kernels(self) -> None:
        """Write the kernels that were compiled for the shapes met so far, for the next process; never an error."""
        if self._cache is None or self._cache_file is None:
            return
        try:
            content = bytes(self._cache.serialize())
            if content and content != self._known:
                self._cache_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                check_private(self._cache_file.parent)
                write_atomically(self._cache_file, content)
                self._known = content
        except (OSError, OutputError, RuntimeError) as error:
            _log.debug("%s: compiled kernels are not kept (%s)", self.file.name, error)


def _cache_file(engine: str, version: str, gpu: str) -> Path | None:
    """Return where compiled kernels of an engine (its SHA-256) are kept; None where the user has no home."""
    folder = cache_folder("kernels")
    key = hashlib.sha256(f"{engine} {version} {gpu}".encode()).hexdigest()[:32]
    return None if folder is None else folder / f"{key}.bin"


def find_creator(registry: Any, name: str, version: str, namespace: str) -> Any:
    """Return a plugin's creator; None if there is none. TensorRT 8.6 knows creators of the older interface only."""
    find = registry.get_creator if hasattr(registry, "get_creator") else registry.get_plugin_creator
    return find(name, version, namespace)
