"""The HTTP service: what it answers, in the words and objects of the command line."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest

pytest.importorskip("fastapi_offline", reason="FastAPI is not installed (extra serve)")

from PIL import Image
from starlette.testclient import TestClient

from glip_deploy.detector import Detector
from glip_deploy.serve.app import create_app
from glip_deploy.serve.models import Model
from glip_deploy.serve.settings import Settings


def png(width=96, height=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return pixels, stream.getvalue()


@pytest.fixture(scope="module")
def detector(tiny_bundle):
    with Detector.open(tiny_bundle, shortest_side=64, cache_dir=None) as opened:
        yield opened


@pytest.fixture(scope="module")
def served(detector):
    """The settings, the models and a client of an application."""
    settings = Settings(max_bytes=200_000, max_pixels=100_000, max_characters=2000)
    model = Model("tiny", detector.clone())
    app = create_app(settings, {"tiny": model})
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        yield client
    model.close()


def expected(detector, pixels, prompt, threshold=0.1):
    return detector.detect(pixels, prompt, threshold, color="rgb").to_dicts()


def test_multipart_gives_the_object_of_glip_detect(served, detector):
    pixels, data = png()
    answer = served.post(
        "/v1/detect", files={"image": ("street.png", data)}, data={"prompt": "person. dog", "threshold": "0.1"}
    )
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["source", "frame", "width", "height", "detections"]
    assert answer.json() | {"detections": []} == {
        "source": "street.png", "frame": 0, "width": 96, "height": 64, "detections": [],
    }  # fmt: skip
    assert answer.json()["detections"] == expected(detector, pixels, "person. dog") != []
    assert "image-branch;dur=" in answer.headers["Server-Timing"]


def test_json_gives_the_same_as_multipart(served, detector):
    pixels, data = png(seed=1)
    body = {"image": base64.b64encode(data).decode(), "prompt": ["person", "dog"], "threshold": {"Dog": 0.1}}
    answer = served.post("/v1/detect", json=body).json()
    found = detector.detect(pixels, ["person", "dog"], {"dog": 0.1}, color="rgb")
    assert answer["source"] == "image"
    assert answer["detections"] == found.to_dicts()


def test_health_and_models(served):
    assert served.get("/healthz").json() == {"status": "ok"}
    assert served.get("/readyz").json() == {"status": "ready", "models": ["tiny"]}
    (model,) = served.get("/v1/models").json()["models"]
    assert model["name"] == "tiny" and model["shortest_side"] == 64
