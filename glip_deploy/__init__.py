"""Open-vocabulary detection with exported GLIP bundles.

    from glip_deploy import Detector
    detector = Detector.open("glip_t/")
    prompt = detector.encode(["person", "traffic light"])
    detections = detector.detect(frame, prompt, threshold=0.5, color="bgr")

Importing this package imports neither torch, onnx, TensorRT nor an inference engine.
"""

from __future__ import annotations

from glip_deploy.bundle import Bundle
from glip_deploy.detections import Detection, Detections
from glip_deploy.detector import Detector, EncodedPrompt
from glip_deploy.errors import GlipError
from glip_deploy.image import load_image
from glip_deploy.prompt import Caption, ClassName, Prompt

__all__ = [
    "Bundle",
    "Caption",
    "ClassName",
    "Detection",
    "Detections",
    "Detector",
    "EncodedPrompt",
    "GlipError",
    "Prompt",
    "load_image",
]
