"""`glip-serve --ray`: the same answers from replicas, also when one is killed or added, and on a running cluster."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="glip-serve needs the extra serve; pip install 'glip-deploy[serve]'")
pytest.importorskip("ray.serve", reason="replicas need the extra ray; pip install 'glip-deploy[ray]'")

from parity_data import ROOT
from processes import descendants, wait_for
from ray_processes import running_cluster, short_folder, with_folder
from selection import SLOW, slow

from glip_deploy.bundle.manifest import Bundle
from glip_deploy.serve.messages import pack, unpack
from glip_deploy.serve.models import Found
from glip_deploy.serve.replicas import RayModel

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
    process = start(
        tiny_bundle,
        tmp_path_factory.mktemp("run"),
        "--threads",
        "1",
        "--ray",
        "local",
        "--replicas",
        "2",
        "--source",
        str(PICTURE),
    )
    yield process, port_of(process)
    process.kill()
    process.communicate()


def start(bundle, folder, *options, port=0):
    """Start a service on a port, or one that is free."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLIP_DEPLOY_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "glip_deploy.serve.command", "--model", str(bundle), "--port", str(port), *SIDE]
    return subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def port_of(process):
    """The port of a service, once it is ready."""
    line = process.stderr.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
    assert found, line + process.stderr.read()
    return int(found[1])


def command_line(pid):
    """The command line of a process, as it shows itself; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def replicas(process):
    """The processes of a service's replicas."""
    return [pid for pid in descendants(process.pid) if "ServeReplica:glip-" in command_line(pid)]


@pytest.fixture(scope="module")
def expected(tiny_bundle, tmp_path_factory):
    """What `glip-detect` finds for "person. dog"."""
    from glip_deploy.cli import detect

    lines = tmp_path_factory.mktemp("expected") / "found.jsonl"
    options = ["--threshold", "0.2", "--threads", "1", "--quiet", "--no-cache", *SIDE]
    source = ["--model", str(tiny_bundle), "--source", str(PICTURE), "--json", str(lines)]
    assert detect.main([*source, "--prompt", "person. dog", *options]) == 0
    found = json.loads(lines.read_text())["detections"]
    assert found
    return found


def test_replicas_answer_as_glip_detect_does(service, expected):
    _, port = service
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


class Visitor:
    """A visitor of the live page, with the picture's boxes for a prompt as they come."""

    def __init__(self, socket, prompt):
        self._socket = socket
        self.say(type="hello")
        self.welcome = self.hear("welcome")
        self.say(type="prompt", id=1, prompt=prompt, threshold=0.2)
        self.hear("prompt")

    def say(self, picture=None, **message):
        self._socket.send(json.dumps(message) if picture is None else pack(message, picture))

    def hear(self, kind):
        while True:
            message = self._socket.recv(timeout=120)
            header = unpack(message)[0] if isinstance(message, bytes) else json.loads(message)
            assert header["type"] != "error", header
            if header["type"] == kind:
                return header


def test_the_live_page(service):
    """A visitor's own frame, and the server's picture watched by two with prompts of their own."""
    client = pytest.importorskip("websockets.sync.client", reason="websockets is not installed (extra serve)")
    _, port = service
    prompts = "person. dog", "hat. red car"
    expected = [ask(port, prompt)["detections"] for prompt in prompts]
    assert expected[0] and expected[1]
    address = f"ws://127.0.0.1:{port}/v1/live"
    with client.connect(address) as one, client.connect(address) as other:
        visitors = [Visitor(socket, prompt) for socket, prompt in zip((one, other), prompts, strict=True)]
        visitors[0].say(PICTURE.read_bytes(), type="frame", frame=7)
        assert visitors[0].hear("result")["detections"] == expected[0]
        for visitor in visitors:
            assert visitor.welcome["source"] == {"name": PICTURE.name}
            visitor.say(type="source", source="server")
        for _ in range(3):
            for visitor, boxes in zip(visitors, expected, strict=True):
                found = visitor.hear("result")
                assert found["detections"] == boxes
                visitor.say(type="ack", frame=found["frame"])


def test_a_bad_prompt_is_refused_in_the_same_words(service):
    _, port = service
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(port, "...")
    assert caught.value.code == 422 and b"prompt" in caught.value.read()


def test_it_ends_in_order(service):
    process, _ = service
    before = replicas(process)
    assert before
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0 and out == "", said
    assert [line for line in said.splitlines() if "the vocabulary lacks words" not in line] == []
    assert [pid for pid in before if "ServeReplica:" in command_line(pid)] == []


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


@pytest.mark.parametrize(
    ("number", "begun"),
    [
        (signal.SIGTERM, "/raylet"),
        pytest.param(signal.SIGHUP, "ServeController", marks=slow),
        pytest.param(signal.SIGTERM, "ServeReplica:", marks=slow),
    ],
)
def test_a_signal_while_ray_and_replicas_start(tiny_bundle, monkeypatch, number, begun):
    with short_folder() as folder:
        monkeypatch.setenv("TMPDIR", str(folder))
        process = start(tiny_bundle, folder, "--ray", "local", "--threads", "1")
        wait_for(lambda: any(begun in command_line(pid) for pid in with_folder(folder)))
        process.send_signal(number)
        out, said = process.communicate(timeout=300)
        assert (process.returncode, out, said) == (128 + number, "", "glip-serve: interrupted\n")
        wait_for(lambda: not with_folder(folder))
        assert [entry.name for entry in folder.iterdir() if entry.name != "cache"] == []


@pytest.mark.skipif(not SLOW, reason="starts Ray three times: GLIP_SLOW=1 runs it")
def test_a_cluster_that_runs(expected, tiny_bundle, tmp_path, monkeypatch):
    with running_cluster() as cluster:
        monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
        process = start(tiny_bundle, tmp_path, "--ray", cluster.address, "--threads", "1")
        try:
            port = port_of(process)
            assert ask(port, "person. dog")["detections"] == expected
            assert len(cluster.workers("ServeReplica:glip-")) == 1
            # another service of the same bundle comes, and is killed; one at its port ends what it left
            again = 0
            for last in (False, True):
                other = start(tiny_bundle, tmp_path, "--ray", cluster.address, "--threads", "1", port=again)
                again = port_of(other)
                assert ask(again, "person. dog")["detections"] == expected
                wait_for(lambda: len(cluster.workers("ServeReplica:glip-")) == 2, 60)
                other.send_signal(signal.SIGTERM if last else signal.SIGKILL)
                other.communicate(timeout=300)
            wait_for(lambda: len(cluster.workers("ServeReplica:glip-")) == 1, 60)
            assert ask(port, "person. dog")["detections"] == expected
        finally:
            process.send_signal(signal.SIGTERM)
            out, said = process.communicate(timeout=300)
        assert (process.returncode, out, said) == (0, "", "")
        wait_for(lambda: not cluster.workers("ServeReplica:glip-"), 60)
        assert cluster.lives()
        # ended while its replica starts, it leaves none there either
        process = start(tiny_bundle, tmp_path, "--ray", cluster.address, "--threads", "1")
        wait_for(lambda: cluster.workers("ServeReplica:"))
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=300) == ("", "glip-serve: interrupted\n")
        assert process.returncode == 143
        wait_for(lambda: not cluster.workers("ServeReplica:"), 60)
        assert cluster.lives()


@pytest.mark.skipif(
    not SLOW,
    reason="Ray Serve adds a replica after half a minute of load, and then it has to start: GLIP_SLOW=1 runs it",
)
@pytest.mark.parametrize("different", [False, True])
def test_a_second_replica_takes_its_share_under_load(tiny_bundle, different):
    """Eight clients, with one prompt or one each; the answers stay right, and the work is divided."""
    prompts = [f"person. dog. thing {number if different else 0}" for number in range(8)]
    with short_folder() as folder:
        os.environ["TMPDIR"] = str(folder)
        process = start(tiny_bundle, folder, "--threads", "1", "--ray", "local", "--max-replicas", "2")
        del os.environ["TMPDIR"]
        try:
            port = port_of(process)
            expected = {prompt: ask(port, prompt)["detections"] for prompt in prompts}
            [first] = own_replicas(folder)
            wrong, answers, ended = [], [], threading.Event()

            def client(prompt):
                while not ended.is_set():
                    found = ask(port, prompt)["detections"]
                    answers.append(time.monotonic())
                    if found != expected[prompt]:
                        wrong.append(found)

            with ThreadPoolExecutor(8) as pool:
                asking = [pool.submit(client, prompt) for prompt in prompts]
                try:
                    began = time.monotonic()
                    wait_for(lambda: len(own_replicas(folder)) == 2, 240)
                    came = time.monotonic()
                    [second] = set(own_replicas(folder)) - {first}
                    wait_for(lambda: processor_seconds(second) > 10, 240)  # it has started, and works
                    before = [processor_seconds(pid) for pid in (first, second)]
                    since = time.monotonic()
                    time.sleep(10)
                    after = [processor_seconds(pid) for pid in (first, second)]
                finally:
                    ended.set()
                for one in asking:
                    one.result()
            assert wrong == []
            shares = [late - early for late, early in zip(after, before, strict=True)]
            alone = sum(began + 5 < at < came for at in answers) / (came - began - 5)
            both = sum(since < at < since + 10 for at in answers) / 10
            print(
                f"second replica after {came - began:.0f} s; {alone:.1f} and {both:.1f} answers a second before and"
                f" with it; processor seconds of the two in 10 s: {shares[0]:.1f} and {shares[1]:.1f}"
            )
            assert min(shares) > 0.5 * max(shares)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=300)


def own_replicas(folder):
    """The replicas of a service that was given a folder for temporary files."""
    return [pid for pid in with_folder(folder) if "ServeReplica:glip-" in command_line(pid)]


def processor_seconds(pid):
    """The time for which a process has used a core."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Replicas:
    """What `deploy` gives, with a replica that keeps what it is asked and answers when it is told to."""

    def __init__(self, asked, prompt=None):
        self._asked, self._prompt = asked, prompt
        self.detect = self

    def options(self, *, multiplexed_model_id):
        return Replicas(self._asked, multiplexed_model_id)

    def remote(self, key, *_):
        answer = asyncio.get_running_loop().create_future()
        self._asked.append((key, self._prompt, answer))
        return answer


@pytest.fixture
def routed(tiny_bundle):
    """A model with up to four replicas, and the list of what they are asked: key, key to be matched, answer."""
    asked = []
    bundle = Bundle.open(tiny_bundle)
    return RayModel("tiny", "glip-tiny", bundle, Replicas(asked), most=4, shortest_side=64, longest_side=None), asked


async def ask_model(model, texts):
    """Begin to ask a model for a frame and some prompts."""
    prompts = [await model.encode(text) for text in texts]
    limits = [np.zeros(len(prompt.phrases), np.float32) for prompt in prompts]
    task = asyncio.create_task(model.detect(np.zeros((4, 4, 3), np.uint8), prompts, limits))
    await asyncio.sleep(0)
    return task


def test_a_prompt_that_many_ask_for_goes_to_any_replica(routed):
    model, asked = routed

    async def main():
        tasks = [await ask_model(model, ["dog"]) for _ in range(4)]
        assert [known == key for key, known, _ in asked] == [True, True, False, False]
        assert {known for _, known, _ in asked[2:]} == {None}
        tasks += [await ask_model(model, [f"cat {number}"]) for number in range(5)]
        # More are under way than all replicas should have.
        assert [known is not None for _, known, _ in asked[4:]] == [True] * 4 + [False]
        for _, _, answer in asked:
            answer.set_result(Found([], {}, 1))
        await asyncio.gather(*tasks)
        task = await ask_model(model, ["dog"])
        assert asked[-1][1] == asked[0][0] == asked[-1][0]
        asked[-1][2].set_result(Found([], {}, 1))
        await task

    asyncio.run(main())


def test_a_long_list_is_told_from_its_parts_as_prompts(routed):
    model, asked = routed
    names = [f"thing number {number}" for number in range(60)]

    async def main():
        parts = [list(chunk.phrases) for chunk in (await model.encode(names)).chunks]
        assert len(parts) > 1
        tasks = [await ask_model(model, [names]), await ask_model(model, parts)]
        assert asked[0][0] != asked[1][0]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
