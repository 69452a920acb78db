"""The command line of glip-serve: what it refuses, before a model is loaded, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from PIL import Image

from glip_deploy.errors import OptionError
from glip_deploy.serve.settings import Settings, is_local

pytest.importorskip("fastapi_offline", reason="FastAPI is not installed (extra serve)")

COMMAND = [sys.executable, "-m", "glip_deploy.serve.command"]


def refused(*options):
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("glip-serve: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def without(package, *options):
    code = f"import sys; sys.modules[{package!r}] = None\nfrom glip_deploy.serve.command import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--model", "nowhere", "--port", "0", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def started(tiny_bundle):
    """A server on a free port, and its address."""
    process = subprocess.Popen(
        [*COMMAND, "--model", str(tiny_bundle), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    assert line.startswith("glip-serve: http://127.0.0.1:"), line + process.stderr.read()
    yield process, line.split()[1]
    process.kill()
    process.communicate()


def test_a_port_in_use_is_said_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = refused("--model", "nowhere", "--port", port)
    assert f"port {port} of 127.0.0.1 cannot be used (Address already in use); choose another with --port" in error


def test_other_machines_are_served_with_a_token_only_or_on_purpose():
    error = refused("--model", "nowhere", "--host", "0.0.0.0")
    assert "host 0.0.0.0 can be reached from other machines; add --token TOKEN, or --insecure" in error
    assert Settings(host="0.0.0.0", token="secret").local_only is False
    assert Settings(host="0.0.0.0", insecure=True).local_only is False
    assert Settings().local_only
    with pytest.raises(OptionError, match="the token is empty"):
        Settings(token="")


def test_a_token_that_no_header_can_carry_is_refused(monkeypatch):
    assert "the token has spaces or characters that are not ASCII" in refused("--model", "nowhere", "--token", "a b")
    monkeypatch.setenv("GLIP_SERVE_TOKEN", "")
    assert "the token is empty" in refused("--model", "nowhere")


def test_an_unknown_host_is_said():
    error = refused("--model", "nowhere", "--host", "nowhere.invalid", "--insecure")
    assert "host nowhere.invalid is not known" in error and "give 127.0.0.1 or 0.0.0.0" in error


@pytest.mark.parametrize("package", ["fastapi_offline", "prometheus_client", "python_multipart", "uvicorn"])
def test_without_the_extra_one_line_says_what_to_install(package):
    done = without(package)
    assert done.returncode == 1
    assert done.stderr == f"glip-serve: error: {package} is not installed; pip install 'glip-deploy[serve]'\n"


def test_names_of_this_machine():
    assert all(is_local(name) for name in ("localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"))
    assert not any(is_local(name) for name in ("0.0.0.0", "::", "192.168.0.5", "localhost.evil.example", ""))


def test_a_bundle_that_is_not_there_is_said():
    assert "nowhere" in refused("--model", "nowhere", "--port", "0")


def test_a_source_that_cannot_be_read_is_said_before_a_model_is_opened(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    missing = refused("--model", "nowhere", "--port", "0", "--source", str(tmp_path / "nothing.mp4"))
    assert f"source {tmp_path}/nothing.mp4 does not exist; give a picture, a folder, a glob, a video file" in missing
    pytest.importorskip("av", reason="PyAV is not installed (extra video)")
    assert "text.mp4" in refused("--model", "nowhere", "--port", "0", "--source", str(tmp_path / "text.mp4"))


def test_objects_cannot_be_followed_through_pictures(tmp_path):
    pytest.importorskip("trackers", reason="the package trackers is not installed (extra track)")
    Image.new("RGB", (20, 10)).save(tmp_path / "one.png")
    error = refused("--model", "nowhere", "--port", "0", "--track", "--source", str(tmp_path / "one.png"))
    assert "tracking follows objects through a video, but source" in error
    assert "one.png is a picture; leave it out (--track), or give a video, a camera or a stream" in error


@pytest.mark.parametrize("package", ["trackers", "supervision"])
def test_without_the_extra_track_one_line_says_what_to_install(package):
    done = without(package, "--track")
    assert done.returncode == 1
    advice = f"tracking needs the package {package}, which is not installed; pip install 'glip-deploy[track]'"
    assert done.stderr == f"glip-serve: error: {advice}\n"


def test_two_bundles_of_one_name_are_refused(tiny_bundle, tmp_path):
    (tmp_path / tiny_bundle.name).mkdir()
    error = refused("--model", str(tiny_bundle), "--model", str(tmp_path / tiny_bundle.name))
    assert f"two bundles are called {tiny_bundle.name}; rename the folder of one of them" in error


def test_it_says_that_it_is_ready_and_ends_at_a_signal(started):
    process, address = started
    with urllib.request.urlopen(f"{address}healthz", timeout=60) as answer:
        assert json.load(answer) == {"status": "ok"}
    with urllib.request.urlopen(f"{address}readyz", timeout=60) as answer:
        assert json.load(answer) == {"status": "ready", "models": ["bundle"]}
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == ""


def test_a_name_that_is_not_this_machines_is_refused(started):
    _, address = started
    asked = urllib.request.Request(address, headers={"Host": "evil.example:8000"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(asked, timeout=60)
    assert error.value.code == 421
    assert "this server answers on this machine alone" in json.load(error.value)["detail"]
