"""NVIDIA GPUs as their driver describes them, and the memory a program takes of one."""

from __future__ import annotations

import shutil
import subprocess
import threading
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

__all__ = ["DeviceMemory", "Gpu", "describe_gpus"]

FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "compute_cap",
)


@dataclass(frozen=True)
class Gpu:
    """One GPU; numbers as text, in the driver's units (MiB, MHz, W), "[N/A]" where it does not say."""

    name: str
    driver: str
    memory: str
    clock: str
    """At the moment of asking."""
    highest_clock: str
    memory_clock: str
    power_limit: str
    compute_capability: str

    def to_dict(self) -> dict[str, Any]:
        """For a result file."""
        return asdict(self)


def describe_gpus() -> list[Gpu]:
    """Ask nvidia-smi; empty where there is none or it fails."""
    rows = _query(FIELDS)
    return [Gpu(*row) for row in rows if len(row) == len(FIELDS)]


def _query(fields: tuple[str, ...]) -> list[list[str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    return [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


class DeviceMemory:
    """Follows the memory in use on the first GPU; `peak` is what was added to it, in bytes.

    The driver's count for the whole device, CUDA's own context included: what a program really takes, provided that
    nobody else starts or ends one meanwhile. None where there is no GPU.
    """

    def __init__(self, interval: float = 0.05) -> None:
        self.peak: int | None = None
        self._interval = interval
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._start = 0

    def __enter__(self) -> Self:
        used = _used()
        if used is not None:
            self._start, self.peak = used, 0
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._read()
            self._stop.set()
            self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(self._interval):
            self._read()

    def _read(self) -> None:
        used = _used()
        if used is not None:
            self.peak = max(self.peak or 0, used - self._start)


def _used() -> int | None:
    rows = _query(("memory.used",))
    return int(rows[0][0]) << 20 if rows and rows[0][0].isdecimal() else None
