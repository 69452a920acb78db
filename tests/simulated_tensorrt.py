"""A CUDA and a TensorRT that run on the CPU: device memory is host memory, an engine is its ONNX graph.

What a backend does with them is real: it allocates, copies by address, binds, sets shapes, captures and launches. What
they would do differently on a GPU is not simulated.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.bundle.engines import RECORD_VERSION, EngineFile, EngineRecord
from glip_deploy.bundle.manifest import MANIFEST
from glip_deploy.errors import GlipError, MissingPackage
from glip_deploy.files import sha256_of
from glip_deploy.frames import make_canvas
from glip_deploy.frames.nv12 import nv12_to_rgb

VERSION = "10.9.0"
_sessions: dict[tuple[str, ...], Any] = {}


def session_of(graph: Path) -> Any:
    """Return one session for all copies of a graph: opening takes longer than most of what is done with it."""
    files = (graph, graph.with_name("image.onnx.data"), graph.with_name("text.onnx.data"))  # parts have the image's
    key = (graph.name, *(sha256_of(file) for file in files if file.is_file()))
    if key not in _sessions:
        _sessions[key] = open_session(graph)
    return _sessions[key]


class SimulatedCuda:
    """`glip_deploy.backends.cuda.Cuda`, in host memory."""

    gpu, compute_capability = "Simulated GPU", 80

    def __init__(self, graphs: bool = True) -> None:
        self.graphs, self.capturable, self.without_nvrtc = graphs, True, False
        self.memory: dict[int, Any] = {}
        self.arrays: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.live_graphs: set[Any] = set()
        self.log: list[str] = []
        self.waits: list[int] = []
        self.recording: list[Any] | None = None
        self.depth = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1

    def stream(self) -> int:
        assert self.depth
        self.streams.add(max(self.streams, default=100) + 1)
        return max(self.streams)

    def free_stream(self, stream: int) -> None:
        self.streams.remove(stream)

    def synchronize(self, stream: int) -> None:
        assert stream in self.streams or stream in (1, 2)  # CUDA's own: the legacy and the per-thread default stream
        assert self.recording is None
        self.waits.append(stream)

    def allocate(self, size: int) -> int:
        assert self.depth
        assert self.recording is None
        buffer = (ctypes.c_uint8 * max(size, 1))()
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, address: int) -> None:
        del self.memory[address]

    def pinned(self, shape: Any, dtype: Any) -> Any:
        array = np.full(shape, 7, dtype)
        self.arrays[array.ctypes.data] = array
        return array

    def free_pinned(self, array: Any) -> None:
        del self.arrays[array.ctypes.data]

    def _do(self, name: str, work: Callable[[], object]) -> None:
        if self.recording is not None:
            self.recording.append((name, work))
        else:
            self.log.append(name)
            work()

    def upload(self, target: Any, source: Any, stream: int) -> None:
        assert stream in self.streams
        first, last = source.ctypes.data, source.ctypes.data + source.nbytes
        assert any(one <= first and last <= one + array.nbytes for one, array in self.arrays.items())
        self._do("upload", lambda: ctypes.memmove(target, source.ctypes.data, source.nbytes))

    def download(self, target: Any, source: Any, stream: int) -> None:
        assert target.ctypes.data in self.arrays
        self._do("download", lambda: ctypes.memmove(target.ctypes.data, source, target.nbytes))

    def prepare_resize(self) -> None:
        if self.without_nvrtc:
            raise MissingPackage("NVRTC, which compiles the GPU's resize, is not installed")

    def resize(self, frame: Any, red: Any, canvas: Any, canvas_size: Any, size: Any, stream: int) -> None:
        """The kernel itself is tested in tests/glip_deploy/frames/test_device.py."""
        assert stream in self.streams
        assert self.recording is None
        self.log.append("resize")

        def plane(address: int, row_bytes: int, shape: tuple[int, ...], pixel: int) -> Any:
            memory = np.frombuffer(ctypes.string_at(address, shape[0] * row_bytes), np.uint8)
            return np.lib.stride_tricks.as_strided(memory, shape, (row_bytes, pixel, 1)[: len(shape)])

        sides = (frame.height, frame.width)
        if frame.chroma:
            luma = plane(frame.address, frame.row_bytes, sides, 1)
            chroma = plane(frame.chroma, frame.chroma_row_bytes, (sides[0] // 2, sides[1]), 1)
            picture, order = nv12_to_rgb((luma, chroma)), "rgb"
        else:
            picture = plane(frame.address, frame.row_bytes, (*sides, 3), frame.channels)
            order = "rgb" if red == 0 else "bgr"
        out = np.zeros((*canvas_size, 3), np.uint8)
        out[: size[0], : size[1]] = make_canvas(
            [np.ascontiguousarray(picture)], color=order, shortest_side=min(size), longest_side=max(size)
        ).frames[0, : size[0], : size[1]]
        ctypes.memmove(canvas, out.ctypes.data, out.nbytes)

    def capture(self, stream: int, work: Callable[[], object]) -> Any:
        self.recording = []
        try:
            work()
            graph = tuple(self.recording)
        except GlipError:
            graph = None
        finally:
            self.recording = None
        if not self.graphs or graph is None:
            return None
        self.live_graphs.add(graph)
        return graph

    def launch(self, graph: Any, stream: int) -> None:
        self.log.append("launch")
        for _, work in graph:
            work()

    def free_graph(self, graph: Any) -> None:
        self.live_graphs.remove(graph)


class SimulatedDeviceArray:
    """A picture, or a plane of one, in "GPU memory", as CuPy and others present one."""

    def __init__(self, picture: Any, row_bytes: Any = None, stream: int | None = None) -> None:
        picture = np.ascontiguousarray(picture)
        packed = picture.strides[0]
        row_bytes = row_bytes or packed
        self.memory = np.zeros((len(picture), row_bytes), np.uint8)
        self.memory[:, :packed] = picture.reshape(len(picture), -1)
        self.__cuda_array_interface__ = {
            "data": (self.memory.ctypes.data, False),
            "shape": picture.shape,
            "strides": None if row_bytes == packed else (row_bytes, *picture.strides[1:]),
            "typestr": "|u1",
            "version": 3,
            "stream": stream,
        }


class SimulatedContext:
    def __init__(self, engine: Any) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, Any] = {}
        self.addresses: dict[str, int] = {}
        self.memory: Any = None

    def set_device_memory(self, memory: Any, size: int) -> None:
        self.memory = memory, size

    def set_optimization_profile_async(self, index: int, stream: int) -> Any:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: Any) -> Any:
        least, _, most = self.engine.profiles[self.profile][name]
        legal = all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True))
        if legal:
            self.shapes[name] = tuple(shape)
        return legal

    def infer_shapes(self) -> Any:
        feed = {
            row.name: np.zeros(self.shapes[row.name], self.engine.dtypes[row.name])
            for row in self.engine.session.get_inputs()
        }
        if "frames" in feed:
            feed["image_sizes"][:] = feed["frames"].shape[1:3]
        for (name, _), array in zip(self.engine.outputs.items(), self.engine.session.run(None, feed), strict=True):
            self.shapes[name] = array.shape
        return []

    def get_tensor_shape(self, name: str) -> Any:
        return self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> Any:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> Any:
        memory, size = self.memory
        assert len(self.engine.cuda.memory[memory]) >= size == self.engine.memory

        def work() -> None:
            feed = {}
            for row in self.engine.session.get_inputs():
                dtype, shape = self.engine.dtypes[row.name], self.shapes[row.name]
                size = int(np.prod(shape)) * dtype.itemsize
                feed[row.name] = np.frombuffer(ctypes.string_at(self.addresses[row.name], size), dtype).reshape(shape)
            for name, array in zip(self.engine.outputs, self.engine.session.run(None, feed), strict=True):
                ctypes.memmove(self.addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)

        self.engine.cuda._do("execute", work)
        return True


class OldContext(SimulatedContext):
    """TensorRT 8.6's, whose memory is set as an attribute."""

    set_device_memory = property()

    @property
    def device_memory(self) -> Any:
        return self.memory[0]

    @device_memory.setter
    def device_memory(self, address: int) -> None:
        self.memory = address, self.engine.memory


class RtxContext(SimulatedContext):
    """TensorRT-RTX's, which tells whether it can be recorded."""

    def is_stream_capturable(self, stream: int) -> Any:
        assert stream in self.engine.cuda.streams
        return self.engine.cuda.capturable


class RuntimeConfig:
    """As bindings are: it takes no attribute that it does not have."""

    __slots__ = ("strategy",)

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class RtxRuntimeConfig(RuntimeConfig):
    __slots__ = ("cache", "dynamic_shapes_kernel_specialization_strategy")

    def create_runtime_cache(self) -> Any:
        return RuntimeCache()

    def set_runtime_cache(self, cache: Any) -> None:
        self.cache = cache


class RuntimeCache:
    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, content: Any) -> Any:
        self.content = content if content.startswith(b"kernels") else b""
        return bool(self.content)

    def serialize(self) -> Any:
        return self.content


class SimulatedEngine:
    memory = 1000

    def __init__(self, cuda: Any, graph: Any, profiles: Any) -> None:
        kinds = {"tensor(uint8)": "u1", "tensor(int64)": "i8", "tensor(float)": "f4"}
        self.cuda, self.profiles = cuda, profiles
        self.session = session_of(Path(graph))
        self.outputs = {row.name: row for row in self.session.get_outputs()}
        rows = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.names = [row.name for row in rows]
        self.dtypes = {row.name: np.dtype(kinds[row.type]) for row in rows}
        self.num_io_tensors = len(rows)

    def get_tensor_name(self, i: int) -> Any:
        return self.names[i]

    def get_tensor_mode(self, name: str) -> Any:
        return "output" if name in self.outputs else "input"

    def get_tensor_dtype(self, name: str) -> Any:
        return self.dtypes[name]

    def context_of(self, kind: Any, strategy: Any) -> Any:
        assert strategy == "USER_MANAGED"
        return kind(self)


class OldEngine(SimulatedEngine):
    """TensorRT 8.6's."""

    device_memory_size = SimulatedEngine.memory

    def create_execution_context_without_device_memory(self) -> Any:
        return OldContext(self)


class NewEngine(SimulatedEngine):
    """TensorRT 10's."""

    device_memory_size_v2 = SimulatedEngine.memory

    def create_execution_context(self, strategy: Any = "STATIC") -> Any:
        return self.context_of(SimulatedContext, strategy)


class NewestEngine(SimulatedEngine):
    """TensorRT 10.11's and later, which have an IRuntimeConfig of a single setting."""

    device_memory_size_v2 = SimulatedEngine.memory
    config = RuntimeConfig

    def create_runtime_config(self) -> Any:
        return self.config()

    def create_execution_context(self, config: Any) -> Any:
        return self.context_of(SimulatedContext, config.strategy)


class RtxEngine(NewestEngine):
    """TensorRT-RTX's."""

    config = RtxRuntimeConfig

    def create_execution_context(self, config: Any) -> Any:
        assert config.dynamic_shapes_kernel_specialization_strategy == "EAGER"
        config.cache.content = b"kernels of " + str(self.outputs.keys()).encode()  # compiled for the shapes it meets
        return self.context_of(RtxContext, config.strategy)


ENGINES = {"8.6.1": OldEngine, "10.9.0": NewEngine, "10.13.3": NewestEngine, "1.7.1": RtxEngine}
"""By version: what each has of the interface."""


def simulated_tensorrt(cuda: Any, version: str = VERSION) -> Any:
    """A module like `tensorrt`; a plan file of `write_engines` names its graph."""
    trt = SimpleNamespace(__name__="simulated_tensorrt", __version__=version, loaded=[], creators=[])

    class Runtime:
        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, plan: Any) -> Any:
            profiles, graph = eval(plan.decode())  # written by write_engines
            return ENGINES[version](cuda, graph, profiles)

    class Logger:
        ERROR = 1

        def __init__(self, level: Any) -> None:
            pass

    trt.Logger, trt.Runtime = Logger, Runtime
    trt.TensorIOMode = SimpleNamespace(INPUT="input")
    trt.nptype = lambda dtype: dtype
    trt.init_libnvinfer_plugins = lambda logger, namespace: True
    if version != "8.6.1":
        trt.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
    if version == "1.7.1":
        trt.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="EAGER")
    find = "get_plugin_creator" if version == "8.6.1" else "get_creator"
    trt.get_plugin_registry = lambda: SimpleNamespace(
        load_library=lambda path: None if trt.creators else trt.loaded.append(path) or trt.creators.append(path) or 1,
        **{find: lambda name, version, namespace: trt.creators[0] if trt.creators else None},
    )
    return trt


def write_engines(
    bundle: Any,
    name: str = "here",
    tokens: Any = ((1, 16, 64),),
    sizes: Any = ((32, 64, 256),) * 2,
    classes: Any = (1, 4, 16),
    batch: Any = 1,
    version: str = VERSION,
    precision: str = "fp32",
    graphs: Any = None,
    split: bool = False,
    flavour: str = "tensorrt",
) -> Any:
    """Write engines of a bundle that `simulated_tensorrt` runs; returns their folder."""
    folder = bundle.path / "engines" / name
    folder.mkdir(parents=True)
    axes = {"batch": (1, 1, batch), "height": sizes[0], "width": sizes[1], "classes": classes}
    for stride in bundle.manifest.config.head.strides:
        axes |= {f"{side}_{stride}": tuple(-(-one // stride) for one in axes[side]) for side in ("height", "width")}
    engines = {}
    for graph in ("text", "image", "backbone", "head") if split else ("text", "image"):
        rows = bundle.manifest.io[graph].inputs
        profiles = []
        for bucket in tokens[:1] if graph == "backbone" else tokens:
            ranges = {**axes, "tokens": bucket, **({"batch": (1, 1, 1)} if graph == "text" else {})}
            profiles.append(
                {
                    row.name: tuple(
                        tuple(side if isinstance(side, int) else ranges[side][i] for side in row.shape)
                        for i in range(3)
                    )
                    for row in rows
                }
            )
        file = folder / f"{graph}.plan"
        file.write_text(repr((tuple(profiles), str((graphs or {}).get(graph, bundle.path / f"{graph}.onnx")))))
        engines[file.name] = EngineFile(sha256_of(file), file.stat().st_size, 1.0, (), (), tuple(profiles))
    EngineRecord(
        format_version=RECORD_VERSION,
        flavour=flavour,
        version=version,
        compute_capability=80,
        gpu="Simulated GPU",
        precision=precision,
        form="native",
        plugin=None,
        manifest_sha256=sha256_of(bundle.path / MANIFEST),
        options="--precision fp32",
        engines=engines,
    ).write(folder)
    return folder
