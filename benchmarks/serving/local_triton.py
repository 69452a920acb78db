"""Starts a Triton Inference Server on this machine, for tests and measurements.

The server is `tritonserver` on the PATH, or the one that the package nvidia-pytriton carries, which runs without a GPU:

    pip install --no-deps nvidia-pytriton
    pip install --no-deps --target build/triton "numpy<2"

Nothing of the package itself is imported, so that it needs none of its requirements. Its Python backend was built for
NumPy 1, which the models there get from `build/triton`; with NumPy 2 it reads requests wrongly and dies.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import glip_deploy

__all__ = ["Installation", "NotHere", "Server", "find_triton"]

_PATIENCE_S = 120.0
NUMPY_1 = Path(__file__).resolve().parents[2] / "build" / "triton"
"""Where NumPy 1 is for the server of nvidia-pytriton."""


class NotHere(Exception):
    """There is no Triton that could be started; the message says why."""


@dataclass(frozen=True)
class Installation:
    """A server that can be started.

    Attributes:
        server: the program.
        backends: its folder of backends, with that of Python; None for its own.
        stub: the program that runs model.py with this version of Python; None for the backend's own.
        packages: a folder of packages that models get before all others.
    """

    server: Path
    backends: Path | None = None
    stub: Path | None = None
    packages: Path | None = None


def find_triton() -> Installation:
    """Return the server of this machine.

    Raises:
        NotHere: there is none, or it cannot run models with this Python.
    """
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return Installation(Path(on_path))
    package = importlib.util.find_spec("pytriton")
    if package is None or not package.submodule_search_locations:
        raise NotHere("no tritonserver on the PATH, and nvidia-pytriton is not installed (pip install --no-deps)")
    folder = Path(package.submodule_search_locations[0]) / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = Installation(
        folder / "bin" / "tritonserver",
        folder / "backends",
        folder / "python_backend_stubs" / version / "triton_python_backend_stub",
        None if np.lib.NumpyVersion(np.__version__) < "2.0.0" else NUMPY_1,
    )
    if found.stub is None or not found.stub.is_file():
        raise NotHere(f"nvidia-pytriton runs no models with Python {version}")
    if found.packages is not None and not (found.packages / "numpy").is_dir():
        raise NotHere('nvidia-pytriton needs NumPy 1: pip install --no-deps --target build/triton "numpy<2"')
    library = Path(str(sysconfig.get_config_var("LIBDIR"))) / f"libpython{version}.so.1.0"
    if not library.is_file():
        raise NotHere(f"Triton's Python backend needs {library.name}, which this Python was built without")
    try:
        ran = subprocess.run([found.server, "--help"], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        raise NotHere(f"{found.server} cannot be started ({error})") from error
    if "Usage" not in ran.stdout + ran.stderr:
        raise NotHere(f"{found.server} cannot be started ({' '.join(ran.stderr.split())[:200]})")
    return found


class Server:
    """A running server for one model repository. A context manager.

    Args:
        repository: the folder of models.
        log: file for what the server prints.
        installation: from `find_triton`.

    Raises:
        RuntimeError: on entering, it did not become ready; the message has the end of its log.
    """

    def __init__(self, repository: Path, log: Path, installation: Installation) -> None:
        self._repository = repository
        self._log = log
        self._installation = installation
        self._scratch = tempfile.TemporaryDirectory(prefix="glip-triton-")
        self._process: subprocess.Popen[bytes] | None = None
        self.http, self.grpc, metrics = _free_ports(3)
        self._metrics = metrics

    @property
    def http_address(self) -> str:
        """Host and port, as tritonclient takes them."""
        return f"127.0.0.1:{self.http}"

    @property
    def grpc_address(self) -> str:
        """Host and port of gRPC."""
        return f"127.0.0.1:{self.grpc}"

    def __enter__(self) -> Server:
        command = [
            str(self._installation.server),
            f"--model-repository={self._repository}",
            f"--http-port={self.http}",
            f"--grpc-port={self.grpc}",
            f"--metrics-port={self._metrics}",
            "--http-address=127.0.0.1",
            "--grpc-address=127.0.0.1",
            "--exit-timeout-secs=20",
            f"--backend-config=python,shm-region-prefix-name=glip_{os.getpid()}",
        ]
        if self._installation.backends is not None:
            command.append(f"--backend-directory={self._backends()}")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=_environment(), cwd=self._first()
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._scratch.cleanup()

    def _backends(self) -> Path:
        """Return a folder of backends in which the Python backend has the stub of this Python."""
        folder = Path(self._scratch.name) / "backends" / "python"
        folder.mkdir(parents=True)
        assert self._installation.backends is not None and self._installation.stub is not None
        for file in (self._installation.backends / "python").iterdir():
            if file.name != self._installation.stub.name:
                (folder / file.name).symlink_to(file)
        # The stub finds its libraries from where it really is.
        (folder / self._installation.stub.name).symlink_to(self._installation.stub)
        return folder.parent

    def _first(self) -> Path:
        """Return a folder with what models import before all else: this glip_deploy, and packages of the installation.

        The Python backend takes no PYTHONPATH, but looks in the folder in which the server is started.
        """
        folder = Path(self._scratch.name) / "first"
        folder.mkdir()
        (folder / "glip_deploy").symlink_to(Path(glip_deploy.__file__).parent)
        for package in self._installation.packages.iterdir() if self._installation.packages is not None else ():
            (folder / package.name).symlink_to(package)
        return folder

    def _wait(self) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        assert self._process is not None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"tritonserver ended with status {self._process.returncode}:\n{self._tail()}")
            try:
                with urllib.request.urlopen(f"http://{self.http_address}/v2/health/ready", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.1)
        raise RuntimeError(f"tritonserver is not ready after {_PATIENCE_S:g} s:\n{self._tail()}")

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]


def _environment() -> dict[str, str]:
    """Return an environment in which the Python backend finds this Python."""
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    libraries = [str(sysconfig.get_config_var("LIBDIR")), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "PATH": os.pathsep.join(filter(None, path)),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
    }


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
