"""The websocket of the live page, message by message, as a client of any kind would use it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from glip_deploy import Detections, Detector
from glip_deploy.errors import GlipError, OptionError
from glip_deploy.serve import live
from glip_deploy.serve.messages import pack, unpack
from glip_deploy.serve.models import Model
from glip_deploy.serve.settings import Settings
from glip_deploy.serve.sources import SharedSource

pytest.importorskip("fastapi", reason="FastAPI is not installed (extra serve)")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
websockets = pytest.importorskip("websockets.exceptions", reason="websockets is not installed (extra serve)")

from websockets.sync.client import connect  # noqa: E402

SIDE = 64


@pytest.fixture(scope="module")
def detector(tiny_bundle):
    with Detector.open(tiny_bundle, shortest_side=SIDE, cache_dir=None) as opened:
        yield opened


@pytest.fixture(scope="module")
def running(detector, tmp_path_factory):
    """Starts a server in a thread; gives a function from settings to its address, and the model behind it."""
    from glip_deploy.serve.app import create_app

    servers = []

    def start(settings, model=None, source=None):
        app = create_app(settings, {"tiny": model or Model("tiny", detector)}, source)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws_max_size=settings.max_bytes + 65_536))
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        until = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        return f"ws://127.0.0.1:{port}/v1/live"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def address(running, tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "one.png"
    Image.fromarray(picture(5)).save(source)
    shown = SharedSource(str(source))
    shown.check()
    return running(Settings(max_bytes=100_000, max_characters=500), source=shown)


class Client:
    def __init__(self, socket):
        self.socket = socket

    def say(self, picture=None, **message):
        self.socket.send(json.dumps(message) if picture is None else pack(message, picture))

    def hear(self, kind):
        """The next message of a kind."""
        while True:
            message = self.socket.recv(timeout=30)
            header, _ = unpack(message) if isinstance(message, bytes) else (json.loads(message), b"")
            if header["type"] == kind:
                return header
            assert header["type"] in ("prompt", "result", "source", "dropped"), header


@pytest.fixture
def client(address):
    with connect(address) as socket:
        opened = Client(socket)
        opened.say(type="hello")
        opened.welcome = opened.hear("welcome")
        yield opened


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIDE, 96, 3), np.uint8)


def png(seed):
    written = io.BytesIO()
    Image.fromarray(picture(seed)).save(written, "PNG")
    return written.getvalue()


def test_a_message_with_a_picture_is_read_as_it_was_written():
    header, data = unpack(pack({"type": "frame", "name": "Zoë"}, b"\xff\xd8\x00"))
    assert (header, data) == ({"type": "frame", "name": "Zoë"}, b"\xff\xd8\x00")
    for broken in (b"", b"\x00\x00\x00", b"\x00\x00\x00\x09{}", b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x01{"):
        with pytest.raises(OptionError):
            unpack(broken)


def test_the_server_says_what_it_has(client):
    assert client.welcome == {
        "type": "welcome", "models": ["tiny"], "model": "tiny", "source": {"name": "one.png"}, "track": False,
        "max_bytes": 100_000, "shortest_side": SIDE, "longest_side": 1333,
    }  # fmt: skip


def test_a_prompt_is_described(client, detector):
    client.say(type="prompt", id=4, prompt=["dog", "red apple"], threshold=0.1)
    told = client.hear("prompt")
    assert (told["id"], told["phrases"], told["prompts"]) == (4, ["dog", "red apple"], 1)
    assert told["colors"] == ["#ff385c", "#00c2a8"]
    assert [token["text"] for token in told["tokens"]] == detector.bundle.tokenizer().encode("dog. red apple").tokens
    scoring = [token["class"] for token in told["tokens"]]
    assert scoring[1] == 0
    assert scoring[-2] == 1
    assert scoring[0] is scoring[-1] is None


def test_a_frame_is_answered_as_the_detector_does(client, detector):
    client.say(type="prompt", id=1, prompt="dog. cat", threshold=0.06, thresholds={"CAT": 0.08, "unknown": 0.9})
    client.hear("prompt")
    client.say(png(1), type="frame", frame=17)
    found = client.hear("result")
    expected = detector.detect(picture(1), "dog. cat", {"dog": 0.06, "cat": 0.08}, color="rgb")
    assert len(expected) > 0
    assert found["detections"] == json.loads(json.dumps(expected.to_dicts()))
    assert found["classes"] == expected.labels.tolist()
    assert (found["frame"], found["prompt"], found["width"], found["height"]) == (17, 1, 96, SIDE)
    assert set(found["ms"]) == {"wait", "decode", "queue", "resize and canvas", "image branch", "threshold and NMS"}
    assert all(0 <= value < 60_000 for value in found["ms"].values())


def test_a_still_picture_is_asked_again_for_each_prompt_and_threshold(client):
    client.say(png(1), type="frame", frame=3, still=True)
    client.say(type="prompt", id=1, prompt="dog", threshold=0.06)
    first = client.hear("result")
    client.say(type="thresholds", threshold=1.0, thresholds={})
    second = client.hear("result")
    client.say(type="prompt", id=2, prompt="cat", threshold=0.06)
    third = client.hear("result")
    assert [one["frame"] for one in (first, second, third)] == [3, 3, 3]
    assert [one["prompt"] for one in (first, second, third)] == [1, 1, 2]
    assert len(first["detections"]) > 0
    assert second["detections"] == []
    assert {one["label"] for one in third["detections"]} == {"cat"}


def test_the_servers_own_source_comes_with_its_frames(client, detector):
    client.say(type="prompt", id=1, prompt="dog", threshold=0.06)
    client.hear("prompt")
    client.say(type="source", source="server")
    while True:
        header, jpeg = unpack(client.socket.recv(timeout=30))
        client.say(type="ack", frame=header["frame"])
        if header["prompt"] == 1:
            break
    assert header["source"] == "one.png", "the name, not where the file is"
    assert Image.open(io.BytesIO(jpeg)).size == (96, SIDE)
    expected = detector.detect(picture(5), "dog", 0.06, color="rgb")
    np.testing.assert_allclose(
        [one["score"] for one in header["detections"]], expected.scores, atol=1e-6
    )  # a head of its own, so not bit for bit


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("{", "a message is not JSON"),
        ("[1]", "a message is [1]; send an object with a type"),
        ('{"type": "sing"}', "a message has the type 'sing'; legal is prompt, thresholds, ack, source, model or frame"),
        ('{"type": "model", "model": "huge"}', "there is no model 'huge' here; choose tiny"),
        ('{"type": "thresholds", "threshold": 2}', "is 2; it must be a number in [0, 1], for example 0.5"),
        ('{"type": "thresholds", "thresholds": [1]}', "thresholds are [1]; give an object with a number for each"),
        ('{"type": "prompt", "id": 1, "prompt": 7}', "the prompt is 7; give a text or a list of names"),
        ('{"type": "prompt", "id": 1, "prompt": "\\ud800 dog"}', "which is not a character; write it in UTF-8"),
        ('{"type": "prompt", "id": 1, "prompt": [null]}', "the prompt is [None]; give a text or a list of names"),
        (json.dumps({"type": "prompt", "id": 1, "prompt": "x" * 501}), "the prompt has 501 characters, at most 500"),
        (b"\x00\x00", "a binary message of 2 bytes does not hold the header"),
        (pack({"type": "frame"}, b""), "a picture came with {'type': 'frame'}; its header is a frame with a number"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_answered_in_words_and_the_connection_lives_on(client, message, words):
    client.socket.send(message)
    assert words in client.hear("error")["message"]
    client.say(type="prompt", id=2, prompt="dog")
    assert client.hear("prompt")["id"] == 2


@pytest.mark.parametrize(("data", "words"), [(b"", "is empty (0 bytes)"), (b"no picture", "convert it to JPEG or PNG")])
def test_a_picture_that_is_none_is_an_error_about_that_frame(client, data, words):
    client.say(type="prompt", id=1, prompt="dog")
    client.hear("prompt")
    client.say(data, type="frame", frame=5)
    error = client.hear("error")
    assert (error["about"], error["id"]) == ("frame", 5)
    assert words in error["message"]
    client.say(png(2), type="frame", frame=6)
    assert client.hear("result")["frame"] == 6


def test_a_prompt_that_is_wrong_leaves_the_one_before(client):
    with pytest.raises(GlipError) as wrong:
        from glip_deploy.prompts.syntax import mark

        mark("a [dog")
    client.say(type="prompt", id=1, prompt="dog", threshold=0.06)
    client.hear("prompt")
    client.say(type="prompt", id=2, prompt="a [dog", threshold=0.06)
    error = client.hear("error")
    assert (error["about"], error["id"], error["message"]) == ("prompt", 2, str(wrong.value))
    client.say(png(1), type="frame", frame=1)
    assert client.hear("result")["prompt"] == 1


def test_a_message_that_is_too_large_ends_the_connection_alone(client, address):
    client.say(bytes(300_000), type="frame", frame=1)
    with pytest.raises(websockets.ConnectionClosed) as closed:
        client.hear("result")
    assert closed.value.rcvd.code == 1009
    with connect(address) as socket:
        other = Client(socket)
        other.say(type="hello")
        assert other.hear("welcome")["model"] == "tiny"


@pytest.mark.parametrize("hello", ["{}", '{"type": "hello", "token": "open-barley"}', '{"type": "hello", "token": 7}'])
def test_without_the_token_nobody_is_let_in(running, hello):
    address = running(Settings(token="open-sesame"))
    with connect(address) as socket:
        socket.send(hello)
        error = json.loads(socket.recv(timeout=30))
        assert (error["about"], error["token"]) == ("hello", True)
        with pytest.raises(websockets.ConnectionClosed):
            socket.recv(timeout=30)
    with connect(address) as socket:
        socket.send(json.dumps({"type": "hello", "token": "open-sesame"}))
        assert json.loads(socket.recv(timeout=30))["type"] == "welcome"


class Slow(Model):
    """A model that takes its time, and counts."""

    def __init__(self, detector):
        super().__init__("slow", detector)
        self.encoded, self.looked = 0, []

    async def encode(self, text):
        self.encoded += 1
        await asyncio.sleep(0.2)
        return await super().encode(text)

    async def detect_prompts(self, image, prompts, thresholds):
        self.looked.append(int(image[0, 0, 0]))
        await asyncio.sleep(0.3)
        return await super().detect_prompts(image, prompts, thresholds)


@pytest.fixture
def slow(running, detector):
    model = Slow(detector)
    with connect(running(Settings(), model)) as socket:
        opened = Client(socket)
        opened.say(type="hello")
        opened.hear("welcome")
        yield opened, model


def test_of_the_frames_that_wait_the_newest_stays(slow):
    client, model = slow
    client.say(type="prompt", id=1, prompt="dog")
    client.hear("prompt")
    for frame in range(1, 7):
        client.say(png(frame), type="frame", frame=frame)
        time.sleep(0.02)
    first, second = client.hear("result"), client.hear("result")
    assert (first["frame"], second["frame"]) == (1, 6)
    assert second["dropped"] == 4
    assert model.looked == [int(picture(seed)[0, 0, 0]) for seed in (1, 6)]


def test_frames_go_on_with_the_prompt_before_and_then_with_the_newest(slow, monkeypatch):
    monkeypatch.setattr("glip_deploy.serve.live._GRACE_S", 30.0)  # however slow the machine is
    client, model = slow
    client.say(type="prompt", id=1, prompt="dog", threshold=0.06)
    client.hear("prompt")
    client.say(png(1), type="frame", frame=1)
    until = time.monotonic() + 30
    while not model.looked:  # once it is taken up, the prompts that follow do not hold it
        assert time.monotonic() < until
        time.sleep(0.01)
    for id, prompt in ((2, "d"), (3, "do"), (4, "cat")):
        client.say(type="prompt", id=id, prompt=prompt, threshold=0.06)
    client.say(png(2), type="frame", frame=2)
    first, second = client.hear("result"), client.hear("result")
    assert (first["frame"], first["prompt"]) == (1, 1)
    assert (second["frame"], second["prompt"]) == (2, 4)
    assert model.encoded <= 3, "what was typed over before its turn came is not encoded"


class Mover(Model):
    """Finds a box 20 pixels wide where the picture says that it is."""

    async def detect_prompts(self, image, prompts, thresholds):
        left = 256.0 * image[0, 0, 0] + image[0, 0, 1]
        box = np.array([[left, 0, left + 20, 20]], np.float32)
        found = Detections(box, np.array([0.9], np.float32), np.zeros(1, np.int64), ["dog"])
        return [found for _ in prompts], {}


@pytest.fixture
def followed(running, detector):
    """Opens connections to a server that follows objects."""
    pytest.importorskip("trackers", reason="the package trackers is not installed (extra track)")
    address = running(Settings(track=True), Mover("mover", detector))
    with contextlib.ExitStack() as stack:

        def opened():
            client = Client(stack.enter_context(connect(address)))
            client.say(type="hello")
            assert client.hear("welcome")["track"] is True
            client.say(type="prompt", id=1, prompt="dog")
            client.hear("prompt")
            return client

        yield opened


def box_at(left):
    image = np.zeros((8, 8, 3), np.uint8)
    image[0, 0] = left // 256, left % 256, 0
    written = io.BytesIO()
    Image.fromarray(image).save(written, "PNG")
    return written.getvalue()


def tracked(client, frame, left, **more):
    client.say(box_at(left), type="frame", frame=frame, **more)
    (found,) = client.hear("result")["detections"]
    return found.get("track")


def test_each_visitor_has_ids_of_his_own_also_after_a_gap(followed, monkeypatch):
    """The box moves by 100 pixels a second, so between far frames it does not overlap with itself."""
    client, other = followed(), followed()
    began = now = time.monotonic()
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now))  # frames come exactly then
    ids = []
    for frame, pause in enumerate([0.0, *[0.1] * 8, 0.5, 0.1, 0.5]):
        now += pause
        ids.append(tracked(client, frame, round(100 * (now - began))))
    assert ids == [None, *[1] * 11]
    assert [tracked(other, frame, 100) for frame in range(3)] == [None, 1, 1]


def test_a_still_picture_has_no_ids_and_disturbs_none(followed):
    client = followed()
    assert [tracked(client, frame, 100) for frame in range(3)] == [None, 1, 1]
    assert [tracked(client, frame, 100, still=True) for frame in range(3, 6)] == [None, None, None]
    assert tracked(client, 6, 100) == 1


def test_ids_go_on_in_another_stream_but_not_its_objects(followed):
    client = followed()
    assert [tracked(client, frame, 100) for frame in range(2)] == [None, 1]
    client.say(type="source", source=None)  # as the page says before it turns to another camera
    assert [tracked(client, frame, 100) for frame in range(2, 4)] == [None, 2]
