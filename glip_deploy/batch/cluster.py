"""A Ray of our own on this machine, or a cluster that is running: connecting, and leaving nothing behind."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glip_deploy.errors import MissingPackage, OptionError, reason_of

__all__ = ["Cluster", "check_address"]

_OBJECT_STORE = 256 * 2**20
"""Bytes of shared memory for a Ray of our own."""
_PATIENCE = 5.0
"""Seconds that a cluster's head may take to answer."""


def check_address(address: str) -> None:
    """Check that an address is one that `RayPool` takes, without connecting.

    Raises:
        OptionError: it is none.
    """
    if address in ("local", "auto"):
        return
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536) or "/" in host:
        raise OptionError(
            f"--ray {address} is no address; legal is HOST:PORT of a cluster's head, auto for the cluster that this"
            " machine belongs to, or local for a Ray on this machine alone"
        )


class Cluster:
    """A connection to Ray.

    Args:
        address: "local" starts a Ray on this machine, until `close`; "auto" and HOST:PORT are a cluster that runs.
        cores: that a Ray of our own may give to workers; None for those of the machine.

    Raises:
        OptionError: the address is none.
    """

    def __init__(self, address: str, cores: int | None = None) -> None:
        check_address(address)
        self._address = address
        self._cores = cores
        self._folder: Path | None = None
        self._ray: Any = None

    def open(self) -> None:
        """Connect.

        A signal that has a handler is given to it once Ray has started; a second one at once.

        Raises:
            MissingPackage: Ray is not installed.
            OptionError: no cluster answers there.
        """
        ray = _import_ray(loopback=self._address == "local")
        if self._address != "local":
            _check_listening(
                self._address, os.environ.get("RAY_ADDRESS", "") if self._address == "auto" else self._address
            )
        self._ray = ray
        try:
            with _signals_wait():
                self._connect(ray)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave the cluster, or end the Ray of our own and remove its files; nothing happens if there is none."""
        if self._ray is None:
            return
        self._ray.shutdown()
        self._ray = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _connect(self, ray: Any) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address == "local":
            self._folder = Path(tempfile.mkdtemp(prefix="glip-ray-", dir=_short_folder()))
            ray.init(
                address="local",
                num_cpus=self._cores,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(self._folder),
                **options,
            )
            return
        try:
            ray.init(address=self._address, **options)
        except (OSError, RuntimeError, ValueError) as error:  # a ConnectionError is an OSError
            raise OptionError(
                f"--ray {self._address} cannot be used ({reason_of(error)}); start a cluster with ray start --head, and"
                " use the same versions of Ray and Python everywhere, and the cluster's token (RAY_AUTH_TOKEN)"
            ) from error


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Let signals wait for the end of the block, whatever handlers are set in it.

    Ray sets one for SIGTERM that exits with a status of its own, and restores nothing. Any exception in the middle of
    `ray.init` leaves processes that `ray.shutdown` does not know. A second signal does not wait.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            before[number](number, frame)

    def keep(number: int, handler: Any) -> Any:
        return before[number] if number in before else set_handler(number, handler)

    set_handler = signal.signal
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in before.items():
            if callable(handler):
                set_handler(number, note)
        signal.signal = keep  # type: ignore[assignment]
        yield
    finally:
        signal.signal = set_handler
        for number, handler in before.items():
            if callable(handler):
                set_handler(number, handler)
        if came:  # also in place of an error that may be the signal's work
            before[came[0]](came[0], None)


def _import_ray(*, loopback: bool) -> Any:
    """Return Ray, told to report nothing to anybody.

    Args:
        loopback: let a Ray of our own listen on 127.0.0.1 alone, as it does by default on macOS and Windows only.

    Raises:
        MissingPackage: it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # threads that outlive Ray would start another one
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0" if loopback else "1"
    if not loopback and _has_token():  # which Ray itself looks for where no address is given; clusters ask for it
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import pyarrow  # noqa: F401
        import ray
    except ImportError as error:
        raise MissingPackage(
            f'several workers, GPUs for them, and clusters need Ray ({error}); pip install "glip-deploy[ray]"'
        ) from error
    for name in ("ray", "ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return ray


def _has_token() -> bool:
    """Tell whether there is a token for clusters where Ray keeps it; `ray start --head` writes one."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").is_file()


def _check_listening(given: str, address: str) -> None:
    """Check that a server of Ray's kind answers, for which Ray itself would wait for minutes.

    Args:
        given: what the user named.
        address: HOST:PORT; anything else is left to Ray.

    Raises:
        OptionError: none does.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or os.environ.get("RAY_USE_TLS", "0") == "1":
        return
    problem = "something else than Ray answers"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
            with connection.makefile("rb") as answer:
                head = answer.read(9)
        if len(head) == 9 and head[3] == 4:  # settings of HTTP/2, with which a gRPC server begins
            return
    except TimeoutError:
        problem = f"nothing answers within {_PATIENCE:g} s"
    except OSError as error:
        problem = f"nothing answers there ({reason_of(error)})"
    raise OptionError(
        f"--ray {given}: {problem}; start a cluster with ray start --head, or give local for a Ray on this machine"
    )


def _short_folder() -> str | None:
    """Return where Ray's folder may be: the names of its sockets must fit into 107 bytes."""
    return "/tmp" if os.name == "posix" and len(tempfile.gettempdir()) > 20 else None
