"""The HTTP service: what it answers, in the words and objects of the command line."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import re
import threading
import zlib

import numpy as np
import pytest

pytest.importorskip("fastapi_offline", reason="FastAPI is not installed (extra serve)")

from PIL import Image
from starlette.testclient import TestClient

from glip_deploy.detector import Detector
from glip_deploy.prompts.syntax import Caption
from glip_deploy.results.detections import Detections
from glip_deploy.serve import pictures
from glip_deploy.serve.app import create_app
from glip_deploy.serve.models import Model
from glip_deploy.serve.settings import Settings


def png(width=96, height=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return pixels, stream.getvalue()


PICTURE = png()[1]
JSON = {"image": base64.b64encode(PICTURE).decode(), "prompt": "person. dog"}
LIMITS = {"max_bytes": 200_000, "max_pixels": 100_000, "max_characters": 2000, "max_prompts": 3}


@contextlib.contextmanager
def client_of(model, **options):
    """A client of an application of its own; a fault of the server is an answer, as it is in the real one."""
    app = create_app(Settings(**(LIMITS | options)), {model.name: model})
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


def problem_of(answer, status):
    """The words of an error, which is problem+json in one line."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert sorted(body) == ["detail", "status", "title", "type"] and body["status"] == status
    assert body["type"].startswith("urn:glip-deploy:") and body["title"]
    assert "\n" not in body["detail"] and "Traceback" not in body["detail"]
    return body["detail"]


@pytest.fixture(scope="module")
def detector(tiny_bundle):
    with Detector.open(tiny_bundle, shortest_side=64, cache_dir=None) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(detector):
    opened = Model("tiny", detector.clone())
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def served(model):
    with client_of(model) as client:
        yield client


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


def test_several_prompts_are_answered_one_by_one(served, detector):
    pixels, data = png(seed=2)
    caption = {"text": "a dog beside a bus", "spans": [[2, 5], [[15, 18]]]}
    fields = {"prompt": ["person. dog", '["bus", "red apple"]', json.dumps(caption)], "threshold": "[0.1, 0.2, 0.1]"}
    answer = served.post("/v1/detect", files={"image": data}, data=fields)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [one["prompt"] for one in results] == ["person. dog", "bus. red apple", "a dog beside a bus"]
    as_given = ["person. dog", ["bus", "red apple"], Caption(caption["text"], [(2, 5), [(15, 18)]])]
    found = detector.detect_prompts(pixels, as_given, [0.1, 0.2, 0.1], color="rgb")
    assert [one["detections"] for one in results] == [one.to_dicts() for one in found]
    assert {box["label"] for box in results[2]["detections"]} <= {"dog", "bus"}
    body = {"image": base64.b64encode(data).decode(), "prompts": ["person. dog", ["bus", "red apple"], caption]}
    assert served.post("/v1/detect", json=body | {"threshold": [0.1, 0.2, 0.1]}).json()["results"] == [
        one | {"source": "image"} for one in results
    ]


def test_brackets_in_a_form_are_those_of_a_caption_unless_they_are_json(served):
    answer = served.post(
        "/v1/detect", files={"image": PICTURE}, data={"prompt": "[a dog] in a bus", "threshold": "0.01"}
    )
    assert {one["label"] for one in answer.json()["detections"]} == {"a dog"}


def test_max_detections_and_names_with_words_around_them(served):
    prompt = [{"name": "stingray", "suffix": ", which is flat"}, "dog"]
    answer = served.post("/v1/detect", json=JSON | {"prompt": prompt, "threshold": 0.01, "max_detections": 3})
    assert len(answer.json()["detections"]) == 3
    assert {one["label"] for one in answer.json()["detections"]} <= {"stingray", "dog"}


def test_encode_shows_the_classes_of_a_prompt(served):
    answer = served.post("/v1/encode", json={"prompt": ["red apple", "dog"]})
    assert answer.json() == {
        "model": "tiny",
        "phrases": ["red apple", "dog"],
        "prompts": [{"caption": "red apple. dog", "phrases": ["red apple", "dog"], "tokens": 10}],
    }


REFUSED = {
    "no prompt": ({"prompt": None}, 422, "the request has neither prompt nor prompts; give one of them"),
    "two kinds of prompt": ({"prompts": ["dog"]}, 422, "the request has both prompt and prompts"),
    "no prompts": ({"prompt": None, "prompts": []}, 422, "prompts is an empty list; give at least one"),
    "many prompts": ({"prompt": None, "prompts": ["dog"] * 4}, 422, "4 prompts are given; at most 3 are accepted"),
    "an empty prompt": ({"prompt": ""}, 422, "the prompt '' has no words; name what to detect"),
    "a long prompt": (
        {"prompt": "dog " * 501}, 422, "the prompt has 2004 characters; at most 2000 are accepted; name fewer things",
    ),
    "a long list": ({"prompt": ["dog"] * 501}, 422, "the prompt has 2004 characters"),
    "a repeated class": ({"prompt": ["dog", "Dog"]}, 422, "class"),
    "a prompt of another kind": ({"prompt": 5}, 422, "the body cannot be used: Expected"),
    "spans outside": ({"prompt": {"text": "a dog", "spans": [[2, 50]]}}, 422, "50"),
    "spans that are none": ({"prompt": {"text": "a dog", "spans": [[2, [1]]]}}, 422, "span"),
    "half a surrogate pair": ({"prompt": "dog \ud800"}, 400, "the body is not JSON"),
    "phrases unknown": ({"phrases": "some"}, 422, "phrases is 'some'; legal is auto, whole, dots"),
    "a threshold above 1": ({"threshold": 1.5}, 422, "threshold"),
    "a threshold of a stranger": ({"threshold": {"cat": 0.5}}, 422, "cat"),
    "too many thresholds": ({"threshold": [0.5, 0.5, 0.5]}, 422, "thresholds have shape (3,)"),
    "no boxes": ({"max_detections": 0}, 422, "max_detections"),
    "a field unknown": ({"imgae": "x"}, 422, "imgae"),
    "a model unknown": ({"model": "large"}, 404, "there is no model 'large' here; choose tiny"),
    "an address for a picture": ({"image": "http://127.0.0.1/cat.jpg"}, 422, "base64"),
    "no bytes": ({"image": ""}, 422, "picture is empty (0 bytes); give the bytes of a JPEG or PNG file"),
    "not a picture": (
        {"image": base64.b64encode(b"hello" * 99).decode()}, 422, "picture is not in a format this server can read",
    ),
    "a cut picture": ({"image": base64.b64encode(PICTURE[:900]).decode()}, 422, "picture cannot be decoded"),
    "PostScript": (
        {"image": base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()}, 422, "JPEG, PNG",
    ),
    "a large picture": (
        {"image": base64.b64encode(PICTURE + bytes(200_000)).decode()}, 413, "at most 200000 are accepted; shrink",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, status, words", REFUSED.values(), ids=REFUSED)
def test_bad_requests_are_refused_in_one_line(served, change, status, words):
    body = {name: value for name, value in (JSON | change).items() if value is not None}
    answer = served.post("/v1/detect", content=json.dumps(body), headers={"content-type": "application/json"})
    assert words in problem_of(answer, status)


def test_words_are_those_of_the_library(served, detector):
    for prompt in ("", "dog. dog", []):
        with pytest.raises(Exception) as error:
            detector.encode(prompt)
        answer = served.post("/v1/encode", json={"prompt": prompt})
        assert problem_of(answer, 422) == str(error.value)
        assert answer.json()["type"] == "urn:glip-deploy:PromptError"


def test_bodies_of_other_kinds_are_refused(served):
    def ask(content, kind):
        return served.post("/v1/detect", content=content, headers={"content-type": kind})

    assert "the content type is 'text/plain'; send application/json or multipart" in problem_of(
        ask(b"x", "text/plain"), 415
    )
    assert "the body is not JSON" in problem_of(ask(b"{", "application/json"), 400)
    assert "the body is not JSON" in problem_of(ask(b'{"prompt": "\xff"}', "application/json"), 400)
    assert ask(b"[" * 100_000, "application/json").status_code in (400, 422)
    assert "the form cannot be read" in problem_of(ask(b"x", "multipart/form-data"), 400)
    assert "the form cannot be read" in problem_of(ask(b"junk", "multipart/form-data; boundary=b"), 400)


def test_forms_with_other_fields_are_refused(served):
    def ask(fields, files):
        return problem_of(served.post("/v1/detect", data={"prompt": "dog"} | fields, files=files), 422)

    assert "the form has no field image" in ask({}, {"phrases": (None, "auto")})
    assert "the field image must be a file" in ask({"image": "x"}, {"threshold": (None, "0.5")})
    assert "the form has a field 'url'; legal is image, prompt" in ask({"url": "http://x"}, {"image": PICTURE})
    assert "the field threshold 2 times; give it once" in ask({"threshold": ["0.5", "0.6"]}, {"image": PICTURE})
    assert "threshold is 'much'; give a number" in ask({"threshold": "much"}, {"image": PICTURE})
    assert "max_detections is '-1'; give a whole number" in ask({"max_detections": "-1"}, {"image": PICTURE})


def bomb(side):
    """A PNG of `side` squared pixels in a few bytes."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side, words", [(400, "(400x400, 160000 pixels); at most 100000"), (60_000, "at most 100000")])
def test_a_bomb_is_refused_before_it_is_decoded(served, monkeypatch, side, words):
    monkeypatch.setattr(pictures, "decode_image", lambda *_, **__: pytest.fail("decoded"))
    answer = served.post("/v1/detect", files={"image": bomb(side)}, data={"prompt": "dog"})
    assert words in problem_of(answer, 413)


def test_a_body_that_is_too_large_is_refused_announced_or_not(served):
    limit = Settings(**LIMITS).max_body
    words = f"the request is larger than {limit} bytes; shrink or compress the picture"
    announced = served.post("/v1/detect", files={"image": bytes(limit)}, data={"prompt": "dog"})
    assert words in problem_of(announced, 413)
    chunks = (bytes(10_000) for _ in range(limit // 10_000 + 1))
    streamed = served.post("/v1/detect", content=chunks, headers={"content-type": "application/json"})
    assert words in problem_of(streamed, 413)
    assert served.get("/healthz").status_code == 200


def test_a_token_is_wanted_where_there_is_one(model):
    with client_of(model, token="open-sesame", host="0.0.0.0") as client:
        for path in ("/v1/models", "/metrics"):
            answer = client.get(path)
            assert "this server wants a token; send Authorization: Bearer TOKEN" in problem_of(answer, 401)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            for wrong in ("Bearer open", "Bearer open-sesame1", "Basic open-sesame", "open-sesame", "Bearer \xff"):
                answer = client.get(path, headers={"Authorization": wrong.encode("latin-1")})
                problem_of(answer, 401)
            assert client.get(path, headers={"Authorization": "Bearer open-sesame"}).status_code == 200
        assert client.post("/v1/detect", json=JSON).status_code == 401
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        description = client.get("/openapi.json").json()
        assert description["paths"]["/v1/detect"]["post"]["security"] == [{"token": []}]


def test_pages_of_other_servers_may_not_ask(served):
    words = "the request comes from a page of another server"
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999"):
        answer = served.post("/v1/detect", json=JSON, headers={"Origin": origin})
        assert words in problem_of(answer, 403)
        assert not any(name.lower().startswith("access-control") for name in answer.headers)
    assert served.get("/v1/models", headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200
    preflight = served.options("/v1/detect", headers={"Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 405


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "192.168.0.5", ""])
def test_other_names_of_a_server_without_a_token_are_refused(served, host):
    assert "answers on this machine alone" in problem_of(served.get("/v1/models", headers={"Host": host}), 421)


def test_unknown_paths_and_methods(served):
    assert "there is nothing at '/v2/detect'; /docs lists what is there" in problem_of(served.get("/v2/detect"), 404)
    assert "'/v1/detect' takes another method" in problem_of(served.get("/v1/detect"), 405)


def test_the_documentation_fetches_nothing_from_elsewhere(served):
    page = served.get("/docs")
    assert page.status_code == 200
    fetched = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", page.text)
    assert len(fetched) >= 3 and all(one.startswith("/") for one in fetched), fetched
    for one in fetched:
        assert served.get(one).status_code == 200, one
    assert "//" not in re.sub(r"https?://127\.0\.0\.1\S*|<!--.*?-->", "", page.text.replace("<!DOCTYPE", ""))


def test_metrics_count_requests_and_frames(model):
    with client_of(model) as client:
        client.post("/v1/detect", json=JSON)
        client.post("/v1/detect", json=JSON | {"prompt": ""})
        client.get("/../../etc/passwd")
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'glip_requests_total{method="POST",path="/v1/detect",status="200"} 1.0' in answer.text
    assert 'glip_requests_total{method="POST",path="/v1/detect",status="422"} 1.0' in answer.text
    assert 'glip_requests_total{method="GET",path="other",status="404"} 1.0' in answer.text
    assert 'glip_batch_frames_count{model="tiny"} 1.0' in answer.text
    assert 'glip_stage_seconds_count{model="tiny",stage="image branch"} 1.0' in answer.text
    assert "glip_requests_under_way 0.0" in answer.text
    assert 'glip_frames_waiting{model="tiny"} 0.0' in answer.text


class Stuck:
    """A detector whose frames take until `go` is set."""

    def __init__(self, detector, error=None):
        self.bundle, self.encode, self.error = detector.bundle, detector.encode, error
        self.go, self.begun = threading.Event(), threading.Event()

    def detect_batch(self, frames, *_, **__):
        self.begun.set()
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        return [Detections.empty() for _ in frames]

    def close(self):
        self.go.set()


@contextlib.contextmanager
def stuck_client(detector, error=None, **options):
    stuck = Stuck(detector, error)
    model = Model("stuck", stuck, queue_size=options.get("queue_size", 64))
    with client_of(model, **options) as client:
        yield client, stuck
        stuck.go.set()
    model.close()


def test_with_all_places_taken_the_next_is_told_to_come_again(detector):
    with stuck_client(detector, queue_size=1) as (client, stuck):
        answers = []
        asking = threading.Thread(target=lambda: answers.append(client.post("/v1/detect", json=JSON)))
        asking.start()
        assert stuck.begun.wait(60)
        refused = client.post("/v1/detect", json=JSON)
        assert "as many requests are under way as this server takes (1); ask again in" in problem_of(refused, 429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert client.get("/healthz").status_code == 200
        stuck.go.set()
        asking.join(60)
        assert answers[0].status_code == 200
        assert client.post("/v1/detect", json=JSON).status_code == 200


def test_a_request_that_takes_too_long_is_given_up(detector):
    with stuck_client(detector, timeout=0.5) as (client, _):
        answer = client.post("/v1/detect", json=JSON)
        assert "it takes too long; ask again later, or for less at once" in problem_of(answer, 503)
        assert answer.headers["Retry-After"] == "5"


def test_a_fault_of_the_server_is_logged_and_the_server_lives_on(detector, caplog):
    with stuck_client(detector, error=RuntimeError("a secret path")) as (client, stuck):
        stuck.go.set()
        with caplog.at_level(logging.ERROR, "glip_deploy"):
            words = problem_of(client.post("/v1/detect", json=JSON), 500)
        assert words == "the server failed, which is a fault of its own; its log says how"
        (record,) = [one for one in caplog.records if one.levelname == "ERROR"]
        assert record.getMessage() == "POST /v1/detect failed" and "a secret path" in str(record.exc_info[1])
        stuck.error = None
        assert client.post("/v1/detect", json=JSON).status_code == 200


def test_it_is_not_ready_once_its_models_are_closed(detector):
    model = Model("tiny", detector.clone())
    with client_of(model) as client:
        assert client.get("/readyz").status_code == 200
        model.close()
        assert "the server is ending" in problem_of(client.get("/readyz"), 503)
        assert "the server is ending" in problem_of(client.post("/v1/detect", json=JSON), 503)
