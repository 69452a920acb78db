"""The exported graphs in an inference engine: the runtime's own way from frame to boxes, timed piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_bench.subjects.base import Options, Piece, Stopwatch, SubjectName
from glip_bench.subjects.profile import Stage, profile_image_branch
from glip_deploy.bundle.contract import Candidates, ImageInputs
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import GlipError
from glip_deploy.frames import Canvas, make_canvas
from glip_deploy.prompts.syntax import PromptText
from glip_deploy.prompts.tokens import Prompt, parse_prompt, thresholds
from glip_deploy.results.detections import Detections
from glip_deploy.results.postprocess import select_batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy.backends.base import Backend

__all__ = ["BundleSubject", "open_onnx_subject", "provider_absence", "select_all"]

PROVIDERS = {
    SubjectName.ONNXRUNTIME_CPU: ("CPUExecutionProvider",),
    SubjectName.ONNXRUNTIME_CUDA: ("CUDAExecutionProvider",),
    # TensorRT leaves what it does not take to CUDA.
    SubjectName.ONNXRUNTIME_TENSORRT: ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}


def provider_absence(name: SubjectName) -> str | None:
    """Say why ONNX Runtime cannot run a subject; None where it can."""
    try:
        import onnxruntime
    except ImportError:
        return "ONNX Runtime is not installed; pip install 'onnxruntime>=1.25'"
    provider = PROVIDERS[name][0]
    if provider in onnxruntime.get_available_providers():
        return None
    return f"onnxruntime has no {provider} here; it comes with onnxruntime-gpu"


def open_onnx_subject(name: SubjectName, options: Options, bundle: Bundle) -> BundleSubject:
    """Load a bundle in ONNX Runtime.

    Raises:
        GlipError: a graph cannot be loaded, or the provider fell back to the CPU.
    """
    from glip_deploy.backends.onnxruntime import OnnxRuntimeBackend

    backend = OnnxRuntimeBackend.open(bundle, options.threads, PROVIDERS[name])
    return BundleSubject(name, options, bundle, backend, "cpu" if name is SubjectName.ONNXRUNTIME_CPU else "cuda")


class BundleSubject:
    """A bundle in a backend; the text embedding is computed once per prompt. See `Subject`."""

    def __init__(
        self,
        name: SubjectName,
        options: Options,
        bundle: Bundle,
        backend: Backend,
        device: str,
        precision: str | None = None,
    ) -> None:
        self.name = name
        self.options = options
        self.stages: Mapping[Piece, float] = {}
        self._bundle, self._backend, self._device = bundle, backend, device
        self._precision = precision or str(bundle.manifest.get("precision", "fp32"))
        self._tokenizer = bundle.tokenizer()
        self._prompt: Prompt | None = None
        self._embedding: NDArray[np.float32] = np.zeros((0, 0), np.float32)

    def prepare(self, prompt: PromptText | Prompt) -> None:
        """See `Subject`."""
        if not isinstance(prompt, Prompt):
            prompt = parse_prompt(prompt, self._tokenizer, max_tokens=self._bundle.max_tokens)
        self._embedding = self._backend.encode_text(prompt.input_ids)
        self._prompt = prompt

    def run(self, frame: NDArray[np.uint8]) -> Detections:
        """See `Subject`."""
        return self.run_batch([frame])[0]

    def run_batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """See `Subject`."""
        watch, prompt = Stopwatch(), self._ready()
        with watch(Piece.RESIZE):
            canvas = _canvas(frames, self.options)
        with watch(Piece.IMAGE):  # to the device and back included, where there is one
            found = self._backend.detect(self._inputs(canvas, prompt))
        with watch(Piece.SELECT):
            detections = select_all(found, canvas, prompt, self.options.threshold, self._bundle)
        self.stages = watch.seconds
        return detections

    def profile(self, frame: NDArray[np.uint8], runs: int) -> Mapping[Stage, float] | None:
        """See `Subject`; ONNX Runtime's profiler, in a session of its own, on its CPU provider alone."""
        if self.name is not SubjectName.ONNXRUNTIME_CPU:
            return None
        feed = self._inputs(_canvas([frame], self.options), self._ready()).feed()
        return profile_image_branch(self._bundle, feed, runs, self.options.threads)

    def describe(self) -> Mapping[str, Any]:
        """See `Subject`."""
        return {
            "device": self._device,
            "precision": self._precision,
            "tokens": int(self._embedding.shape[0]),
        }

    def close(self) -> None:
        """See `Subject`."""
        self._backend.close()

    def _ready(self) -> Prompt:
        if self._prompt is None:
            raise GlipError(f"{self.name} has no prompt yet; call prepare first")
        return self._prompt

    def _inputs(self, canvas: Canvas, prompt: Prompt) -> ImageInputs:
        return ImageInputs.of(canvas.frames, canvas.image_sizes, self._embedding, prompt.class_map)


def _canvas(frames: Sequence[NDArray[np.uint8]], options: Options) -> Canvas:
    return make_canvas(frames, color="rgb", shortest_side=options.shortest_side, longest_side=options.longest_side)


def select_all(found: Candidates, canvas: Canvas, prompt: Prompt, threshold: float, bundle: Bundle) -> list[Detections]:
    """Turn the candidates of a batch into detections, as `Detector` does.

    Args:
        found: what the image branch gave.
        canvas: what they were found in.
        prompt: what was looked for.
        threshold: scores must exceed it.
        bundle: its limits for NMS.
    """
    return select_batch(
        found,
        canvas.image_sizes,
        canvas.original_sizes,
        thresholds=thresholds(prompt, threshold),
        phrases=prompt.phrases,
        nms_threshold=bundle.nms_iou,
        max_detections=bundle.max_detections,
    )
