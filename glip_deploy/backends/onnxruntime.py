"""ONNX Runtime: on the CPU the default that works everywhere; glip-bench also measures its GPU providers.

`open_session` is how every part of the toolkit opens a graph, so that all report a bad one alike.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.bundle.contract import IMAGE_GRAPH, TEXT_GRAPH, Candidates, ImageInputs, text_inputs
from glip_deploy.errors import BackendError, ClosedError, FrameError, MissingPackage

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from glip_deploy.bundle.manifest import Bundle

__all__ = ["CPU", "OnnxRuntimeBackend", "open_session"]

CPU = "CPUExecutionProvider"
OLDEST = (1, 25)
"""First version whose CPU provider runs the standard DeformConv."""


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
        MissingPackage: ONNX Runtime is not installed.
        BackendError: it is too old, cannot load the graph, or does without the first provider.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingPackage("ONNX Runtime is not installed; pip install 'onnxruntime>=1.25'") from None
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < OLDEST:
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} has no deformable convolution on the CPU;"
            " pip install -U 'onnxruntime>=1.25'"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
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
    model = graph if isinstance(graph, bytes) else str(graph)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=list(dict.fromkeys((*providers, CPU))))
    except Exception as error:  # the library's own exception types are not public
        name = "a graph in memory" if isinstance(graph, bytes) else graph
        raise BackendError(f"ONNX Runtime cannot load {name}: {_first_line(error)}; export the bundle again") from None
    if providers[0] not in session.get_providers():
        raise BackendError(f"ONNX Runtime fell back from {providers[0]}; check that CUDA's libraries can be found")
    return session


class _Sessions:
    """The sessions of a bundle's two graphs, which clones share: a session runs calls of several threads side by side.

    The text graph is loaded by the first prompt that is not in a cache.
    """

    def __init__(self, bundle: Bundle, threads: int | None, providers: Sequence[str]) -> None:
        self._bundle, self._threads, self._providers = bundle, threads, providers
        self._lock = threading.Lock()
        self._text: onnxruntime.InferenceSession | None = None
        self.image = self._open(IMAGE_GRAPH)

    def _open(self, graph: str) -> onnxruntime.InferenceSession:
        return open_session(self._bundle.path / graph, threads=self._threads, providers=self._providers)

    @property
    def text(self) -> onnxruntime.InferenceSession:
        with self._lock:
            if self._text is None:
                self._text = self._open(TEXT_GRAPH)
            return self._text


class OnnxRuntimeBackend:
    """A `Backend` on ONNX Runtime. Use `OnnxRuntimeBackend.open`."""

    def __init__(self, sessions: _Sessions) -> None:
        self._sessions: _Sessions | None = sessions

    @classmethod
    def open(cls, bundle: Bundle, threads: int | None = None, providers: Sequence[str] = (CPU,)) -> OnnxRuntimeBackend:
        """Load a bundle's graphs; see `open_session` for the arguments and what may be raised."""
        return cls(_Sessions(bundle, threads, providers))

    def encode_text(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Backend.encode_text`."""
        (embedding,) = _run(self._opened.text, ["text_embedding"], text_inputs(input_ids))
        result: NDArray[np.float32] = embedding[0]
        return result

    def detect(self, inputs: ImageInputs) -> Candidates:
        """See `Backend.detect`."""
        if not isinstance(inputs.frames, np.ndarray):
            raise FrameError(
                "the frame is in GPU memory, which this backend cannot read; copy it, or use backend tensorrt"
            )
        return Candidates(*_run(self._opened.image, ["boxes", "scores", "labels"], inputs.feed()))

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


def _run(session: onnxruntime.InferenceSession, outputs: list[str], feed: Mapping[str, NDArray[Any]]) -> list[Any]:
    try:
        return list(session.run(outputs, dict(feed)))
    except Exception as error:  # the library's own exception types are not public
        shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
        raise BackendError(f"ONNX Runtime failed on {shapes}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
