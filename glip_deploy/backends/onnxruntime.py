"""ONNX Runtime: on the CPU the default that works everywhere; its GPU providers where they are installed.

`open_session` is how every part of the toolkit opens a graph, so that all report a bad one alike.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.backends.base import check_on_host
from glip_deploy.backends.graphs import LoadedGraphs
from glip_deploy.bundle.contract import CANDIDATES, Candidates, ImageInputs, text_inputs
from glip_deploy.errors import BackendError, ClosedError, MissingPackage

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from glip_deploy.bundle.manifest import Bundle

__all__ = ["CPU", "OnnxRuntimeBackend", "open_session", "provider_absence"]

CPU = "CPUExecutionProvider"
OLDEST = (1, 25)
"""First version whose CPU provider runs the standard DeformConv."""
_RTX = "NvTensorRTRTXExecutionProvider"
_GPU_BUILD = "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu>=1.25'"
_INSTALL = {"CUDAExecutionProvider": _GPU_BUILD, "TensorrtExecutionProvider": f"{_GPU_BUILD} tensorrt-cu12"}
"""What brings a provider that is built into ONNX Runtime."""


def provider_absence(provider: str) -> str | None:
    """Say in a line why an execution provider is not here, and what to install; return None where it is."""
    try:
        _check_provider(provider)
    except (MissingPackage, BackendError) as error:
        return str(error)
    return None


def _check_provider(provider: str) -> None:
    """Raise unless an execution provider is here.

    Raises:
        MissingPackage: ONNX Runtime, or the provider, is not installed.
        BackendError: ONNX Runtime is too old, or the provider cannot be loaded or finds no GPU.
    """
    onnxruntime = _module()
    if provider in onnxruntime.get_available_providers():
        return
    if provider == _RTX:
        _rtx_devices()
    else:
        raise MissingPackage(f"ONNX Runtime {onnxruntime.__version__} has no {provider} here; {_INSTALL[provider]}")


def _module() -> Any:
    # From 1.29 on it keeps an identifier of the machine and reports models and times to its maker, unless told not to
    # before it is loaded (its Privacy.md).
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError:
        raise MissingPackage("ONNX Runtime is not installed; pip install 'onnxruntime>=1.25'") from None
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < OLDEST:
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} has no deformable convolution on the CPU;"
            " pip install -U 'onnxruntime>=1.25'"
        )
    return onnxruntime


@functools.cache
def _rtx_devices() -> list[Any]:
    """Register the TensorRT-RTX provider, which is a package of its own, and return its GPUs; once in a process.

    Raises:
        MissingPackage: it is not installed.
        BackendError: it cannot be loaded, or finds no GPU.
    """
    import onnxruntime

    try:
        import onnxruntime_ep_nv_tensorrt_rtx as library
    except ImportError:
        raise MissingPackage(
            f"ONNX Runtime {onnxruntime.__version__} has no {_RTX} here; pip install onnxruntime-ep-nv-tensorrt-rtx"
            " (onnxruntime-ep-nv-tensorrt-rtx-cu12 for CUDA 12)"
        ) from None
    name = library.get_ep_name()
    try:
        onnxruntime.register_execution_provider_library(name, library.get_library_path())
    except Exception as error:  # the library's own exception types are not public
        raise BackendError(f"{_RTX} cannot be loaded: {_first_line(error)}; use backend onnxruntime") from None
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise BackendError(f"{_RTX} finds no RTX GPU here; use backend onnxruntime")
    return devices


def open_session(
    graph: Path | bytes,
    *,
    threads: int | None = None,
    providers: Sequence[str] = (CPU,),
    profile: Path | None = None,
    folded: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Load a graph in ONNX Runtime, which logs nothing below an error.

    Args:
        graph: an ONNX file, or a serialized model without external data.
        threads: CPU threads within an operator; None for one a core.
        providers: execution providers; what the first does not take goes to the next, and last to the CPU.
        profile: record a profile, in a file whose name begins with this path; `end_profiling` returns the name.
        folded: apply only ONNX Runtime's basic optimizations, and save the graph after them to this file, its weights
            to `<name>.data` beside it.

    Raises:
        MissingPackage: ONNX Runtime, or its first provider, is not installed.
        BackendError: it is too old, cannot load the graph, or does without the first provider.
    """
    first = providers[0]
    _check_provider(first)
    onnxruntime = _module()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Its threads would go on spinning for tens of milliseconds after a run, on cores that decoding, drawing or another
    # detector could use: two detectors in turn took twice the time of one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if folded is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", folded.with_suffix(".data").name
        )
    kinds, advice = list(dict.fromkeys((*providers, CPU))), "export the bundle again"
    if first != CPU:
        advice = f"check that the libraries {first} needs can be found, or use backend onnxruntime"
    if first not in onnxruntime.get_available_providers():  # a package of its own, which is asked for by device
        options.add_provider_for_devices(_rtx_devices()[:1], {})
        kinds = []
    model = graph if isinstance(graph, bytes) else str(graph)
    try:
        # Its own fallback prints to standard output and goes on without the provider; here that is an error.
        session = onnxruntime.InferenceSession(model, options, providers=kinds, enable_fallback=0)
    except Exception as error:  # the library's own exception types are not public
        name = "a graph in memory" if isinstance(graph, bytes) else graph
        raise BackendError(f"ONNX Runtime cannot load {name}: {_first_line(error)}; {advice}") from None
    if first not in session.get_providers():
        raise BackendError(f"ONNX Runtime fell back from {first} to the CPU; {advice}")
    return session


class _Sessions(LoadedGraphs["onnxruntime.InferenceSession"]):
    """The sessions of a bundle's graphs: one runs calls of several threads side by side."""

    def __init__(self, bundle: Bundle, threads: int | None, providers: Sequence[str]) -> None:
        self._threads, self._providers = threads, providers
        super().__init__(bundle)

    def _load(self, graph: str) -> onnxruntime.InferenceSession:
        return self._bundle.load(
            lambda folder: open_session(folder / graph, threads=self._threads, providers=self._providers)
        )


class OnnxRuntimeBackend:
    """A `Backend` on ONNX Runtime. Use `OnnxRuntimeBackend.open`."""

    def __init__(self, sessions: _Sessions) -> None:
        self._sessions: _Sessions | None = sessions

    @classmethod
    def open(cls, bundle: Bundle, threads: int | None = None, providers: Sequence[str] = (CPU,)) -> OnnxRuntimeBackend:
        """Load a bundle's graphs; see `open_session` for the arguments and what may be raised."""
        return cls(_Sessions(bundle, threads, providers))

    @property
    def text_key(self) -> str:
        """See `Backend.text_key`."""
        return ""

    def encode_text(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Backend.encode_text`."""
        (embedding,) = _run(self._opened.text, ["text_embedding"], text_inputs(input_ids))
        result: NDArray[np.float32] = embedding[0]
        return result

    def detect(self, inputs: ImageInputs) -> Candidates:
        """See `Backend.detect`."""
        check_on_host(inputs)
        image = self._opened.image
        if image is None:
            return self.detect_prompts([inputs])[0]
        return Candidates(*_run(image, CANDIDATES, inputs.feed()))

    def detect_prompts(self, inputs: Iterable[ImageInputs]) -> list[Candidates]:
        """See `Backend.detect_prompts`."""
        parts = self._opened.parts
        if parts is None:
            return [self.detect(of_prompt) for of_prompt in inputs]
        backbone, head = parts
        names = [output.name for output in backbone.get_outputs()]
        features: dict[str, NDArray[Any]] = {}
        found = []
        for of_prompt in inputs:
            if not features:
                check_on_host(of_prompt)
                features = dict(zip(names, _run(backbone, names, of_prompt.frame_feed()), strict=True))
            found.append(Candidates(*_run(head, CANDIDATES, {**features, **of_prompt.prompt_feed()})))
        return found

    def prepare_resize(self) -> bool:
        """See `Backend.prepare_resize`."""
        return False

    def clone(self) -> OnnxRuntimeBackend:
        """See `Backend.clone`. The sessions are shared: they run calls of several threads side by side."""
        return OnnxRuntimeBackend(self._opened)

    def close(self) -> None:
        """See `Backend.close`. The sessions end with the last clone."""
        self._sessions = None

    @property
    def _opened(self) -> _Sessions:
        if self._sessions is None:
            raise ClosedError("this detector is closed; open it again with Detector.open")
        return self._sessions


def _run(session: onnxruntime.InferenceSession, outputs: Sequence[str], feed: Mapping[str, NDArray[Any]]) -> list[Any]:
    try:
        return list(session.run(list(outputs), dict(feed)))
    except Exception as error:  # the library's own exception types are not public
        shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
        raise BackendError(f"ONNX Runtime failed on {shapes}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
