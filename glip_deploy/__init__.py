"""Open-vocabulary detection with exported GLIP bundles.

    from glip_deploy import Detector
    detector = Detector.open("glip_t/")
    prompt = detector.encode(["person", "traffic light"])
    detections = detector.detect(frame, prompt, threshold=0.5, color="bgr")

Importing this package imports neither torch, onnx, TensorRT nor an inference engine.
"""

from __future__ import annotations

from glip_deploy.bundle.manifest import Bundle
from glip_deploy.detector import Detector
from glip_deploy.errors import GlipError
from glip_deploy.frames.load import load_image
from glip_deploy.prompts.encoded import ChunkedPrompt, EncodedPrompt
from glip_deploy.prompts.syntax import Caption, ClassName
from glip_deploy.prompts.tokens import Prompt
from glip_deploy.results.detections import Detection, Detections

__version__ = "0.2.0"

__all__ = [
    "Bundle",
    "Caption",
    "ChunkedPrompt",
    "ClassName",
    "Detection",
    "Detections",
    "Detector",
    "EncodedPrompt",
    "GlipError",
    "Prompt",
    "__version__",
    "load_image",
]
