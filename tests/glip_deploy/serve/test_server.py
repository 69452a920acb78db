"""A real server under clients that do not behave: it answers each once, and lives on."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi_offline", reason="FastAPI is not installed (extra serve)")

from PIL import Image

COMMAND = [sys.executable, "-m", "glip_deploy.serve.command", "--port", "0", "--shortest-side", "64"]


@contextlib.contextmanager
def serving(bundle, *options):
    """A server on a free port: its process, and host and port."""
    process = subprocess.Popen(
        [*COMMAND, "--model", str(bundle), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stderr.readline()
        found = re.match(r"glip-serve: http://127.0.0.1:(\d+)/ serves", line)
        assert found, line + process.stderr.read()
        yield process, ("127.0.0.1", int(found[1]))
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(tiny_bundle):
    # A frame waits a second and a half for others, so that there is time to leave or to end meanwhile.
    with serving(tiny_bundle, "--timeout", "4", "--batch-size", "2", "--batch-wait", "1500") as started:
        yield started


def get(address, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{address[1]}{path}", timeout=60) as answer:
        return answer.read().decode()


def form(prompt="person. dog", picture=None):
    """The head and the body of a request to detect."""
    if picture is None:
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(stream, "PNG")
        picture = stream.getvalue()
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % part
        for part in ((b'image"; filename="a.png', picture), (b"prompt", prompt.encode()))
    )
    return b"POST /v1/detect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n", (
        body + b"--b--\r\n"
    )


def ask(address, head, body):
    """Send a request and return the status and the JSON of its answer."""
    with socket.create_connection(address, 60) as connection:
        connection.sendall(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return answer_of(connection)


def answer_of(connection):
    connection.settimeout(60)
    data = b""
    while piece := connection.recv(65_536):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), data
    return int(head.split()[1]), json.loads(body)


def resident(process):
    """Bytes of memory that a process has had at most, and has."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return [1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("VmHWM", "VmRSS")]


def open_descriptors(process):
    """How many files and sockets a process holds; 0 where that cannot be seen."""
    folder = Path(f"/proc/{process.pid}/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_200_mb_are_refused_and_never_in_memory(server):
    process, address = server
    assert ask(address, *form())[0] == 200
    highest = resident(process)[0]
    with socket.create_connection(address, 60) as connection:  # its length is not announced
        head, body = form()
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % 99 + body[:99] + b"\r\n")
        piece = b"%x\r\n" % 2**20 + bytes(2**20) + b"\r\n"
        with contextlib.suppress(ConnectionError):  # the server may have answered and closed
            for _ in range(200):
                connection.sendall(piece)
            connection.sendall(b"0\r\n\r\n")
        status, problem = answer_of(connection)
    assert (status, problem["title"]) == (413, "The request is too large")
    announced = b"Content-Length: 200000000\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    with socket.create_connection(address, 60) as connection:
        connection.sendall(form()[0] + announced)
        assert answer_of(connection)[0] == 413
    assert resident(process)[0] - highest < 100 * 2**20
    assert ask(address, *form())[0] == 200


def test_a_prompt_of_a_million_characters_is_refused(server):
    _, address = server
    status, problem = ask(address, *form("dog " * 250_000))
    words = "the prompt has 1000000 characters; at most 20000 are accepted; name fewer things"
    assert (status, problem["detail"]) == (422, words)


def test_zero_bytes_and_no_picture_are_refused(server):
    _, address = server
    status, problem = ask(address, *form(picture=b""))
    assert (status, problem["detail"]) == (422, "picture is empty (0 bytes); give the bytes of a JPEG or PNG file")
    status, problem = ask(address, *form(picture=b"<html>"))
    assert status == 422 and problem["detail"].startswith("picture is not in a format this server can read")


def test_clients_that_close_their_sockets_leave_nothing_behind(server):
    process, address = server
    head, body = form()
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    descriptors = open_descriptors(process)
    for end in (5, len(head) - 2, len(head), len(head) + 100, len(head) + len(body)):
        for _ in range(3):
            with socket.create_connection(address, 60) as connection:
                connection.sendall((head + body)[:end])
    deadline = time.monotonic() + 30
    while "glip_requests_under_way 0.0" not in get(address, "/metrics"):
        assert time.monotonic() < deadline, "places are still held"
        time.sleep(0.1)
    metrics = get(address, "/metrics")
    assert 'path="/v1/detect",status="499"' in metrics
    assert 'status="500"' not in metrics
    assert ask(address, *form())[0] == 200
    assert open_descriptors(process) <= descriptors + 2


def test_a_body_that_comes_too_slowly_is_given_up(server):
    _, address = server
    with socket.create_connection(address, 60) as connection:
        head, body = form()
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:100])
        status, problem = answer_of(connection)
    assert (status, problem["detail"]) == (408, "the request was not complete after 4 s; send it faster")


def test_what_is_not_http_is_no_trouble(server):
    _, address = server
    with socket.create_connection(address, 60) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        connection.settimeout(60)
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert json.loads(get(address, "/healthz")) == {"status": "ok"}


def test_sigterm_lets_the_requests_under_way_end(tiny_bundle):
    with serving(tiny_bundle, "--batch-size", "2", "--batch-wait", "3000") as (process, address):
        head, body = form()
        with socket.create_connection(address, 60) as connection:
            connection.sendall(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            while "glip_requests_under_way 1.0" not in get(address, "/metrics"):
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            while True:  # nobody new is let in
                try:
                    get(address, "/healthz")
                except (urllib.error.URLError, ConnectionError):
                    break
                time.sleep(0.05)
            status, answer = answer_of(connection)
        assert (status, answer["source"]) == (200, "a.png")
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
