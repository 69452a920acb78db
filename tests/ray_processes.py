"""Clusters and processes of Ray that tests start, told from others by a folder of their own for temporary files."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RunningCluster", "running_cluster", "short_folder", "with_folder"]


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose name is short enough for Ray's sockets, as `TMPDIR` of a process that starts Ray.

    What still runs with it at the end is killed.
    """
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="glip"))
    try:
        yield folder
    finally:
        for pid in with_folder(folder):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def with_folder(folder: Path) -> list[int]:
    """Processes whose `TMPDIR` is a folder: one that was given it, and all that it started, whoever their parent is."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"TMPDIR={folder}".encode() in variables:
                found.append(int(entry.name))
    return found


@dataclass(frozen=True)
class RunningCluster:
    """A cluster of this machine alone, which `ray start` started.

    Attributes:
        address: HOST:PORT of its head.
        token: that it asks for, as clusters do by default.
        folder: its own, by which `with_folder` finds its processes.
        process: of `ray start`.
    """

    address: str
    token: str
    folder: Path
    process: subprocess.Popen[str]

    def lives(self) -> bool:
        """Tell whether it answers."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            return False
        return self.process.poll() is None

    def workers(self, word: str) -> list[int]:
        """Its processes in whose command line a word stands."""
        found = []
        for pid in with_folder(self.folder):
            with suppress(OSError):
                if word in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        return found


@contextmanager
def running_cluster() -> Iterator[RunningCluster]:
    """Start a cluster with two cores on free ports, in a folder of its own; end it afterwards."""
    with short_folder() as folder:
        environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
        token = secrets.token_hex(32)
        environment |= {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_TOKEN": token,
            "GLIP_DEPLOY_CACHE": str(folder / "cache"),
        }
        port, clients = _free_port(), _free_port()
        options = ["--num-cpus", "2", "--object-store-memory", str(256 * 2**20)]
        options += ["--include-dashboard", "false", "--temp-dir", str(folder / "ray")]
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port),
             "--ray-client-server-port", str(clients), *options],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        cluster = RunningCluster(f"127.0.0.1:{port}", token, folder, process)
        try:
            end = time.monotonic() + 120
            while not cluster.lives():
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < end, "no cluster within two minutes"
                time.sleep(0.2)
            yield cluster
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=60)


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port
