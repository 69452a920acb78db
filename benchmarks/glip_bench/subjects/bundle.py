"""An exported bundle, run by `glip_deploy.Detector` on ONNX Runtime, OpenVINO or TensorRT engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from glip_bench.subjects.base import Options, Piece, Subject, SubjectName
from glip_bench.subjects.profile import profile_image_branch, profile_openvino
from glip_deploy.backends import OPENVINO, PROVIDERS, check_trusted, open_backend
from glip_deploy.backends.onnxruntime import provider_absence
from glip_deploy.backends.openvino import Precision, openvino_absence
from glip_deploy.detector import Detector, FrameStep
from glip_deploy.errors import GlipError, OptionError
from glip_deploy.prompts.encoded import EncodedPrompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.backends.base import Backend
    from glip_deploy.bundle.contract import Candidates, ImageInputs
    from glip_deploy.bundle.engines import EngineRecord
    from glip_deploy.bundle.manifest import Bundle
    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.prompts.tokens import Prompt
    from glip_deploy.results.detections import Detections

__all__ = ["BundleSubject", "bundle_absence", "open_bundle_subject"]

BACKENDS = {
    SubjectName.ONNXRUNTIME_CPU: "onnxruntime",
    SubjectName.ONNXRUNTIME_CUDA: "onnxruntime-cuda",
    SubjectName.ONNXRUNTIME_TENSORRT: "onnxruntime-tensorrt",
    SubjectName.ONNXRUNTIME_NV_TENSORRT_RTX: "onnxruntime-nv-tensorrt-rtx",
}
PRECISIONS = {SubjectName.OPENVINO: Precision.F32, SubjectName.OPENVINO_BF16: Precision.BF16}
"""OpenVINO's subjects, by the precision in which each computes."""
PACKAGES = {SubjectName.TENSORRT: "tensorrt", SubjectName.TENSORRT_RTX: "tensorrt_rtx"}


def bundle_absence(name: SubjectName, options: Options) -> str | None:
    """Say why a bundle cannot run here as the subject `name`; return None where it can. No graph is loaded."""
    backend = OPENVINO if name in PRECISIONS else BACKENDS.get(name, "tensorrt")
    try:
        check_trusted(backend, options.trusted)
    except OptionError as error:
        return str(error)
    if name in PRECISIONS:
        return openvino_absence(PRECISIONS[name])
    return _engine_absence(name, options) if name in PACKAGES else provider_absence(PROVIDERS[backend][0])


def _usable(options: Options) -> list[tuple[Path, EngineRecord]]:
    """Return the bundle's engines that the options allow, with their records."""
    from glip_deploy.bundle.engines import read_records

    found = read_records(options.bundle)
    return [(folder, record) for folder, record in found if options.plugins or record.plugin is None]


def _engine_absence(name: SubjectName, options: Options) -> str | None:
    from importlib.util import find_spec

    from glip_bench.machine.gpus import describe_gpus

    found = find_spec(PACKAGES[name])
    if found is None or found.origin is None:  # no origin: an empty folder of that name, type stubs for instance
        return f"the package {PACKAGES[name]} is not installed; pip install 'glip-deploy[{name}]'"
    if not describe_gpus():
        return "there is no NVIDIA GPU here"
    try:
        flavors = {record.flavour for _, record in _usable(options)}
    except GlipError as error:
        return str(error)
    if name not in flavors:
        without = "" if options.plugins else " without a plugin library"
        form = "" if options.plugins else " --form native"
        return f"the bundle has no engines for it{without}; glip-build {options.bundle} --flavor {name}{form}"
    return None


def open_bundle_subject(name: SubjectName, options: Options, bundle: Bundle) -> BundleSubject:
    """Load a bundle.

    Raises:
        GlipError: a graph or engine cannot be loaded, or ONNX Runtime fell back to another provider.
    """
    opened = partial(open_backend, trusted=options.trusted, plugins=options.plugins)
    backend: Backend
    if name in PACKAGES:
        folder, record = next((folder, record) for folder, record in _usable(options) if record.flavour == name)
        backend, precision = opened("tensorrt", bundle, options.threads, folder), record.precision
    elif name in PRECISIONS:
        # Nothing is cached: the time to open is the time to compile.
        precision = "fp32" if name is SubjectName.OPENVINO else "bf16"
        backend = opened(OPENVINO, bundle, options.threads, precision=PRECISIONS[name])
    else:
        backend = opened(BACKENDS[name], bundle, options.threads)
        precision = bundle.manifest.precision
    return BundleSubject(name, options, Detector(bundle, backend), precision)


@dataclass
class _Recorder:
    """A backend that keeps the inputs it is given; all else goes to the backend it wraps."""

    backend: Backend
    inputs: list[ImageInputs] = field(default_factory=list)

    def detect(self, inputs: ImageInputs) -> Candidates:
        self.inputs.append(inputs)
        return self.backend.detect(inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


class BundleSubject(Subject):
    """A bundle in a detector: the product itself is timed, by its own clock (`FrameStep`).

    Args:
        name: see `Subject`.
        options: see `Subject`.
        detector: without a folder for its cache, so that the text branch runs for every new prompt.
        precision: of the weights, for the result file.
    """

    def __init__(self, name: SubjectName, options: Options, detector: Detector, precision: str) -> None:
        super().__init__(name, options)
        self._detector, self._precision = detector, precision
        self._prompt: EncodedPrompt | None = None

    def prepare(self, prompt: PromptText | Prompt) -> None:
        """See `Subject.prepare`."""
        self._prompt = self._detector.encode(prompt)

    def run_batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """See `Subject.run_batch`."""
        if self._prompt is None:
            raise self._no_prompt()
        seconds: dict[FrameStep, float] = {}
        detector, options = self._detector, self.options
        detector.shortest_side, detector.longest_side = options.shortest_side, options.longest_side
        found = detector.detect_batch(frames, self._prompt, options.threshold, color="rgb", timings=seconds)
        self.pieces = {Piece(step): value for step, value in seconds.items()}
        return found

    shares_frames = True

    def run_prompts(self, frame: NDArray[np.uint8], prompts: Sequence[PromptText | Prompt]) -> list[Detections]:
        """See `Subject.run_prompts`; the backbone runs once."""
        detector, options = self._detector, self.options
        detector.shortest_side, detector.longest_side = options.shortest_side, options.longest_side
        return detector.detect_prompts(frame, prompts, options.threshold, color="rgb")

    def profile(self, frame: NDArray[np.uint8], runs: int) -> Mapping[str, float] | None:
        """See `Subject.profile`; on ONNX Runtime's CPU provider and on OpenVINO alone, in a session of its own."""
        if self.name is not SubjectName.ONNXRUNTIME_CPU and self.name not in PRECISIONS:
            return None
        recorder = _Recorder(self._detector.backend)
        self._detector.backend = cast("Backend", recorder)
        try:
            self.run(frame)
        finally:
            self._detector.backend = recorder.backend
        bundle, feed, threads = self._detector.bundle, recorder.inputs[0].feed(), self.options.threads
        if self.name in PRECISIONS:
            return profile_openvino(bundle, feed, runs, PRECISIONS[self.name], threads)
        return profile_image_branch(bundle, feed, runs, threads)

    def describe(self) -> Mapping[str, Any]:
        """See `Subject.describe`."""
        return {
            "device": "cpu" if self.name is SubjectName.ONNXRUNTIME_CPU or self.name in PRECISIONS else "cuda",
            "precision": self._precision,
            "tokens": 0 if self._prompt is None else len(self._prompt.embedding),
        }

    def close(self) -> None:
        """See `Subject.close`."""
        self._detector.close()
