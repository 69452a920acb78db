"""Detections in the formats of other programs: Hugging Face, FiftyOne, Label Studio, YOLO.

Boxes of the last three are shares of the picture, so they need its size. A box is as wide as its right edge is from its
left one (COCO results alone count the last pixel, as the official evaluation does).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import MissingPackage, OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy.results.detections import Detections

__all__ = ["fiftyone_detections", "hugging_face", "label_studio_task", "yolo_lines"]

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def hugging_face(detections: Detections) -> list[dict[str, Any]]:
    """Return what transformers' pipeline gives; see `Detections.to_hf`."""
    return [
        {"score": one.score, "label": one.phrase, "box": dict(zip(_CORNERS, map(int, one.box), strict=True))}
        for one in detections
    ]


def fiftyone_detections(detections: Detections, width: int, height: int) -> Any:
    """Return a `fiftyone.Detections`; see `Detections.to_fiftyone`."""
    boxes = _shares(detections, width, height).tolist()
    try:
        fiftyone: Any = import_module("fiftyone")
    except ImportError as error:
        raise MissingPackage(
            "to_fiftyone needs the fiftyone package, which is not installed;"
            " pip install 'glip-deploy[fiftyone]', or use to_dicts()"
        ) from error
    return fiftyone.Detections(
        detections=[
            fiftyone.Detection(
                label=one.phrase,
                bounding_box=box,
                confidence=one.score,
                **({} if one.track is None else {"index": one.track}),
            )
            for one, box in zip(detections, boxes, strict=True)
        ]
    )


def label_studio_task(
    detections: Detections, image: str, width: int, height: int, model_version: str
) -> dict[str, Any]:
    """Return a task of Label Studio; see `Detections.to_label_studio`."""
    regions = [
        {
            "id": f"box{index}",
            "from_name": "label",
            "to_name": "image",
            "type": "rectanglelabels",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "score": one.score,
            "value": {
                **dict(zip(("x", "y", "width", "height"), (100 * box).tolist(), strict=True)),
                "rotation": 0,
                "rectanglelabels": [one.phrase],
            },
        }
        for index, (one, box) in enumerate(zip(detections, _shares(detections, width, height), strict=True))
    ]
    score = float(detections.scores.mean()) if len(detections) else 0.0
    prediction = {"model_version": model_version, "score": score, "result": regions}
    return {"data": {"image": image}, "predictions": [prediction]}


def yolo_lines(detections: Detections, width: int, height: int) -> str:
    """Return a label file of YOLO; see `Detections.to_yolo`."""
    boxes = _shares(detections, width, height)
    boxes[:, :2] += boxes[:, 2:] / 2
    return "".join(
        " ".join([str(label), *(f"{share:.6f}" for share in box)]) + "\n"
        for label, box in zip(detections.labels.tolist(), boxes.tolist(), strict=True)
    )


def _shares(detections: Detections, width: int, height: int) -> NDArray[np.float64]:
    """Return (N, 4) float64 boxes: left edge, top edge, width and height, all from 0 to 1.

    Raises:
        OptionError: the picture has no such size, or boxes reach out of it.
    """
    if width < 1 or height < 1:
        raise OptionError(f"the picture is {width} x {height}; give its width and its height in pixels")
    boxes = detections.boxes.astype(np.float64)
    size = np.array([width, height, width, height], np.float64)
    if len(boxes) and (boxes.min() < -1 or (boxes > size + 1).any()):
        right, bottom = boxes[:, 2].max(), boxes[:, 3].max()
        raise OptionError(
            f"boxes reach to x = {right:.0f} and y = {bottom:.0f}, the picture is {width} x {height};"
            " give the width and then the height of the picture in which they were found"
        )
    boxes = boxes.clip(0, size)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes / size
