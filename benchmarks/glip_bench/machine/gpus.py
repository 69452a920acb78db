"""NVIDIA GPUs as their driver (NVML) describes them, and the memory that a program takes of one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

__all__ = ["DeviceMemory", "Gpu", "describe_gpus"]

UNKNOWN = "[N/A]"


@dataclass(frozen=True)
class Gpu:
    """One GPU; numbers as text, memory in MiB, clocks in MHz, power in W; "[N/A]" where the driver does not say."""

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
        """Return the form of a result file."""
        return asdict(self)


def describe_gpus() -> list[Gpu]:
    """Ask the driver; return an empty list without a GPU, a driver, or the package nvidia-ml-py."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        try:
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError:
            return []
        return [_describe(nvml, handle) for handle in handles]


def _describe(nvml: Any, handle: Any) -> Gpu:
    def ask(query: Callable[[], object]) -> str:
        try:
            answer = query()
        except nvml.NVMLError:  # this GPU has no such figure
            return UNKNOWN
        return answer.decode() if isinstance(answer, bytes) else str(answer)

    def capability() -> str:
        return ".".join(str(part) for part in nvml.nvmlDeviceGetCudaComputeCapability(handle))

    return Gpu(
        name=ask(lambda: nvml.nvmlDeviceGetName(handle)),
        driver=ask(nvml.nvmlSystemGetDriverVersion),
        memory=ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total >> 20),
        clock=ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        highest_clock=ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        memory_clock=ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        power_limit=ask(lambda: f"{nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3:.2f}"),
        compute_capability=ask(capability),
    )


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """Give NVML, started; None without nvidia-ml-py or a working driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


class DeviceMemory:
    """Follows the memory in use on the first GPU; `peak` is what was added to it, in bytes.

    The driver's count for the whole device, CUDA's own context included: what a program really takes, provided that
    no other program starts or ends meanwhile. None where there is no GPU. Asking costs microseconds.

    Args:
        interval: seconds between two readings.
    """

    def __init__(self, interval: float = 0.05) -> None:
        self.peak: int | None = None
        self._interval = interval
        self._open = contextlib.ExitStack()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        nvml = self._open.enter_context(_nvml())
        if nvml is not None:
            with contextlib.suppress(nvml.NVMLError):
                handle = nvml.nvmlDeviceGetHandleByIndex(0)
                start = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
                self.peak = 0
                self._thread = threading.Thread(target=self._follow, args=(nvml, handle, start), daemon=True)
                self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        self._open.close()

    def _follow(self, nvml: Any, handle: Any, start: int) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(self._interval)  # and one more reading at the end
            with contextlib.suppress(nvml.NVMLError):
                self.peak = max(self.peak or 0, int(nvml.nvmlDeviceGetMemoryInfo(handle).used) - start)
