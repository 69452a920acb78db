"""`glip-batch` on Ray: the same results, workers and runs that are killed, addresses, open ports."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="glip-batch writes Parquet with pyarrow; pip install 'glip-deploy[ray]'")
pytest.importorskip("ray", reason="several workers run on Ray; pip install 'glip-deploy[ray]'")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import selection
from batch_runs import (
    PICTURES,
    command,
    failures,
    finish,
    named,
    recorded,
    refused,
    results,
    rows,
    run,
    start,
    succeed,
    write_pictures,
)
from processes import descendants, wait_for
from ray_processes import running_cluster, short_folder, with_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux shows them")
TWO = ("--workers", "2")
WORKER = "MapWorker"
SLOW = """
import os, time
from pathlib import Path
import glip_deploy.batch.worker as worker
load = worker._picture
def slow(path):
    time.sleep({seconds})
    if path.name == {poison!r}:
        os._exit(1)
    return load(path)
worker._picture = slow

import threading
from glip_deploy.batch.cluster import Cluster
close = Cluster.close
def noting(self):
    Path("threads.txt").write_text(" ".join(thread.name for thread in threading.enumerate()))
    close(self)
Cluster.close = noting
"""
"""A module that is imported with Python's start: every picture takes its time, and one ends the process. The threads
that run when Ray is left are noted."""


@pytest.fixture
def slow(tmp_path):
    """Make a folder with a `sitecustomize` for `start`: seconds for each picture, and the name of a deadly one."""

    def make(seconds=0.0, poison=""):
        folder = tmp_path / "slow"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SLOW.format(seconds=seconds, poison=poison))
        return [folder]

    return make


@pytest.fixture(scope="module")
def whole(mixed, tiny_bundle, tmp_path_factory):
    """The output of an uninterrupted run of one worker on pictures and a video."""
    folder = tmp_path_factory.mktemp("whole")
    succeed(command(tiny_bundle, str(mixed / "media")), folder)
    return folder / "out"


def test_two_workers_give_what_one_gives(mixed, tiny_bundle, tmp_path, whole):
    said = succeed(command(tiny_bundle, str(mixed / "media"), "out", *TWO), tmp_path)
    assert said.count("\n") == 1, said  # nothing from Ray
    assert results(tmp_path / "out") == results(whole)


def test_a_killed_worker_loses_nothing(here, tiny_bundle, slow):
    """Kill -9 of a worker in the middle of its pictures; it listens nowhere but on this machine meanwhile."""
    write_pictures(here / "photos", 48)
    process = start(command(tiny_bundle, "photos", "out", *TWO), here, slow(0.1))
    wait_for(lambda: recorded(here / "out"))
    workers = named(descendants(process.pid), WORKER)
    assert len(workers) == 2
    foreign = [
        address
        for address in listening(descendants(process.pid))
        if address.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    ]
    os.kill(workers[0], signal.SIGKILL)
    replaced = wait_for(lambda: set(named(descendants(process.pid), WORKER)) - set(workers))
    status, said = finish(process)
    assert status == 0, said
    assert replaced and foreign == []
    assert len(rows(here / "out")) == 48 and failures(here / "out") == []
    succeed(command(tiny_bundle, "photos", "again"), here)
    assert results(here / "out") == results(here / "again")


@selection.slowly
def test_a_picture_that_kills_its_worker_fails_alone(here, tiny_bundle, slow):
    write_pictures(here / "photos", 20)
    status, said = run(command(tiny_bundle, "photos", "out", *TWO), here, slow(poison="7.png"))
    assert status == 1 and "1 of 20 files failed" in said, said
    (failure,) = failures(here / "out")
    assert failure["source"] == "photos/7.png" and "the worker process ended each time" in failure["reason"]
    assert len(rows(here / "out")) == 19


@pytest.mark.parametrize("kill", [pytest.param(signal.SIGKILL, marks=selection.slow), signal.SIGTERM])
def test_a_run_that_is_ended_goes_on_to_the_same_results(mixed, tiny_bundle, tmp_path, whole, slow, kill):
    arguments = command(tiny_bundle, str(mixed / "media"), "out", *TWO)
    process = start(arguments, tmp_path, slow(0.8))
    wait_for(lambda: recorded(tmp_path / "out"))
    time.sleep(random.Random(int(kill)).uniform(0, 1))
    others = descendants(process.pid)
    (os.killpg if kill == signal.SIGKILL else os.kill)(process.pid, kill)
    status, said = finish(process)
    if kill == signal.SIGTERM:
        assert (status, said) == (143, "glip-batch: interrupted\n")
        left = (tmp_path / "threads.txt").read_text()
        assert "MainThread" in left
        assert "glip-ray" not in left and "StreamingExecutor" not in left, "they would ask Ray after its end"
    else:
        assert status == -9 and "glip-batch" not in said, said
    wait_for(lambda: not [pid for pid in others if alive(pid)])  # Ray's processes go with it
    done = recorded(tmp_path / "out")
    said = succeed(command(tiny_bundle, str(mixed / "media")), tmp_path)  # with another number of workers
    everything = sum(map(int, re.findall(r"(\d+) (?:pictures|frames of videos)", said)))
    [left] = map(int, re.findall(r"(\d+) in this run", said))
    assert done > 0 and 0 < left < everything
    assert results(tmp_path / "out") == results(whole)


@pytest.mark.parametrize(
    ("number", "begun"),
    [
        pytest.param(signal.SIGTERM, "gcs_server", marks=selection.slow),
        pytest.param(signal.SIGINT, "gcs_server", marks=selection.slow),
        pytest.param(signal.SIGHUP, "/raylet", marks=selection.slow),
        pytest.param(signal.SIGTERM, "/raylet", marks=selection.slow),
    ],
)
def test_a_signal_while_ray_starts(here, tiny_bundle, monkeypatch, number, begun):
    """Ray sets a handler of its own for SIGTERM, and cannot end what it has half started."""
    with short_folder() as folder:
        monkeypatch.setenv("TMPDIR", str(folder))
        process = start(command(tiny_bundle, "photos", "out", *TWO), here)
        wait_for(lambda: named(descendants(process.pid), begun))
        process.send_signal(number)
        assert finish(process) == (128 + number, "glip-batch: interrupted\n")
        wait_for(lambda: not with_folder(folder), 60)
        assert list(folder.iterdir()) == []
    assert recorded(here / "out") == 0


@selection.slowly
def test_a_cluster_that_runs(mixed, tiny_bundle, tmp_path, whole, monkeypatch):
    """It is joined by address and by `auto`, gives what one process gives, and outlives the runs."""
    with running_cluster() as cluster:
        monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        said = succeed(command(tiny_bundle, str(mixed / "media"), "out", *TWO, "--ray", "auto"), tmp_path)
        assert said.count("\n") == 1, said
        assert results(tmp_path / "out") == results(whole)
        wait_for(lambda: not cluster.workers(WORKER), 60)
        assert cluster.lives()
        monkeypatch.delenv("RAY_ADDRESS")
        at = "--ray", cluster.address
        three = command(tiny_bundle, str(mixed / "media"), "third", "--workers", "3", *at)
        refused(three, tmp_path, "take 3 cores", "Ray has 2")


def test_addresses(here, tiny_bundle):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    began = time.monotonic()
    address = f"127.0.0.1:{port}"
    refused(command(tiny_bundle, "photos", "out", "--ray", address), here, f"--ray {address}: nothing answers there")
    refused(command(tiny_bundle, "photos", "out", "--ray", "ray://head:10001"), here, "is no address", "HOST:PORT")
    assert time.monotonic() - began < 120
    assert recorded(here / "out") == 0


def test_somebody_else_answers_at_the_address(here, tiny_bundle):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        began = time.monotonic()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        refused(
            command(tiny_bundle, "photos", "out", "--ray", address),
            here,
            f"--ray {address}: nothing answers within 5 s",
        )
        assert time.monotonic() - began < 180


def test_ray_is_asked_for_by_name(here, tiny_bundle):
    (here / "stub").mkdir()
    (here / "stub" / "ray.py").write_text("raise ImportError('No module named ray')")
    parts = ("clusters need Ray", "No module named ray", "glip-deploy[ray]")
    refused(command(tiny_bundle, "photos", "out", *TWO), here, *parts, first=[here / "stub"])
    status, said = run(command(tiny_bundle, "photos"), here, [here / "stub"])  # one worker needs none
    assert status == 0, said
    assert len(rows(here / "out")) == PICTURES


@selection.slowly
def test_workers_that_cannot_open_the_bundle(here, tiny_bundle, tmp_path):
    import shutil

    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    weights = copy / "text.onnx.data"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(command(copy, "photos", "out", *TWO), here, "was changed after the export")


@selection.slowly
def test_gpus_that_are_not_there(here, tiny_bundle):
    options = ("--backend", "onnxruntime-cuda", "--workers", "2", "--gpus-per-worker", "8")
    refused(command(tiny_bundle, "photos", "out", *options), here, "take 16 GPUs", "Ray has")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listening(pids):
    """Addresses on which processes listen for TCP."""
    inodes = set()
    for pid in pids:
        try:
            inodes |= {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
        except OSError:
            continue
    found = []
    for table, family, size in (("tcp", socket.AF_INET, 4), ("tcp6", socket.AF_INET6, 16)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                packed = b"".join(raw[place : place + 4][::-1] for place in range(0, size, 4))
                found.append(socket.inet_ntop(family, packed))
    assert found, "Ray's processes listen somewhere"
    return found


def test_what_outlives_ray_does_not_start_another_one():
    code = (
        "from glip_deploy.batch.cluster import _import_ray\n"
        "ray = _import_ray(loopback=True)\n"
        "try: ray.put(1)\n"
        "except Exception as error: print(type(error).__name__, ray.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "RaySystemError False\n", done.stdout + done.stderr


def test_the_limit_of_outcomes_that_wait_is_still_a_setting_of_ray_data():
    """Setting a name that Ray Data no longer reads would be silent, and cost workers a third of their time."""
    from ray.data import DataContext

    assert "_max_num_blocks_in_streaming_gen_buffer" in vars(DataContext())
