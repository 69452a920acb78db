"""OpenVINO on the CPU: in fp32 the answers of ONNX Runtime, in bf16 faster on processors that multiply in it.

OpenVINO reads the exported graphs as they are, but for one operator. Its own conversion of DeformConv samples at the
border of a feature map in another way than ONNX says, and than GLIP was trained; `_deform_conv` replaces it.
"""

from __future__ import annotations

import functools
import io
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.backends.base import check_on_host
from glip_deploy.backends.compiled import CompiledCache, compiled_key
from glip_deploy.backends.graphs import LoadedGraphs
from glip_deploy.bundle.contract import (
    BACKBONE_GRAPH,
    CANDIDATES,
    HEAD_GRAPH,
    IMAGE_GRAPH,
    Candidates,
    ImageInputs,
    text_inputs,
)
from glip_deploy.errors import BackendError, ClosedError, MissingPackage, OptionError

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

    from glip_deploy.bundle.manifest import Bundle

__all__ = ["OpenVINOBackend", "Precision", "compile_graph", "openvino_absence", "read_graph"]

OLDEST = (2026, 0)
"""First version with which the graphs were tested."""
INSTALL = "pip install 'glip-deploy[openvino]'"
CONVERSION = "1"
"""Changes with what `_deform_conv` makes, so that graphs compiled before are not used again."""
_PRIMITIVE_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


class Precision(StrEnum):
    """In which type the graphs are computed; weights are stored in fp32."""

    F32 = "f32"
    """As ONNX Runtime does: within the parity tolerance of the reference."""
    BF16 = "bf16"
    """Convolutions and products in bf16: faster where the CPU has instructions for it, at some cost in accuracy."""
    AUTO = "auto"
    """bf16 where the CPU has instructions for it, else fp32."""

    @classmethod
    def of(cls, value: str) -> Precision:
        """Return the member that a value names.

        Raises:
            OptionError: it names none.
        """
        try:
            return cls(value)
        except ValueError:
            raise OptionError(f'precision is "{value}"; backend openvino takes {", ".join(cls)}') from None


def openvino_absence(precision: Precision = Precision.F32) -> str | None:
    """Say in a line why OpenVINO cannot run here in a precision, and what to do; return None where it can."""
    try:
        _element_type(_core(), precision)
    except (MissingPackage, BackendError, OptionError) as error:
        return str(error)
    return None


def _module() -> Any:
    try:
        import openvino
        import openvino.frontend.onnx
    except ImportError:
        raise MissingPackage(f"OpenVINO is not installed; {INSTALL}") from None
    if tuple(int(part) for part in openvino.__version__.split("-")[0].split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendError(f"OpenVINO {openvino.__version__} is too old; pip install -U 'openvino>={oldest}'")
    return openvino


def _core() -> Any:
    """Return the process's OpenVINO core, which converts DeformConv exactly."""
    return _core_of(_module())


@functools.cache
def _core_of(openvino: ModuleType) -> Any:
    """Make the one core of a process, which is never freed.

    The CPU plugin of a core sets the calling thread's signal stack (`sigaltstack`), and restores the one before when it
    is freed. Of two cores freed in another order than the opposite of their making, the thread is left with memory that
    is no longer there, and the next signal, Ctrl-C for instance, ends the process with a segmentation fault.
    """
    core = openvino.Core()
    core.add_extension(openvino.frontend.onnx.ConversionExtension("DeformConv", _deform_conv))
    return core


def _deform_conv(node: Any) -> Any:
    """Convert an ONNX DeformConv (inputs: X, W, offset, and B and mask if they are there).

    A sample between the border of the map and the next pixel outside is interpolated with zero, as in ONNX and in the
    official `deform_conv_cuda_kernel.cu`: OpenVINO calls that `bilinear_interpolation_pad`.
    """
    from openvino import opset8

    inputs = [node.get_input(index) for index in range(node.get_input_size())]
    pads = node.get_attribute("pads", [0, 0, 0, 0])
    result = opset8.deformable_convolution(
        inputs[0],
        inputs[2],
        inputs[1],
        node.get_attribute("strides", [1, 1]),
        pads[:2],
        pads[2:],
        node.get_attribute("dilations", [1, 1]),
        inputs[4] if len(inputs) > 4 else None,
        group=node.get_attribute("group", 1),
        deformable_group=node.get_attribute("offset_group", 1),
        bilinear_interpolation_pad=True,
    )
    if len(inputs) > 3:
        bias = opset8.reshape(inputs[3], opset8.constant(np.array([1, -1, 1, 1], np.int64)), special_zero=False)
        result = opset8.add(result, bias)
    return result.outputs()


def _element_type(core: Any, precision: Precision) -> str:
    """Return what OpenVINO's hint for the precision of inference is set to.

    Raises:
        OptionError: the CPU has no instructions for bf16.
    """
    native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision is Precision.BF16 and not native:
        name = core.get_property("CPU", "FULL_DEVICE_NAME")
        raise OptionError(f'precision is "bf16"; this CPU ({name}) has no instructions for it: use f32 or auto')
    return "bf16" if native and precision is not Precision.F32 else "f32"


def read_graph(file: Path | bytes) -> Any:
    """Read an ONNX graph as an OpenVINO model, its DeformConv nodes converted exactly.

    Args:
        file: an ONNX file, or a serialized model without external data.

    Raises:
        MissingPackage: OpenVINO is not installed.
        BackendError: it is too old, or cannot read the graph.
    """
    core = _core()
    try:
        return core.read_model(file if isinstance(file, bytes) else str(file))
    except Exception as error:  # the library raises RuntimeError for everything
        name = "a graph in memory" if isinstance(file, bytes) else file
        raise BackendError(f"OpenVINO cannot load {name}: {_reason(error)}; export the bundle again") from None


@contextmanager
def _without_primitive_cache() -> Iterator[None]:
    """Let oneDNN inside OpenVINO keep no kernels of shapes that are gone, unless the user has set how many.

    It has a cache of its own, besides OpenVINO's, whose size it reads from the environment once, when the first graph
    is compiled. Other copies of oneDNN in the process, PyTorch's for one, keep theirs.
    """
    if os.environ.get(_PRIMITIVE_CACHE) is not None:
        yield
        return
    os.environ[_PRIMITIVE_CACHE] = "0"
    try:
        yield
    finally:
        os.environ.pop(_PRIMITIVE_CACHE, None)


def _configuration(precision: str, threads: int | None) -> dict[str, Any]:
    """Return how a graph is compiled.

    Args:
        precision: of `_element_type`.
        threads: CPU threads, None for one a core.
    """
    found: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        # Else all that was prepared for a shape is kept: some 12 MB for every new number of tokens.
        "CPU_RUNTIME_CACHE_CAPACITY": 0,
    }
    if threads is not None:
        found["INFERENCE_NUM_THREADS"] = threads
    return found


def compile_graph(
    file: Path | bytes, precision: Precision = Precision.F32, threads: int | None = None, *, profile: bool = False
) -> Any:
    """Compile a graph as the backend does.

    Args:
        file: see `read_graph`.
        precision: see `Precision`.
        threads: CPU threads, None for one a core.
        profile: whether requests of it know afterwards how long each of its operations took (`profiling_info`).

    Returns:
        OpenVINO's compiled model.

    Raises:
        MissingPackage: OpenVINO is not installed.
        OptionError: a precision that this CPU does not have.
        BackendError: OpenVINO is too old, or cannot load or compile the graph.
    """
    config = _configuration(_element_type(_core(), precision), threads)
    return _compiled(file, config | {"PERF_COUNT": True} if profile else config)


def _compiled(file: Path | bytes, config: Mapping[str, Any]) -> Any:
    model = read_graph(file)
    try:
        with _without_primitive_cache():
            return _core().compile_model(model, "CPU", dict(config))
    except Exception as error:  # the library raises RuntimeError for everything
        name = "a graph in memory" if isinstance(file, bytes) else file
        raise BackendError(f"OpenVINO cannot compile {name}: {_reason(error)}; use backend onnxruntime") from None


class _Graphs(LoadedGraphs[Any]):
    """The compiled graphs of a bundle."""

    def __init__(self, bundle: Bundle, threads: int | None, precision: Precision, cache: Path | None) -> None:
        # The key of a compiled graph is made of the hashes of its files, which must be known to be theirs.
        self._cache = CompiledCache(cache if bundle.verified else None)
        self._core = _core()
        self.precision = _element_type(self._core, precision)
        self._config = _configuration(self.precision, threads)
        super().__init__(bundle)

    def _load(self, graph: str) -> Any:
        key = self._key(graph)
        known = self._cache.get(key)
        if known is not None:
            try:
                with _without_primitive_cache():
                    return self._core.import_model(io.BytesIO(known), "CPU", self._config)
            except Exception:  # the library raises RuntimeError for everything
                self._cache.remove(key)
        compiled = self._bundle.load(lambda folder: _compiled(folder / graph, self._config))
        if self._cache.keeps:
            self._cache.put(key, compiled.export_model().getvalue())
        return compiled

    def _key(self, graph: str) -> str:
        """Return what a compiled graph depends on. The weights of the parts are the whole's."""
        openvino, files = _module(), self._bundle.files
        of_graph = (graph, f"{IMAGE_GRAPH}.") if graph in (BACKBONE_GRAPH, HEAD_GRAPH) else (graph,)
        options = (f"{name}={value}" for name, value in sorted(self._config.items()))
        hashes = (f"{name} {files[name].sha256}" for name in sorted(files) if name.startswith(of_graph))
        cpu = self._core.get_property("CPU", "FULL_DEVICE_NAME")
        return compiled_key(("glip", CONVERSION, openvino.__version__, cpu, *options, *hashes))


class OpenVINOBackend:
    """A `Backend` on OpenVINO. Use `OpenVINOBackend.open`."""

    def __init__(self, graphs: _Graphs) -> None:
        self._graphs: _Graphs | None = graphs
        self._requests: dict[Any, Any] = {}  # of each compiled graph
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        threads: int | None = None,
        precision: str | Precision = Precision.F32,
        cache_dir: Path | None = None,
    ) -> OpenVINOBackend:
        """Load a bundle's graphs.

        Args:
            bundle: the bundle.
            threads: CPU threads, None for one a core.
            precision: see `Precision`.
            cache_dir: compiled graphs are kept in a folder in it, so that opening is quicker the next time; None
                compiles each time, and so does a bundle whose files were not verified.

        Raises:
            MissingPackage: OpenVINO is not installed.
            OptionError: an unknown precision, or one that this CPU does not have.
            BackendError: OpenVINO is too old, or cannot load the image graph.
        """
        return cls(_Graphs(bundle, threads, Precision.of(precision), cache_dir))

    @property
    def precision(self) -> str:
        """In what it computes: "f32" or "bf16"."""
        return self._opened.precision

    @property
    def text_key(self) -> str:
        """See `Backend.text_key`."""
        return "" if self.precision == "f32" else f"openvino-{self.precision}"

    def encode_text(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Backend.encode_text`."""
        compiled = self._opened.text
        with self._lock:
            request = self._infer(compiled, text_inputs(input_ids))
            result: NDArray[np.float32] = np.array(request.get_tensor("text_embedding").data[0])
        return result

    def detect(self, inputs: ImageInputs) -> Candidates:
        """See `Backend.detect`. Calls of several threads wait for each other; clones do not."""
        check_on_host(inputs)
        whole = self._opened.image
        if whole is None:
            return self.detect_prompts([inputs])[0]
        with self._lock:
            return _candidates(self._infer(whole, inputs.feed()))

    def detect_prompts(self, inputs: Iterable[ImageInputs]) -> list[Candidates]:
        """See `Backend.detect_prompts`. Calls of several threads wait for each other; clones do not."""
        parts = self._opened.parts
        if parts is None:
            return [self.detect(of_prompt) for of_prompt in inputs]
        backbone, head = parts
        features: dict[str, Any] = {}
        found = []
        with self._lock:
            for of_prompt in inputs:
                if not features:
                    check_on_host(of_prompt)
                    request = self._infer(backbone, of_prompt.frame_feed())
                    # The memory of the backbone's request, which nothing writes before the last prompt has read it.
                    features = {output.any_name: request.get_tensor(output) for output in backbone.outputs}
                found.append(_candidates(self._infer(head, {**features, **of_prompt.prompt_feed()})))
        return found

    def prepare_resize(self) -> bool:
        """See `Backend.prepare_resize`."""
        return False

    def clone(self) -> OpenVINOBackend:
        """See `Backend.clone`. The compiled graphs are shared; buffers are not."""
        return OpenVINOBackend(self._opened)

    def close(self) -> None:
        """See `Backend.close`. The compiled graphs end with the last clone."""
        with self._lock:
            self._requests = {}
            self._graphs = None

    @property
    def _opened(self) -> _Graphs:
        if self._graphs is None:
            raise ClosedError("this detector is closed; open it again with Detector.open")
        return self._graphs

    def _infer(self, compiled: Any, feed: Mapping[str, Any]) -> Any:
        """Run a graph and return the request, whose outputs the next run of that graph writes again.

        The caller holds the lock. Requests of graphs that the bundle no longer runs end here, with their memory.
        """
        kept = () if self._graphs is None else self._graphs.in_use()
        self._requests = {graph: request for graph, request in self._requests.items() if graph in kept}
        try:
            request = self._requests.get(compiled) or compiled.create_infer_request()
            request.infer(dict(feed))
        except Exception as error:  # the library raises RuntimeError for everything
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in feed.items())
            raise BackendError(f"OpenVINO failed on {shapes}: {_reason(error)}") from None
        if compiled in kept:
            self._requests[compiled] = request
        return request


def _candidates(request: Any) -> Candidates:
    return Candidates(*(np.array(request.get_tensor(name).data) for name in CANDIDATES))


def _reason(error: Exception) -> str:
    """Return what an OpenVINO message says, without the places in its source code that come first."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return (" ".join(reasons) or type(error).__name__)[:200]
