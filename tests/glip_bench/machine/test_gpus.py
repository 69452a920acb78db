"""GPUs by NVML, simulated; without a driver or the package there are none."""

import sys
import time
from types import SimpleNamespace

import pytest
from glip_bench.machine.gpus import DeviceMemory, describe_gpus


class Nvml:
    """What glip_bench uses of pynvml, for one GPU whose memory fills up."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self, driver=True):
        self.driver, self.used, self.started = driver, 1 << 30, 0

    def nvmlInit(self):  # noqa: N802
        if not self.driver:
            raise self.NVMLError
        self.started += 1

    def nvmlShutdown(self):  # noqa: N802
        self.started -= 1

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        return "550.54"

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle):  # noqa: N802
        return b"NVIDIA H200"  # bytes in older versions

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(total=141 << 30, used=self.used)

    def nvmlDeviceGetClockInfo(self, handle, clock):  # noqa: N802
        return {1: 1980, 2: 3201}[clock]

    def nvmlDeviceGetMaxClockInfo(self, handle, clock):  # noqa: N802
        return 1980

    def nvmlDeviceGetPowerManagementLimit(self, handle):  # noqa: N802
        raise self.NVMLError

    def nvmlDeviceGetCudaComputeCapability(self, handle):  # noqa: N802
        return 9, 0


@pytest.fixture
def nvml(monkeypatch):
    library = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return library


def test_a_gpu_is_described_and_what_it_lacks_is_said(nvml):
    (gpu,) = describe_gpus()
    assert gpu.to_dict() == {
        "name": "NVIDIA H200",
        "driver": "550.54",
        "memory": str(141 << 10),
        "clock": "1980",
        "highest_clock": "1980",
        "memory_clock": "3201",
        "power_limit": "[N/A]",
        "compute_capability": "9.0",
    }
    assert nvml.started == 0


def test_the_peak_is_what_was_added_and_is_kept(nvml):
    with DeviceMemory(interval=0.001) as memory:
        nvml.used += 3 << 30
        deadline = time.monotonic() + 5
        while memory.peak != 3 << 30 and time.monotonic() < deadline:
            time.sleep(0.001)
        nvml.used -= 2 << 30
    assert memory.peak == 3 << 30 and nvml.started == 0


def test_the_last_reading_counts_too(nvml):
    with DeviceMemory(interval=60) as memory:
        nvml.used += 1 << 30
    assert memory.peak == 1 << 30


@pytest.mark.parametrize("library", [None, Nvml(driver=False)], ids=["no package", "no driver"])
def test_without_a_gpu_there_is_nothing_to_follow(monkeypatch, library):
    monkeypatch.setitem(sys.modules, "pynvml", library)  # None makes the import fail
    assert describe_gpus() == []
    with DeviceMemory() as memory:
        pass
    assert memory.peak is None


def test_a_gpu_that_refuses_is_none(nvml, monkeypatch):
    def refuse(*_):
        raise Nvml.NVMLError

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByIndex", refuse)
    assert describe_gpus() == []
    with DeviceMemory() as memory:
        pass
    assert memory.peak is None and nvml.started == 0
