"""`glip-serve --ray`: the same answers from replicas of Ray Serve, also when one is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="glip-serve needs the extra serve; pip install 'glip-deploy[serve]'")
pytest.importorskip("ray.serve", reason="replicas need the extra ray; pip install 'glip-deploy[ray]'")

from parity_data import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux shows them")
PICTURE = ROOT / "export" / "glip_export" / "data" / "picture.jpg"
SIDE = ("--shortest-side", "128")


def ask(port, prompt, path="/v1/detect"):
    """The answer to a picture and a prompt, as `glip-detect` gives it."""
    import base64

    body = {"image": base64.b64encode(PICTURE.read_bytes()).decode(), "prompt": prompt, "threshold": 0.2}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return {**json.load(answer), "timing": answer.headers["Server-Timing"]}


@pytest.fixture(scope="module")
def service(tiny_bundle, tmp_path_factory):
    """A service with two replicas, ready; its process and its port."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["GLIP_DEPLOY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, "-m", "glip_deploy.serve.command", "--model", str(tiny_bundle), "--port", "0", *SIDE]
    process = subprocess.Popen(
        [*command, "--threads", "1", "--ray", "local", "--replicas", "2"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
    assert found, line + process.stderr.read()
    yield process, int(found[1])
    process.kill()
    process.communicate()


def replicas(process):
    """The processes of the replicas."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_text()
            except OSError:
                continue
            if "ServeReplica:glip-" in line:
                found.append(int(entry.name))
    return found


def test_replicas_answer_as_glip_detect_does(service, tiny_bundle, tmp_path, monkeypatch):
    from glip_deploy.cli import detect

    _, port = service
    lines = tmp_path / "found.jsonl"
    options = ["--threshold", "0.2", "--threads", "1", "--quiet", "--no-cache", *SIDE]
    source = ["--model", str(tiny_bundle), "--source", str(PICTURE), "--json", str(lines)]
    assert detect.main([*source, "--prompt", "person. dog", *options]) == 0
    expected = json.loads(lines.read_text())["detections"]
    assert expected
    for _ in range(3):
        assert ask(port, "person. dog")["detections"] == expected
    names = ["person", "dog", *(f"thing number {number}" for number in range(60))]
    assert ask(port, names)["detections"]  # a list longer than a prompt


def test_a_prompt_goes_to_the_replica_that_has_encoded_it(service):
    _, port = service
    assert "text-branch;" in ask(port, "cat. traffic light")["timing"]
    time.sleep(3)  # Ray Serve tells its routers a moment later
    assert [one for one in range(8) if "text-branch;" in ask(port, "cat. traffic light")["timing"]] == []
    assert "text-branch;" in ask(port, "cat. light")["timing"]


def test_a_killed_replica_costs_no_answer(service):
    process, port = service
    expected = ask(port, "red car. hat")["detections"]
    before = replicas(process)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    for _ in range(4):
        assert ask(port, "red car. hat")["detections"] == expected
    end = time.monotonic() + 300
    while len(set(replicas(process)) - set(before)) == 0:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_bad_prompt_is_refused_in_the_same_words(service):
    _, port = service
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(port, "...")
    assert caught.value.code == 422 and b"prompt" in caught.value.read()


def test_it_ends_in_order(service):
    process, _ = service
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0 and out == "", said
    assert [line for line in said.splitlines() if "the vocabulary lacks words" not in line] == []
    assert replicas(process) == []


def run(*arguments):
    command = [sys.executable, "-m", "glip_deploy.serve.command", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


def test_addresses_and_options(tiny_bundle):
    done = run("--model", str(tiny_bundle), "--port", "0", "--ray", "127.0.0.1:1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "--ray 127.0.0.1:1: nothing answers there" in done.stderr
    done = run("--model", str(tiny_bundle), "--port", "0", "--replicas", "2")
    assert done.returncode == 2 and "--replicas: needs --ray" in done.stderr, done.stderr
