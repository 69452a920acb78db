"""The path of a frame into the network: decoded, resized as GLIP was trained, placed on the canvas."""

from __future__ import annotations

from glip_deploy.frames.canvas import Canvas, Color, NetworkCanvas, Resize, make_canvas, resize
from glip_deploy.frames.geometry import SIZE_DIVISOR, network_size
from glip_deploy.frames.load import as_frame, load_image

__all__ = [
    "SIZE_DIVISOR",
    "Canvas",
    "Color",
    "NetworkCanvas",
    "Resize",
    "as_frame",
    "load_image",
    "make_canvas",
    "network_size",
    "resize",
]
