"""What machines can do at best: the figures that makers state for GPUs, and a measurement of the processor at hand."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from glip_deploy.errors import OptionError

__all__ = ["HARDWARE", "Hardware", "hardware", "hardware_of", "measure_cpu"]


@dataclass(frozen=True)
class Hardware:
    """What the maker states, dense (no structured sparsity)."""

    name: str
    half_flops: float
    """fp16 operations a second with fp32 sums, on tensor cores where there are any; a multiply-add is two."""
    single_flops: float
    """fp32, not TF32."""
    bytes_per_second: float
    """Of device memory."""
    driver_names: tuple[str, ...] = ()
    """What the driver calls exactly these products, without the brand; none where it does not tell products apart."""

    def flops(self, precision: str) -> float:
        """Return the operations a second in "fp32", or in a half precision."""
        return self.single_flops if precision == "fp32" else self.half_flops


HARDWARE = {
    name: Hardware(name, half * 1e12, single * 1e12, gigabytes * 1e9, drivers)
    for name, half, single, gigabytes, drivers in (
        ("P100", 21.2, 10.6, 732, ("P100-SXM2-16GB",)),  # no tensor cores
        ("V100", 125, 15.7, 900, ("V100-SXM2-16GB", "V100-SXM2-32GB")),
        ("T4", 65, 8.1, 320, ("T4",)),
        ("A100", 312, 19.5, 2039, ("A100-SXM4-80GB",)),
        ("L4", 121, 30.3, 300, ("L4",)),
        ("RTX 4090", 165.2, 82.6, 1008, ("RTX 4090",)),
        ("H100", 989, 67, 3350, ("H100 80GB HBM3",)),  # SXM
        ("H200", 989, 67, 4800, ("H200",)),  # SXM
        ("Orin AGX", 42.5, 5.3, 204.8, ()),  # 64 GB, GPU alone; the driver calls every Orin alike
    )
}
_BRAND = re.compile(r"^(NVIDIA |Tesla |GeForce )*")


def hardware(name: str) -> Hardware:
    """Return a row of the table by its name, in any spelling of case, spaces and hyphens.

    Raises:
        OptionError: not in the table; the message lists the names.
    """

    def letters(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    for item in HARDWARE.values():
        if letters(item.name) == letters(name):
            return item
    raise OptionError(f'"{name}" is not known; known are {", ".join(HARDWARE)}, and "cpu" for the machine at hand')


def hardware_of(gpu: str) -> Hardware:
    """Return the row of the very product that the driver names, such as "NVIDIA A100-SXM4-80GB".

    Products of one chip differ: a card for PCIe is slower than a module, a "4090 Laptop" is another chip than a 4090.

    Raises:
        OptionError: the table has no such product.
    """
    product = _BRAND.sub("", gpu.strip())
    for item in HARDWARE.values():
        if product in item.driver_names:
            return item
    known = ", ".join(name for item in HARDWARE.values() for name in item.driver_names)
    raise OptionError(f"the limits of {gpu} are not known; known are those of {known}")


def measure_cpu(seconds: float = 0.5) -> Hardware:
    """Measure the processor at hand: a 2048-wide fp32 product, and a copy of 256 MB.

    The best of several rounds each; a copy reads and writes, so both directions count. Half precision is taken to be
    no faster than single, as in ONNX Runtime's CPU provider.

    Args:
        seconds: for how long each is repeated.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.random((2048, 2048), np.float32) for _ in range(2))
    out = np.empty_like(a)
    source = np.zeros(1 << 26, np.float32)
    target = np.zeros_like(source)
    product = _best(lambda: np.matmul(a, b, out=out), seconds)
    copy = _best(lambda: np.copyto(target, source), seconds)
    flops = 2 * 2048**3 / product
    return Hardware("cpu", flops, flops, 2 * source.nbytes / copy)


def _best(action: Callable[[], object], seconds: float) -> float:
    action()
    best, end = math.inf, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        action()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best
