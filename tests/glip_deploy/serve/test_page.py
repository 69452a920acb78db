"""The live page in a real browser: Chromium, with a camera that films a scene of GLIP-nano's demo.

The picture that README shows is taken by

    GLIP_SCREENSHOT=docs/deploy/media/page.jpg pytest tests/glip_deploy/serve/test_page.py -k readme
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from parity_data import ROOT

from glip_deploy import Detector, load_image
from glip_deploy.errors import GlipError
from glip_deploy.prompts.syntax import mark
from glip_deploy.results.detections import Detections

pytest.importorskip("fastapi", reason="FastAPI is not installed (extra serve)")
pytest.importorskip("av", reason="PyAV is not installed (extra video)")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra dev)")
websockets = pytest.importorskip("websockets.sync.client", reason="websockets is not installed (extra serve)")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian package chromium)")

MEDIA = ROOT / "examples" / "nano" / "media"
SCENE, MOVING = MEDIA / "scene.jpg", MEDIA / "moving.mp4"
FPS = 3
SIDE = 224  # the shortest side that GLIP-nano was trained with
THINGS = ["dog", "red apple", "bicycle", "guitar", "penguin", "sunflower", "bus", "traffic light", "backpack"]
PROMPT = ". ".join(THINGS)
ANSWERED = "state.shown?.result?.prompt === state.promptId"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(bundle, *options, log, port=None):
    """glip-serve as a process of its own; gives its address."""
    port = port or free_port()
    command = [sys.executable, "-m", "glip_deploy.serve.command", "--model", str(bundle), "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--shortest-side", str(SIDE), *options], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT
        )
        try:
            address = f"http://127.0.0.1:{port}/"
            until = time.monotonic() + 90
            while True:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, f"glip-serve is not ready: {log.read_text()}"
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}readyz", timeout=5) as answer:
                    if answer.status == 200:
                        break
                time.sleep(0.1)
            yield address
            assert process.poll() is None, f"glip-serve ended: {log.read_text()}"
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def unhurried(tmp_path_factory):
    """The demo's video, of a few frames a second: those who watch it leave the processors to others."""
    from glip_deploy.video.open import open_source
    from glip_deploy.video.video_out import VideoSink

    path = tmp_path_factory.mktemp("video") / "unhurried.mp4"
    with open_source(str(MOVING)) as frames, VideoSink(path, fps=FPS) as sink:
        for frame in frames:
            sink.write(frame, Detections.empty())
    return path


@pytest.fixture(scope="module")
def server(nano_bundle, unhurried, tmp_path_factory):
    """glip-serve with the demo's video as its own source."""
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with serving(nano_bundle, "--source", str(unhurried), log=log) as address:
        yield address


@pytest.fixture(scope="module")
def detector(nano_bundle):
    with Detector.open(nano_bundle, shortest_side=SIDE, cache_dir=None) as opened:
        yield opened


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium whose camera films the demo's scene."""
    film = tmp_path_factory.mktemp("camera") / "scene.mjpeg"
    film.write_bytes(2 * SCENE.read_bytes())
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-video-capture={film}",
            ],
        )
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page for a visitor of its own. Fetching anything elsewhere, or a complaint on the console, fails."""
    visitors, wrong = [], []

    def opened(address=server, **options):
        context = browser.new_context(viewport={"width": 1280, "height": 860}, **options)
        visitors.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        origin = address.split("#", maxsplit=1)[0]
        own = (origin, "blob:")
        page.on("request", lambda asked: None if asked.url.startswith(own) else wrong.append(asked.url))
        page.goto(address)
        return page

    yield opened
    for context in visitors:
        context.close()  # may be closed already
    assert not wrong


def log_of(page):
    return page.evaluate("window.glip.state.log")


def results(page, kind="result"):
    return [entry for entry in log_of(page) if entry["kind"] == kind]


def wait_for(page, expression, **values):
    page.wait_for_function(f"(values) => {{ const state = window.glip.state; return {expression}; }}", arg=values)


def ask(page, prompt):
    """Type a prompt; returns once boxes for it are drawn."""
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    wait_for(page, f"{ANSWERED} && state.prompts.get(state.promptId).prompt === values.prompt", prompt=prompt)


def phrases(page):
    return page.eval_on_selector_all("#phrases li", "rows => rows.map(row => row.dataset.phrase)")


def shares(box, other):
    """Intersection over union of two boxes, each xmin, ymin, xmax, ymax."""
    left, top = np.maximum(box[:2], other[:2])
    right, bottom = np.minimum(box[2:], other[2:])
    inside = max(0.0, right - left) * max(0.0, bottom - top)
    area = [(one[2] - one[0]) * (one[3] - one[1]) for one in (box, other)]
    return inside / (sum(area) - inside)


def corners(one):
    return np.array([one["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")])


def check_places(found, expected, least):
    """Every expected detection is among those found, with its label, at its place."""
    for one in expected:
        places = [shares(corners(other), one.box) for other in found if other["label"] == one.phrase]
        assert max(places, default=0) > least, (one, found)


def test_the_page_opens_on_the_servers_video(visit):
    page = visit()
    wait_for(page, "state.shown !== null")
    assert page.text_content("#status") == "Connected: glip_nano"
    assert page.get_attribute("#use-server", "aria-pressed") == "true"
    ask(page, "dog. red apple. pizza")
    wait_for(page, "state.shown.result.detections.length > 0")
    assert page.get_attribute("#stage", "data-source") == "server"
    assert {label for entry in results(page)[-3:] for label in entry["labels"]} <= {"dog", "red apple", "pizza"}
    wait_for(page, "parseFloat(document.getElementById('fps').textContent) > 1")
    wait_for(page, "document.getElementById('stages').textContent.includes('NMS')")
    stages = page.text_content("#stages")
    for stage in ("wait", "resize and canvas", "image branch", "threshold and NMS", "draw (browser)"):
        assert stage in stages
    assert page.text_content("#token-count").startswith("8 tokens, of 256 a prompt")


def test_boxes_of_the_servers_video_are_the_detectors(visit, detector, unhurried):
    from glip_deploy.video.open import open_source

    page = visit()
    ask(page, "dog. red apple. pizza. owl")
    shown = page.evaluate("window.glip.json()")
    with open_source(str(unhurried)) as frames:
        frame = next(one for one in frames if one.index == shown["frame"])
    expected = detector.detect(frame.image, "dog. red apple. pizza. owl", 0.5, color="rgb")
    assert (shown["width"], shown["height"]) == (432, 336)
    assert [one["label"] for one in shown["detections"]] == expected.phrases
    np.testing.assert_allclose([corners(one) for one in shown["detections"]], expected.boxes, atol=0.1)
    np.testing.assert_allclose([one["score"] for one in shown["detections"]], expected.scores, atol=1e-3)


def test_the_camera_streams_and_boxes_are_where_the_things_are(visit, detector):
    page = visit()
    page.click("#use-camera")
    ask(page, PROMPT)
    wait_for(page, "state.source === 'camera' && state.frames >= 5")
    found = page.evaluate("window.glip.json()")
    assert found["source"] == "camera"
    expected = detector.detect(load_image(SCENE), PROMPT, 0.6, color="rgb")
    assert len(expected) >= 9
    across = found["width"] / 576
    assert found["height"] == pytest.approx(448 * across, abs=1)
    for one in found["detections"]:
        one["box"] = {side: value / across for side, value in one["box"].items()}
    check_places(found["detections"], expected, 0.8)
    assert "network" in page.text_content("#stages")


def test_boxes_are_drawn_in_the_color_of_their_class(visit):
    page = visit()
    page.set_input_files("#file", SCENE)
    ask(page, "dog. red apple")
    seen = page.evaluate(
        """() => {
            const { state, above } = window.glip;
            const canvas = document.getElementById("canvas");
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return above().map(({ box, color, label }) => {
                const x = Math.round(box.xmin * canvas.width / state.shown.size.width);
                const y = Math.round((box.ymin + box.ymax) / 2 * canvas.height / state.shown.size.height);
                const at = 4 * (y * canvas.width + x);
                const pixel = [...data.slice(at, at + 3)];
                return { label, color, pixel: "#" + pixel.map((one) => one.toString(16).padStart(2, "0")).join("") };
            });
        }"""
    )
    assert {(one["label"], one["color"]) for one in seen} == {("dog", "#ff385c"), ("red apple", "#00c2a8")}
    for one in seen:
        assert one["pixel"] == one["color"], one


@pytest.mark.parametrize("source", ["server", "camera"])
def test_a_prompt_typed_in_mid_stream_changes_the_labels_within_two_frames(visit, source):
    page = visit()
    page.click(f"#use-{source}")
    ask(page, "dog. red apple")
    for prompt in ("guitar. penguin. bus", "sunflower. dog", "penguin. red apple. owl. key"):
        before = page.evaluate("window.glip.state.frames")
        wait_for(page, "state.frames > values.before + 2", before=before)
        page.fill("#prompt", "")
        page.type("#prompt", prompt)  # key by key
        page.press("#prompt", "Enter")
        wait_for(page, ANSWERED)
        id = page.evaluate("window.glip.state.promptId")
        log = log_of(page)
        sent = next(at for at, entry in enumerate(log) if entry["kind"] == "prompt sent" and entry["id"] == id)
        first = next(at for at, entry in enumerate(log) if entry["kind"] == "result" and entry["prompt"] == id)
        old = [entry for entry in log[sent:first] if entry["kind"] == "result"]
        assert len(old) <= 2, log[sent : first + 1]
        assert set(log[first]["labels"]) <= set(prompt.split(". "))
        assert phrases(page) == prompt.split(". ")


def test_an_error_in_a_prompt_is_shown_in_the_words_of_the_command_line_and_the_stream_goes_on(visit):
    page = visit()
    ask(page, "dog. red apple")
    with pytest.raises(GlipError) as error:
        mark("a [dog. red apple")
    page.fill("#prompt", "a [dog. red apple")
    page.wait_for_selector("#prompt-error:visible")
    assert page.text_content("#prompt-error") == str(error.value)
    assert page.get_attribute("#prompt", "aria-invalid") == "true"
    before = page.evaluate("window.glip.state.frames")
    wait_for(page, "state.frames > values.before + 3", before=before)
    assert set(results(page)[-1]["labels"]) <= {"dog", "red apple"}, "frames go on with the prompt before"
    ask(page, "pizza")
    assert page.is_hidden("#prompt-error")
    assert page.get_attribute("#prompt", "aria-invalid") is None


def test_two_visitors_do_not_disturb_each_other(visit):
    one, other = visit(), visit()
    ask(one, "dog. red apple")
    ask(other, "penguin. bus")
    for _ in range(2):
        starts = [page.evaluate("window.glip.state.frames") for page in (one, other)]
        for page, start in zip((one, other), starts, strict=True):
            wait_for(page, "state.frames > values.start + 5", start=start)
        assert {label for entry in results(one)[-5:] for label in entry["labels"]} <= {"dog", "red apple"}
        assert {label for entry in results(other)[-5:] for label in entry["labels"]} <= {"penguin", "bus"}
        one.click("#use-camera")  # the second time round, one of them watches something else
        ask(one, "dog. red apple")
    other.context.close()
    start = one.evaluate("window.glip.state.frames")
    wait_for(one, "state.frames > values.start + 5", start=start)


def test_a_visitor_who_takes_nothing_stalls_nobody(visit, server):
    page = visit()
    ask(page, "dog. red apple")
    with websockets.connect(f"{server.replace('http', 'ws')}v1/live") as slow:
        for message in (
            {"type": "hello"},
            {"type": "prompt", "id": 1, "prompt": "bus"},
            {"type": "source", "source": "server"},
        ):
            slow.send(json.dumps(message))
        start = page.evaluate("window.glip.state.frames")
        wait_for(page, "state.frames > values.start + 10", start=start)
        received = 0
        with contextlib.suppress(TimeoutError):
            while True:
                received += isinstance(slow.recv(timeout=0.5), bytes)
        assert received == 2, "what is not acknowledged is not piled up"


def test_a_dropped_picture_gives_the_json_of_glip_detect(visit, nano_bundle, tmp_path):
    page = visit()
    page.set_input_files("#file", SCENE)
    ask(page, PROMPT)
    lines = tmp_path / "lines.jsonl"
    command = [sys.executable, "-m", "glip_deploy.cli.detect", "--model", str(nano_bundle), "--prompt", PROMPT]
    subprocess.run(
        [*command, "--source", str(SCENE), "--shortest-side", str(SIDE), "--json", str(lines)], check=True, cwd=ROOT
    )
    expected = json.loads(lines.read_text())
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy")
    wait_for(page, "document.getElementById('done').textContent === 'Copied'")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied["prompt"] == PROMPT
    assert [copied[key] for key in ("source", "frame", "width", "height")] == ["scene.jpg", 0, 576, 448]
    assert [one["label"] for one in copied["detections"]] == [one["label"] for one in expected["detections"]]
    for one, other in zip(copied["detections"], expected["detections"], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)
        np.testing.assert_allclose(corners(one), corners(other), atol=0.1)


def test_sliders_choose_what_is_shown_also_on_a_picture_that_stays(visit):
    page = visit()
    page.set_input_files("#file", SCENE)
    ask(page, PROMPT)
    scores = [one["score"] for one in page.evaluate("window.glip.json()")["detections"]]
    assert min(scores) > 0.5
    page.fill("#all", "0.75")
    fewer = page.evaluate("window.glip.json()")["detections"]
    assert [one["score"] for one in fewer] == [score for score in scores if score > 0.75]
    page.fill("#all", "0.3")
    more = page.evaluate("window.glip.json()")["detections"]
    assert len(more) >= len(scores)
    page.focus("#phrases li[data-phrase='dog'] input")
    page.keyboard.press("End")
    assert page.text_content("#phrases li[data-phrase='dog'] output") == "0.95"
    assert [one for one in page.evaluate("window.glip.json()")["detections"] if one["label"] == "dog"] == []


def test_a_class_list_and_a_caption_are_read_as_such(visit):
    page = visit()
    page.set_input_files("#file", SCENE)
    page.check("input[name='form'][value='list']")
    page.fill("#prompt", "dog, red apple\nbus")
    wait_for(page, f"{ANSWERED} && state.prompts.get(state.promptId).phrases.length === 3")
    assert phrases(page) == [
        "dog",
        "red apple",
        "bus",
    ]
    page.check("input[name='form'][value='auto']")
    ask(page, "a [dog] beside a [red apple]")
    assert phrases(page) == [
        "dog",
        "red apple",
    ]
    page.click("#tokens summary")
    assert "beside" in page.text_content("#token-list")


def test_a_file_that_is_no_picture_is_refused_in_words(visit, tmp_path):
    wrong = tmp_path / "picture.jpg"
    wrong.write_text("this is no picture")
    page = visit()
    ask(page, "dog")
    page.set_input_files("#file", wrong)
    page.wait_for_selector("#message:visible")
    assert "convert it to JPEG or PNG" in page.text_content("#message")
    page.click("#use-server")
    wait_for(page, "state.source === 'server' && state.frames > 2")
    assert page.is_hidden("#message")


def test_a_picture_that_only_the_server_can_read_still_has_results(visit, tmp_path):
    from PIL import Image

    Image.open(SCENE).save(tmp_path / "scene.tiff")
    page = visit()
    page.set_input_files("#file", tmp_path / "scene.tiff")
    ask(page, PROMPT)
    assert "the browser cannot show this kind of picture" in page.text_content("#message")
    assert len(page.evaluate("window.glip.json()")["detections"]) >= 9


def test_a_camera_that_vanishes_is_said_and_the_page_lives_on(visit):
    page = visit()
    page.click("#use-camera")
    ask(page, "dog")
    page.evaluate("document.getElementById('video').srcObject.getVideoTracks()[0].dispatchEvent(new Event('ended'))")
    page.wait_for_selector("#message:visible")
    assert "the camera was disconnected" in page.text_content("#message")
    page.click("#use-camera")
    wait_for(page, "state.source === 'camera' && state.frames > 2")
    assert page.is_hidden("#message")


def test_a_camera_that_is_not_allowed_is_said(visit):
    page = visit()
    page.evaluate(
        "() => { navigator.mediaDevices.getUserMedia ="
        " () => Promise.reject(new DOMException('no', 'NotAllowedError')); }"
    )
    page.click("#use-camera")
    page.wait_for_selector("#message:visible")
    assert "the browser may not use the camera; allow it" in page.text_content("#message")


def test_a_pause_stops_the_frames(visit):
    page = visit()
    ask(page, "dog")
    page.click("#pause")
    page.wait_for_timeout(500)
    before = page.evaluate("window.glip.state.frames")
    page.wait_for_timeout(500)
    assert page.evaluate("window.glip.state.frames") == before
    page.click("#pause")
    wait_for(page, "state.frames > values.before + 2", before=before)


def test_a_snapshot_is_a_picture_with_boxes(visit):
    from PIL import Image

    page = visit()
    page.set_input_files("#file", SCENE)
    ask(page, PROMPT)
    with page.expect_download() as waiting:
        page.click("#snapshot")
    assert waiting.value.suggested_filename.endswith(".png")
    picture = Image.open(waiting.value.path()).convert("RGB")
    assert picture.size == (960, 747)
    plain = np.asarray(Image.open(SCENE).convert("RGB").resize(picture.size), np.int16)
    changed = (np.abs(np.asarray(picture, np.int16) - plain).max(axis=2) > 60).mean()
    assert 0.02 < changed < 0.4, "boxes and tags, and the picture under them"


def tracks_of(page):
    """Label and id of what is shown, each once; those that have no id yet are left out."""
    found = page.evaluate("window.glip.json()")["detections"]
    return {(one["label"], one["track"]) for one in found if "track" in one}


def test_objects_have_ids_that_stay_with_them(nano_bundle, visit, tmp_path):
    pytest.importorskip("trackers", reason="the package trackers is not installed (extra track)")
    with serving(nano_bundle, "--source", str(MOVING), "--track", log=tmp_path / "log.txt") as address:
        one, other = visit(address), visit(address)
        for page in (one, other):
            page.evaluate(
                """() => {
                    window.written = [];
                    const write = CanvasRenderingContext2D.prototype.fillText;
                    CanvasRenderingContext2D.prototype.fillText = function (text, ...more) {
                        window.written.push(text);
                        return write.call(this, text, ...more);
                    };
                }"""
            )
        ask(one, "dog. red apple. pizza. owl")
        wait_for(one, "state.frames > 4 && window.glip.json().detections.some(({ track }) => track !== undefined)")
        assert "tracking" in one.evaluate("Object.keys(window.glip.state.shown.result.ms)")
        other.click("#use-camera")
        ask(other, PROMPT)
        start = other.evaluate("window.glip.state.frames")
        wait_for(other, "state.frames > values.start + 3", start=start)
        seen = tracks_of(other)
        assert {"dog", "red apple", "bus"} <= {label for label, _ in seen}
        assert min(track for _, track in seen) <= len(seen), "ids of this visitor's own"
        start = other.evaluate("window.glip.state.frames")
        wait_for(other, "state.frames > values.start + 5", start=start)
        again = tracks_of(other)
        assert {(label, track) for label, track in seen if label in ("dog", "bus")} <= again, "the scene stands still"
        written = other.evaluate("window.written")
        for label, track in seen:
            assert any(text.startswith(f"{label} #{track} 0.") for text in written), (label, track)
        other.set_input_files("#file", SCENE)
        wait_for(other, f"state.source === 'picture' && {ANSWERED}")
        shown = other.evaluate("window.glip.json()")["detections"]
        assert len(shown) >= 9 and not any("track" in one for one in shown)
        for page in (one, other):
            page.context.close()


def test_a_token_is_asked_for(nano_bundle, visit, tmp_path):
    with serving(nano_bundle, "--token", "open-sesame", log=tmp_path / "log.txt") as address:
        page = visit(address)
        page.wait_for_selector("#token-form:visible")
        assert "this server wants a token" in page.text_content("#message")
        page.fill("#token", "open-barley")
        page.press("#token", "Enter")
        wait_for(page, "document.getElementById('message').textContent.includes('the token is wrong')")
        page.fill("#token", "open-sesame")
        page.press("#token", "Enter")
        wait_for(page, "state.welcome !== null")
        assert page.is_hidden("#token-form")
        assert page.is_hidden("#use-server"), "this one has no source of its own"
        again = visit(f"{address}#token=open-sesame&prompt=dog")
        wait_for(again, "state.prompts.size > 0")
        assert again.url == address, "the token does not stay in the address"
        assert again.input_value("#prompt") == "dog"
        for one in (page, again):
            one.context.close()


def test_a_page_from_elsewhere_may_not_connect(server):
    with pytest.raises(websockets.InvalidStatus) as refused:
        websockets.connect(f"{server.replace('http', 'ws')}v1/live", origin="http://evil.example")
    assert refused.value.response.status_code == 403


def test_the_page_may_load_nothing_from_elsewhere(server):
    for name in ("", "app.js", "style.css", "icon.svg", "camera.js", "connection.js", "drawing.js"):
        with urllib.request.urlopen(server + name) as answer:
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self';" in policy
            assert "unsafe" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
    with pytest.raises(urllib.error.HTTPError) as missing:
        urllib.request.urlopen(f"{server}../settings.py")
    assert missing.value.code == 404


def test_it_fits_on_a_phone_and_follows_dark_and_light(visit):
    backgrounds = []
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme, has_touch=True)
        page.set_viewport_size({"width": 360, "height": 740})
        ask(page, PROMPT)
        wide = page.evaluate(
            "() => [...document.querySelectorAll('*')].filter((one) => one.getBoundingClientRect().right > 361)"
            ".map((one) => one.outerHTML.slice(0, 80))"
        )
        assert wide == [], "wider than the phone"
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == ["rgb(245, 246, 248)", "rgb(16, 18, 21)"]


def test_it_is_used_by_keyboard_and_read_aloud(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    wait_for(page, "document.activeElement.id === 'prompt'")
    page.keyboard.type("dog. red apple")
    page.keyboard.press("Enter")
    wait_for(page, f"{ANSWERED} && state.shown.result.detections.length > 0")
    wait_for(page, "document.getElementById('found').textContent.includes('×')")
    assert page.get_attribute("#found", "aria-live") == "polite"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")].filter((one) =>
            !one.hidden && !one.labels?.length && !one.textContent.trim() && !one.ariaLabel).map((one) => one.id)"""
    )
    assert nameless == []
    page.focus("#pause")
    page.keyboard.press("Space")
    assert page.get_attribute("#pause", "aria-pressed") == "true"


def test_a_server_that_comes_back_is_found_again(nano_bundle, browser, tmp_path):
    context = browser.new_context()
    page = context.new_page()
    port = free_port()
    with serving(nano_bundle, "--source", str(MOVING), log=tmp_path / "one.txt", port=port) as address:
        page.goto(address)
        ask(page, "dog")
    wait_for(page, "document.getElementById('status').textContent.startsWith('Disconnected')")
    with serving(nano_bundle, "--source", str(MOVING), log=tmp_path / "two.txt", port=port):
        wait_for(page, "document.body.dataset.connection === 'open'")
        frames = page.evaluate("window.glip.state.frames")
        wait_for(page, f"state.frames > values.frames + 3 && {ANSWERED}", frames=frames)
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_in_it_is_out_of_reach_for_anybody(visit, scheme):
    """Contrast, names, roles and the like, by the rules of WCAG 2 that a program can check."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed (extra dev)")
    page = visit(color_scheme=scheme)
    ask(page, PROMPT)
    for details in ("#tokens summary", "#json-details summary"):
        page.click(details)
    page.click("#pause")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.skipif("GLIP_SCREENSHOT" not in os.environ, reason="GLIP_SCREENSHOT names no file for README's picture")
def test_picture_for_the_readme(visit):
    from PIL import Image

    page = visit()
    page.set_viewport_size({"width": 1120, "height": 760})
    ask(page, "dog. red apple. pizza. penguin. bus. owl. sunflower. guitar")
    page.fill("#all", "0.55")
    page.set_default_timeout(120_000)
    wait_for(page, "state.frames > 30 && new Set(window.glip.above().map(({ label }) => label)).size >= 5")
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    target = Path(os.environ["GLIP_SCREENSHOT"])
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target, quality=82, optimize=True)
