"""TensorRT and TensorRT-RTX: engines that `glip-build` made, on the GPU they were made for.

Frames are resized on the GPU, where they are or uploaded as they are through page-locked memory, or come resized from
the host. All goes through a stream of the backend's own. The first frame of a shape runs plainly, the second is
recorded as a CUDA graph, later ones replay it: the upload of a resized frame, network and download are one launch. What
belongs to the prompt is uploaded when it changes, which no engine has to be built for.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.backends.trt_engine import Engine, find_creator
from glip_deploy.bundle.contract import CANDIDATES, PARTS, Candidates, ImageInputs
from glip_deploy.bundle.engines import ENGINES, EngineRecord, Machine, find_engines
from glip_deploy.errors import ClosedError, EngineError, EngineMismatch, GlipError, MissingPackage
from glip_deploy.frames.device import HostFrame
from glip_deploy.frames.geometry import ceil_to

if TYPE_CHECKING:
    import tensorrt
    from numpy.typing import NDArray

    from glip_deploy.backends.cuda import Cuda
    from glip_deploy.bundle.manifest import Bundle
    from glip_deploy.frames.device import DeviceCanvas, DeviceFrame

    _Feed = Mapping[str, "NDArray[Any] | DeviceCanvas | _OnDevice"]

__all__ = ["TensorRTBackend", "choose_engines"]

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
PLUGIN_CREATOR = ("ModulatedDeformConv", "3", "glip")
"""Name, version and namespace of the plugin; the version counts its interface, not its build."""
SHAPES_KEPT = {"text": 2, "image": 4, "backbone": 2, "head": 8}
"""Shapes of each graph that keep their buffers and CUDA graph; of more, the one unused for longest gives way."""
TOKEN_STEP, CLASS_STEP = 16, 8
"""Prompts are padded to multiples of these within a profile's range, so that most new prompts are only an upload."""
PER_FRAME = ("frames", "image_sizes")


@dataclass(frozen=True)
class _OnDevice:
    """An input that another engine left in GPU memory."""

    address: int
    shape: tuple[int, ...]


@dataclass
class _Bound:
    """Buffers of one shape, bound to an execution context of their own."""

    context: tensorrt.IExecutionContext
    staging: dict[str, NDArray[Any]]
    """Page-locked, by input and output; frames that are on the GPU have none."""
    device: dict[str, int]
    inputs: tuple[str, ...]
    """Inputs of the engine, in its order."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    borrowed: frozenset[int] = frozenset()
    """Addresses among `device` that belong to another engine's buffers."""
    runs: int = 0
    graph: Any = None
    capture_at: int = 1
    """The run that is recorded: the first has to run plainly; after a failure, twice as many runs later."""


_log = logging.getLogger(__name__)

_DEVICE = threading.RLock()
"""Held while contexts and buffers are made or given back and while a CUDA graph is recorded, in the whole process:
allocating in one thread breaks the recording of another, in every capture mode (NVIDIA/TensorRT issue 2888)."""


@dataclass(frozen=True)
class _Opened:
    """What clones share: engines that are loaded, and what they belong to."""

    cuda: Cuda
    bundle: Bundle
    record: EngineRecord
    engines: dict[str, Engine]
    load: Callable[[str], Engine]
    """Loads the engine of a graph."""

    @property
    def rebuild(self) -> str:
        """The command that builds the engines again."""
        return f"glip-build {self.bundle.path} --flavor {self.record.flavour}"


class TensorRTBackend:
    """A `Backend` on a folder of engines, with a stream and buffers of its own. Use `TensorRTBackend.open`."""

    def __init__(self, opened: _Opened) -> None:
        self._opened = opened
        self._cuda, self._bundle, self._record = opened.cuda, opened.bundle, opened.record
        self._engines, self._rebuild = opened.engines, opened.rebuild
        self._warned = False
        self._lock = threading.Lock()
        self._closed = False
        self._bound: dict[str, OrderedDict[tuple[Any, ...], _Bound]] = {graph: OrderedDict() for graph in SHAPES_KEPT}
        self._memory: dict[bool, int] = {}
        """What all contexts compute in, those of parts apart; only one runs at a time."""
        self._raw: tuple[NDArray[np.uint8], int] | None = None
        """Page-locked and device memory of as many bytes, for frames of the host that are resized on the GPU."""
        with self._cuda.active():
            self._stream = self._cuda.stream()
        _OPEN.add(self)

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        folder: Path | None = None,
        *,
        cuda: Cuda | None = None,
        trt: Any = None,
        plugins: bool = True,
    ) -> TensorRTBackend:
        """Load engines.

        Args:
            bundle: the bundle the engines belong to.
            folder: the engines; None chooses among the bundle's.
            cuda: the GPU.
            trt: the module `tensorrt` or `tensorrt_rtx`; None imports the one the engines were built by.
            plugins: False to load no plugin library, and so only engines that need none.

        Raises:
            GlipError: no engines, none for this machine (with the command that builds them), TensorRT not installed,
                no GPU, not enough memory.
        """
        if cuda is None:
            from glip_deploy.backends.cuda import Cuda

            if folder is None and not find_engines(bundle.path):
                raise EngineError(_no_engines(bundle))  # before the GPU is asked for
            cuda = Cuda()
        folder, record, module = choose_engines(bundle, folder, cuda, trt, plugins=plugins)
        with _DEVICE, cuda.active():
            runtime = _runtime(module, folder / record.plugin.file if record.plugin is not None else None)

            def load(graph: str) -> Engine:
                file = f"{graph}.plan"
                return Engine(module, runtime, folder / file, record.engines[file], cuda.gpu)

            engines = {graph: load(graph) for graph in ("text", "image")}
        return cls(_Opened(cuda, bundle, record, engines, load))

    def clone(self) -> TensorRTBackend:
        """Return another backend for another stream of frames: it shares the engines, and nothing it waits for."""
        self._check_open()
        return TensorRTBackend(self._opened)

    def prepare_resize(self) -> bool:
        """See `Backend.prepare_resize`."""
        self._check_open()
        with _DEVICE, self._cuda.active():
            self._cuda.prepare_resize()
        return True

    @property
    def text_key(self) -> str:
        """See `Backend.text_key`."""
        return self._record.engines["text.plan"].sha256

    def encode_text(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Backend.encode_text`."""
        count = len(input_ids)
        index, tokens = self._bucket("text", "input_ids", count)
        feed = {
            "input_ids": _pad(input_ids[None], {1: tokens}),
            "attention_mask": _pad(np.ones((1, count), np.int64), {1: tokens}),
        }
        (embedding,) = self._run("text", index, feed, ("text_embedding",))
        return np.ascontiguousarray(embedding[0, :count], np.float32)

    def detect(self, inputs: ImageInputs) -> Candidates:
        """See `Backend.detect`. What an engine's shapes are too large for is padded, as GLIP pads.

        Raises:
            GlipError: a frame, prompt or number of classes larger than the engine was built for.
        """
        index, prompt = self._prompt_feed("image", inputs)
        profile = self._engines["image"].profiles[index]
        most = profile["frames"][2][0]
        if len(inputs) > most:
            return _stacked([self.detect(part) for part in _parts(inputs, most)])
        frames = self._frame_feed(profile, inputs)
        prompt = self._batched(prompt, len(frames["image_sizes"]))
        found = self._run("image", index, {**frames, **prompt}, CANDIDATES)
        return _candidates(found, len(inputs))

    def detect_prompts(self, inputs: Iterable[ImageInputs]) -> list[Candidates]:
        """See `Backend.detect_prompts`. The features stay on the GPU; nothing else comes between the two engines."""
        if not self._load_parts():
            return [self.detect(of_prompt) for of_prompt in inputs]
        given = list(inputs)
        profile = self._engines["backbone"].profiles[0]
        most = profile["frames"][2][0]
        if len(given[0]) > most:
            by_part = [self.detect_prompts(parts) for parts in zip(*(_parts(one, most) for one in given), strict=True)]
            return [_stacked(list(of_prompt)) for of_prompt in zip(*by_part, strict=True)]
        frames = self._frame_feed(profile, given[0])
        sizes = {"image_sizes": frames["image_sizes"]}
        prompts = [self._prompt_feed("head", one) for one in given]
        found = []
        with self._lock:  # until the last prompt: another thread's frame would overwrite the features
            self._check_open()
            with self._cuda.active():
                backbone = self._execute("backbone", 0, frames, ())
                names = self._engines["backbone"].outputs
                features = {name: _OnDevice(backbone.device[name], backbone.shapes[name]) for name in names}
                for index, prompt in prompts:
                    feed = {**features, **sizes, **self._batched(prompt, len(frames["image_sizes"]))}
                    head = self._execute("head", index, feed, CANDIDATES)
                    self._cuda.synchronize(self._stream)
                    found.append(_candidates([head.staging[name].copy() for name in CANDIDATES], len(given[0])))
        return found

    def _load_parts(self) -> bool:
        """Load the engines of the two parts; False, with a warning the first time, if they were not built."""
        self._check_open()
        if not all(f"{graph}.plan" in self._record.engines for graph in PARTS):
            if not self._warned:
                self._warned = True
                _log.warning(
                    "the engines have no backbone and head, so the image engine runs for every prompt of a frame;"
                    " to make that faster, build again: %s --split",
                    self._rebuild,
                )
            return False
        with _DEVICE, self._cuda.active():
            for graph in PARTS:
                if graph not in self._opened.engines:
                    self._opened.engines[graph] = self._opened.load(graph)
        return True

    def _frame_feed(self, profile: Mapping[str, Any], inputs: ImageInputs) -> dict[str, Any]:
        """Return the inputs that change with the frame, padded to what a profile takes."""
        frames = inputs.frames
        least, _, most = profile["frames"]
        for side, axis in (("height", 1), ("width", 2)):
            if frames.shape[axis] > most[axis]:
                raise EngineMismatch(
                    f"the frame's canvas is {frames.shape[axis]} pixels in {side}, the engine takes up to {most[axis]};"
                    f" lower --shortest-side or build with a larger --max: {self._rebuild}"
                )
        batch, height, width = (max(frames.shape[axis], least[axis]) for axis in range(3))
        if isinstance(frames, np.ndarray):
            frames = _pad(frames, {0: batch, 1: height, 2: width})
        else:
            frames = replace(frames, shape=(batch, height, width, 3))
        return {"frames": frames, "image_sizes": _pad(inputs.image_sizes, {0: batch}, value=1)}

    def _prompt_feed(self, graph: str, inputs: ImageInputs) -> tuple[int, dict[str, NDArray[Any]]]:
        """Return the profile that a prompt fits, and the inputs that it makes, padded to what that takes."""
        text_mask, class_map = inputs.text_mask, inputs.class_map
        index, tokens = self._bucket(graph, "text_mask", text_mask.shape[1])
        profile = self._engines[graph].profiles[index]
        least_classes, _, most_classes = (shape[1] for shape in profile["class_map"])
        classes = class_map.shape[1]
        if classes > most_classes:
            raise EngineMismatch(
                f"the prompt has {classes} classes, the engine takes up to {most_classes};"
                f" build again: {self._rebuild} --classes 1:8:{classes}"
            )
        classes = min(max(ceil_to(classes, CLASS_STEP), least_classes), most_classes)
        return index, {
            "text_embedding": _pad(inputs.text_embedding, {1: tokens}),
            "text_mask": _pad(text_mask, {1: tokens}),
            "class_map": _pad(class_map, {1: classes, 2: tokens}),
        }

    @staticmethod
    def _batched(prompt: Mapping[str, NDArray[Any]], batch: int) -> dict[str, NDArray[Any]]:
        return {name: _pad(array, {0: batch}) for name, array in prompt.items()}

    def close(self) -> None:
        """See `Backend.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with _DEVICE, self._cuda.active():
                self._cuda.synchronize(self._stream)
                for kept in self._bound.values():
                    while kept:
                        self._free(kept.popitem()[1])
                for memory in self._memory.values():
                    self._cuda.free(memory)
                self._free_raw()
                for engine in self._engines.values():
                    engine.keep_kernels()
                self._cuda.free_stream(self._stream)
            self._engines = {}

    # -- shapes ---------------------------------------------------------------------------------------------------

    def _bucket(self, graph: str, tensor: str, count: int) -> tuple[int, int]:
        """The first optimization profile a prompt of `count` tokens fits, and the length to pad it to."""
        self._check_open()
        ranges = [(profile[tensor][0][1], profile[tensor][2][1]) for profile in self._engines[graph].profiles]
        for index, (least, most) in enumerate(ranges):
            if count <= most:
                return index, min(max(ceil_to(count, TOKEN_STEP), least), most)
        raise EngineMismatch(
            f"the prompt has {count} tokens, the engine takes up to {max(most for _, most in ranges)};"
            f" shorten it, or build again: {self._rebuild} --tokens 1:16:{self._bundle.max_tokens}"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this detector is closed; open it again with Detector.open")

    # -- running --------------------------------------------------------------------------------------------------

    def _run(self, graph: str, index: int, feed: _Feed, outputs: tuple[str, ...]) -> list[Any]:
        """Run an engine; returns copies of its outputs."""
        with self._lock:
            self._check_open()
            with self._cuda.active():
                bound = self._execute(graph, index, feed, outputs)
                self._cuda.synchronize(self._stream)
                return [bound.staging[name].copy() for name in outputs]

    def _execute(self, graph: str, index: int, feed: _Feed, outputs: tuple[str, ...]) -> _Bound:
        """Enqueue a run of an engine, and the download of outputs; the others stay where they are."""
        # Frames from the host and frames on the GPU make different CUDA graphs, as do other buffers of features.
        key = (
            graph,
            index,
            *((type(array), array.shape, getattr(array, "address", None)) for array in feed.values()),
        )
        kept = self._bound[graph]
        bound = kept.get(key)
        if bound is None:
            with _DEVICE:
                while len(kept) >= SHAPES_KEPT[graph]:
                    self._forget(kept.popitem(last=False)[1])
                bound = kept[key] = self._bind(graph, index, feed, outputs)
        kept.move_to_end(key)
        self._stage(bound, feed)
        self._enqueue(bound)
        bound.runs += 1
        return bound

    def _forget(self, bound: _Bound) -> None:
        """Free buffers, and first those of the engines that read them."""
        heads = self._bound["head"]
        for key in [key for key, head in heads.items() if head.borrowed & set(bound.device.values())]:
            self._free(heads.pop(key))
        self._free(bound)

    def _bind(self, graph: str, index: int, feed: _Feed, outputs: tuple[str, ...]) -> _Bound:
        """Make a context for these shapes, with buffers."""
        engine, is_part = self._engines[graph], graph in PARTS
        if is_part not in self._memory:
            sharing = [one.memory for name, one in self._engines.items() if (name in PARTS) == is_part]
            self._memory[is_part] = self._cuda.allocate(max(sharing))
        context = engine.context(self._memory[is_part])
        if context is None:
            raise EngineError(f"{engine.file.name}: the GPU has not enough free memory; close other programs")
        bound = _Bound(context, {}, {}, engine.inputs)
        try:
            if not context.set_optimization_profile_async(index, self._stream):
                raise EngineError(f"{engine.file.name} refuses its profile {index}; {self._rebuild} --overwrite")
            for name in engine.inputs:
                if not context.set_input_shape(name, feed[name].shape):
                    raise EngineError(f"{engine.file.name} refuses {name} of shape {feed[name].shape}; {self._rebuild}")
            unknown = context.infer_shapes()
            if unknown:
                raise EngineError(f"{engine.file.name} leaves the shape of {', '.join(unknown)} open; {self._rebuild}")
            for name in (*engine.inputs, *engine.outputs):
                shape, dtype, given = tuple(context.get_tensor_shape(name)[:]), engine.dtypes[name], feed.get(name)
                bound.shapes[name] = shape
                if isinstance(given, np.ndarray) or name in outputs:
                    bound.staging[name] = self._cuda.pinned(shape, dtype)
                if isinstance(given, _OnDevice):
                    bound.device[name] = given.address
                    bound.borrowed |= {given.address}
                else:
                    bound.device[name] = self._cuda.allocate(int(np.prod(shape)) * dtype.itemsize)
                if not context.set_tensor_address(name, bound.device[name]):
                    raise EngineError(f"{engine.file.name} refuses the buffer of {name}; {self._rebuild} --overwrite")
            self._cuda.synchronize(self._stream)
        except BaseException:
            self._free(bound)
            raise
        return bound

    def _stage(self, bound: _Bound, feed: _Feed) -> None:
        """Bring the inputs into page-locked memory; a prompt that is the last one is not uploaded again."""
        for name in bound.inputs:
            given = feed[name]
            if isinstance(given, _OnDevice):
                continue
            if not isinstance(given, np.ndarray):
                self._draw(given, bound.device[name])
                continue
            staging = bound.staging[name]
            known = bound.runs > 0 and name not in PER_FRAME and np.array_equal(staging, given)
            if not known:
                np.copyto(staging, given, casting="same_kind")
            if not known and name not in PER_FRAME:
                self._cuda.upload(bound.device[name], staging, self._stream)

    def _draw(self, canvas: DeviceCanvas, address: int) -> None:
        """Resize frames on the GPU onto the canvas there."""
        _, height, width, _ = canvas.shape
        for i, picture in enumerate(self._uploaded(canvas.pictures)):
            for stream in {picture.stream, picture.chroma_stream} - {self._stream}:
                if stream is not None:
                    self._cuda.synchronize(stream)
            size = (int(canvas.image_sizes[i, 0]), int(canvas.image_sizes[i, 1]))
            place = address + i * height * width * 3
            self._cuda.resize(picture, canvas.red, place, (height, width), size, self._stream)

    def _uploaded(self, pictures: tuple[DeviceFrame | HostFrame, ...]) -> list[DeviceFrame]:
        """Return frames in GPU memory: those of the host are uploaded, one behind the other."""
        needed = sum(picture.size for picture in pictures if isinstance(picture, HostFrame))
        if needed and (self._raw is None or self._raw[0].size < needed):
            with _DEVICE:  # nothing reads the old memory: every run ends before the next begins
                self._free_raw()
                staging = self._cuda.pinned((needed,), np.dtype(np.uint8))
                try:
                    self._raw = staging, self._cuda.allocate(needed)
                except BaseException:
                    self._cuda.free_pinned(staging)
                    raise
        found, start = [], 0
        for picture in pictures:
            if isinstance(picture, HostFrame):
                assert self._raw is not None
                staging, place = self._raw[0][start : start + picture.size], self._raw[1] + start
                picture.write(staging)
                self._cuda.upload(place, staging, self._stream)
                start += picture.size
                found.append(picture.uploaded(place, self._stream))
            else:
                found.append(picture)
        return found

    def _free_raw(self) -> None:
        if self._raw is not None:
            (staging, address), self._raw = self._raw, None
            self._cuda.free_pinned(staging)
            self._cuda.free(address)

    def _enqueue(self, bound: _Bound) -> None:
        def frame() -> None:
            for name in bound.inputs:
                if name in PER_FRAME and name in bound.staging:
                    self._cuda.upload(bound.device[name], bound.staging[name], self._stream)
            if not bound.context.execute_async_v3(self._stream):
                raise EngineError(f"{self._record.flavour} could not run the engine; {self._rebuild} --overwrite")
            for name in bound.staging:
                if name not in bound.inputs:
                    self._cuda.download(bound.staging[name], bound.device[name], self._stream)

        if bound.graph is None and bound.runs == bound.capture_at:
            capturable = getattr(bound.context, "is_stream_capturable", lambda stream: True)  # TensorRT-RTX can tell
            with _DEVICE:
                bound.graph = self._cuda.capture(self._stream, frame) if capturable(self._stream) else None
            if bound.graph is None:
                bound.capture_at *= 2
                level = logging.WARNING if bound.runs == 1 else logging.DEBUG
                _log.log(
                    level,
                    "frame %d could not be recorded as a CUDA graph, so each frame costs more"
                    " launches; trying again at frame %d",
                    bound.runs + 1,
                    bound.capture_at + 1,
                )
        if bound.graph is None:
            frame()
        else:
            self._cuda.launch(bound.graph, self._stream)

    def _free(self, bound: _Bound) -> None:
        if bound.graph is not None:
            self._cuda.free_graph(bound.graph)
        del bound.context  # before the memory it points to
        for address in bound.device.values():
            if address not in bound.borrowed:
                self._cuda.free(address)
        for array in bound.staging.values():
            self._cuda.free_pinned(array)


def choose_engines(
    bundle: Bundle, folder: Path | None, cuda: Cuda, trt: Any = None, *, plugins: bool = True
) -> tuple[Path, EngineRecord, Any]:
    """Find engines of a bundle that may run here, fully checked, and the TensorRT that runs them.

    Args:
        bundle: the bundle.
        folder: the engines, or their name below the bundle's `engines`; None takes the first that fit.
        cuda: the GPU.
        trt: see `TensorRTBackend`.
        plugins: False to pass over engines that need a plugin library.

    Raises:
        GlipError: none, or why the only (or the last) ones cannot run here.
    """
    if folder is not None and not folder.is_dir() and (bundle.path / ENGINES / folder).is_dir():
        folder = bundle.path / ENGINES / folder
    folders = [folder] if folder is not None else find_engines(bundle.path)
    refused: GlipError = EngineError(_no_engines(bundle))
    for candidate in folders:
        try:
            record = EngineRecord.read(candidate)
            if record.plugin is not None and not plugins:
                raise EngineError(
                    f"engines {candidate} need the plugin library {record.plugin.file}, and plugins are refused;"
                    f" build engines without one: glip-build {bundle.path} --flavor {record.flavour} --form native"
                )
            module = trt if trt is not None else _module(record.flavour)
            machine = Machine(record.flavour, str(module.__version__), cuda.gpu, cuda.compute_capability)
            record.check(candidate, bundle, machine)
        except GlipError as error:
            refused = error
            continue
        return candidate, record, module
    raise refused


def _no_engines(bundle: Bundle) -> str:
    return f"bundle {bundle.path} has no engines; build them with glip-build {bundle.path}"


def _module(flavour: str) -> Any:
    import importlib

    try:
        module = importlib.import_module(MODULES[flavour])
        module.__version__  # noqa: B018  # type stubs alone make an empty package
    except (ImportError, OSError, AttributeError):
        raise MissingPackage(f"{flavour} is not installed; pip install 'glip-deploy[{flavour}]'") from None
    except KeyError:
        raise EngineError(f'engines of "{flavour}" are unknown; upgrade with pip install -U glip-deploy') from None
    return module


_RUNTIMES: dict[str, tuple[Any, tensorrt.Runtime]] = {}
"""By module: logger and runtime. TensorRT keeps the first logger of a process, and engines need their runtime."""
_PLUGINS: set[tuple[str, str]] = set()
"""Libraries already registered, by module and content."""
_REGISTRY = threading.Lock()
_OPEN: weakref.WeakSet[TensorRTBackend] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close what is still open before the interpreter ends: engines must go before the GPU's context does."""
    for backend in list(_OPEN):
        backend.close()
    _RUNTIMES.clear()


def _runtime(trt: Any, plugin: Path | None) -> tensorrt.Runtime:
    """The runtime of a TensorRT module, with the plugin's creators registered, once a process."""
    from glip_deploy.files import sha256_of

    with _REGISTRY:
        if trt.__name__ not in _RUNTIMES:
            logger = trt.Logger(trt.Logger.ERROR)
            trt.init_libnvinfer_plugins(logger, "")
            _RUNTIMES[trt.__name__] = logger, trt.Runtime(logger)
        if plugin is not None and (trt.__name__, digest := sha256_of(plugin)) not in _PLUGINS:
            registry: tensorrt.IPluginRegistry = trt.get_plugin_registry()
            # A second library with the same creator would be refused; the one that is there does the same.
            if find_creator(registry, *PLUGIN_CREATOR) is None and registry.load_library(str(plugin)) is None:
                raise EngineError(f"plugin library {plugin} cannot be loaded; build the engines again with glip-build")
            _PLUGINS.add((trt.__name__, digest))
        return _RUNTIMES[trt.__name__][1]


def _parts(inputs: ImageInputs, most: int) -> list[ImageInputs]:
    """Divide more frames than an engine takes at a time."""
    return [inputs.part(slice(start, start + most)) for start in range(0, len(inputs), most)]


def _stacked(parts: list[Candidates]) -> Candidates:
    return Candidates(
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )


def _candidates(found: list[Any], count: int) -> Candidates:
    boxes, scores, labels = found
    return Candidates(boxes[:count], scores[:count], labels[:count].astype(np.int64, copy=False))


def _pad(array: NDArray[Any], sizes: Mapping[int, int], value: int = 0) -> NDArray[Any]:
    """Pad axes at their end to these sizes."""
    widths = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(array.shape)]
    return array if not any(after for _, after in widths) else np.pad(array, widths, constant_values=value)
