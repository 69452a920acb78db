"""ONNX Runtime: on the CPU the default that works everywhere; glip-bench also measures its GPU providers."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.bundle.contract import IMAGE_GRAPH, TEXT_GRAPH, Candidates, ImageInputs, text_inputs
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import FrameError, GlipError

if TYPE_CHECKING:
    from numpy.typing import NDArray


__all__ = ["OnnxRuntimeBackend"]

OLDEST = (1, 25)

CPU = "CPUExecutionProvider"


class OnnxRuntimeBackend:
    """Two sessions. The text branch is loaded by the first prompt that is not in a cache.

    Args:
        bundle: the bundle.
        threads: CPU threads.
        providers: execution providers; what the first does not take goes to the next, and last to the CPU.

    Raises:
        GlipError: ONNX Runtime is missing or too old, cannot load the graph, or does without the first provider.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, providers: tuple[str, ...] = (CPU,)) -> None:
        self._bundle = bundle
        self._threads = threads
        self._providers = providers
        self._lock = threading.Lock()
        self._closed = False
        self._text: Any = None
        self._image: Any = self._session(IMAGE_GRAPH)

    def _session(self, graph: str) -> Any:
        try:
            import onnxruntime
        except ImportError:
            raise GlipError("ONNX Runtime is not installed; pip install 'onnxruntime>=1.25'") from None
        version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
        if version < OLDEST:
            raise GlipError(
                f"ONNX Runtime {onnxruntime.__version__} has no deformable convolution on the CPU;"
                " pip install -U 'onnxruntime>=1.25'"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        path = self._bundle.path / graph
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=list(dict.fromkeys((*self._providers, CPU)))
            )
        except Exception as error:  # the library's own exception types are not public
            reason = _first_line(error)
            raise GlipError(f"ONNX Runtime cannot load {path}: {reason}; export the bundle again") from None
        if self._providers[0] not in session.get_providers():
            raise GlipError(
                f"ONNX Runtime fell back from {self._providers[0]}; check that CUDA's libraries can be found"
            )
        return session

    def encode_text(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Backend.encode_text`."""
        with self._lock:
            if self._text is None and not self._closed:
                self._text = self._session(TEXT_GRAPH)
            session = self._text
        (embedding,) = self._run(session, ["text_embedding"], text_inputs(input_ids))
        result: NDArray[np.float32] = embedding[0]
        return result

    def detect(self, inputs: ImageInputs) -> Candidates:
        """See `Backend.detect`."""
        if not isinstance(inputs.frames, np.ndarray):
            raise FrameError(
                "the frame is in GPU memory, which this backend cannot read; copy it, or use backend tensorrt"
            )
        boxes, scores, labels = self._run(self._image, ["boxes", "scores", "labels"], inputs.feed())
        return Candidates(boxes, scores, labels)

    def _run(self, session: Any, outputs: list[str], feed: dict[str, Any]) -> list[Any]:
        if session is None:
            raise GlipError("this detector is closed; open it again with Detector.open")
        try:
            return list(session.run(outputs, feed))
        except Exception as error:  # the library's own exception types are not public
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
            raise GlipError(f"ONNX Runtime failed on {shapes}: {_first_line(error)}") from None

    def clone(self) -> OnnxRuntimeBackend:
        """See `Backend.clone`. A session runs calls of several threads side by side, so it is shared."""
        if self._closed:
            raise GlipError("this detector is closed; open it again with Detector.open")
        twin = object.__new__(OnnxRuntimeBackend)
        twin._bundle, twin._threads, twin._providers = self._bundle, self._threads, self._providers
        twin._lock, twin._closed = threading.Lock(), False
        twin._text, twin._image = self._text, self._image
        return twin

    def close(self) -> None:
        """See `Backend.close`."""
        with self._lock:
            self._closed = True
            self._text = self._image = None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
