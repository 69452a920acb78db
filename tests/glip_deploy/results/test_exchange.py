"""Detections in other programs' formats, against boxes worked out by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glip_deploy.errors import MissingPackage, OptionError
from glip_deploy.results.detections import Detections


def two():
    """In a picture of 200 x 100: a dog in its left half, a cat up to its right and lower edge."""
    return Detections(
        boxes=np.array([[0, 10, 100, 60], [150.75, 50, 200, 100]], np.float32),
        scores=np.array([0.75, 0.5], np.float32),
        labels=np.array([2, 0]),
        phrases=["a dog", "cat"],
    )


def test_hugging_face():
    assert two().to_hf() == [
        {"score": 0.75, "label": "a dog", "box": {"xmin": 0, "ymin": 10, "xmax": 100, "ymax": 60}},
        {"score": 0.5, "label": "cat", "box": {"xmin": 150, "ymin": 50, "xmax": 200, "ymax": 100}},
    ]
    assert all(type(edge) is int for one in two().to_hf() for edge in one["box"].values())
    assert Detections().to_hf() == []


def test_yolo():
    assert two().to_yolo(200, 100) == "2 0.250000 0.350000 0.500000 0.500000\n0 0.876875 0.750000 0.246250 0.500000\n"
    assert Detections().to_yolo(200, 100) == ""


def test_label_studio():
    task = two().to_label_studio("/data/local-files/?d=a.jpg", 200, 100, model_version="glip_t")
    assert json.loads(json.dumps(task)) == task
    assert task["data"] == {"image": "/data/local-files/?d=a.jpg"}
    (prediction,) = task["predictions"]
    assert (prediction["model_version"], prediction["score"]) == ("glip_t", 0.625)
    dog, cat = prediction["result"]
    assert dog == {
        "id": "box0",
        "from_name": "label",
        "to_name": "image",
        "type": "rectanglelabels",
        "original_width": 200,
        "original_height": 100,
        "image_rotation": 0,
        "score": 0.75,
        "value": {"x": 0, "y": 10, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["a dog"]},
    }
    assert cat["id"] != dog["id"]
    assert cat["value"] == {
        "x": 75.375, "y": 50, "width": 24.625, "height": 50, "rotation": 0, "rectanglelabels": ["cat"],
    }  # fmt: skip


def test_label_studio_without_boxes():
    (prediction,) = Detections().to_label_studio("a.jpg", 200, 100)["predictions"]
    assert prediction == {"model_version": "glip-deploy", "score": 0.0, "result": []}


@dataclass
class OneBox:
    """Takes what `fiftyone.Detection` takes."""

    label: str
    bounding_box: list[float]
    confidence: float
    index: int | None = None


def test_fiftyone(monkeypatch):
    stand_in: Any = SimpleNamespace(Detection=OneBox, Detections=lambda *, detections: detections)
    monkeypatch.setitem(sys.modules, "fiftyone", stand_in)
    assert two().to_fiftyone(200, 100) == [
        OneBox("a dog", [0, 0.1, 0.5, 0.5], 0.75),
        OneBox("cat", [0.75375, 0.5, 0.24625, 0.5], 0.5),
    ]
    tracked = replace(two(), track=np.array([7, -1]))
    assert [one.index for one in tracked.to_fiftyone(200, 100)] == [7, None]
    assert Detections().to_fiftyone(200, 100) == []


def test_fiftyone_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(MissingPackage, match=r"pip install 'glip-deploy\[fiftyone\]'"):
        two().to_fiftyone(200, 100)


FORMATS = {
    "yolo": lambda found, width, height: found.to_yolo(width, height),
    "label studio": lambda found, width, height: found.to_label_studio("a.jpg", width, height),
    "fiftyone": lambda found, width, height: found.to_fiftyone(width, height),
}


@pytest.mark.parametrize("convert", FORMATS.values(), ids=FORMATS)
def test_the_size_of_another_picture_is_refused(convert):
    """Width and height in the wrong order are the likely mistake."""
    with pytest.raises(OptionError, match="reach to x = 200 and y = 100, the picture is 100 x 200; give the width"):
        convert(two(), 100, 200)
    with pytest.raises(OptionError, match="the picture is 0 x 100"):
        convert(two(), 0, 100)


def test_rounding_beyond_the_edge_is_cut_off():
    boxes = np.array([[-0.25, 0, 200.5, 100.0001]], np.float32)
    found = Detections(boxes, np.array([0.9], np.float32), np.array([0]), ["cat"])
    assert found.to_yolo(200, 100) == "0 0.500000 0.500000 1.000000 1.000000\n"
