"""The path of a frame out of the network: NMS, detections, drawing and result formats."""

from __future__ import annotations

from glip_deploy.results.detections import Detection, Detections
from glip_deploy.results.postprocess import select

__all__ = ["Detection", "Detections", "select"]
