"""The deformable convolutions of GLIP, and the least time that any kernel needs for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from glip_bench.limits.hardware import Hardware

from glip_deploy.frames.geometry import ceil_div

__all__ = ["LAYERS", "Call", "Floor", "calls", "floor_of", "total_floor"]

LAYERS = {"GLIP-T": 6, "GLIP-L": 8}
"""DyConv layers of each variant; both have 256 channels, so their shapes are the same."""
STRIDES = (8, 16, 32, 64, 128)
TAPS = 9


@dataclass(frozen=True)
class Call:
    """One deformable convolution, 3x3, of one DyConv layer."""

    name: str
    size: tuple[int, int]
    """(height, width) of the features it reads."""
    out: tuple[int, int]
    stride: int
    times: int
    """Calls of this shape in a layer, on different features."""
    channels: int = 256

    @property
    def macs(self) -> int:
        """Multiply-adds of one such call; the bilinear blending is not counted."""
        return self.out[0] * self.out[1] * self.channels * self.channels * TAPS

    def bytes(self, value: int = 2, position: int = 4) -> int:
        """Return the bytes that must pass device memory once: features, offsets, masks, weights, bias, result.

        Args:
            value: bytes of a feature or weight.
            position: bytes of an offset or mask.
        """
        read = self.size[0] * self.size[1] * self.channels + self.channels * (self.channels * TAPS + 1)
        pixels = self.out[0] * self.out[1]
        return (read + pixels * self.channels) * value + pixels * 3 * TAPS * position


@dataclass(frozen=True)
class Floor:
    """Least seconds."""

    arithmetic: float
    bytes: float

    @property
    def seconds(self) -> float:
        """The least time that any kernel needs."""
        return max(self.arithmetic, self.bytes)


def levels(height: int = 800, width: int = 1344) -> list[tuple[int, int]]:
    """Return the sizes of P3 to P7 for a canvas; P6 and P7 halve and round up."""
    return [(ceil_div(height, stride), ceil_div(width, stride)) for stride in STRIDES]


def calls(height: int = 800, width: int = 1344) -> list[Call]:
    """Return the distinct calls of one layer: every level's own, the one above it, and the one below with stride 2.

    A level reads its own map, the larger map below with stride 2, and the smaller map above at that map's size.
    """
    sizes = levels(height, width)
    same = [
        Call(f"P{i + 3}", size, size, 1, 1 if i == 0 else 2)  # its own, and for the level below it
        for i, size in enumerate(sizes)
    ]
    down = [Call(f"P{i + 3} to P{i + 4}", above, below, 2, 1) for i, (above, below) in enumerate(pairwise(sizes))]
    return same + down


def floor_of(call: Call, machine: Hardware, precision: str = "fp16") -> Floor:
    """Return the least time of one call.

    Args:
        call: the shape.
        machine: its stated peaks.
        precision: "fp16", "bf16" or "fp32", of features and weights; offsets and masks are fp32.
    """
    size = 4 if precision == "fp32" else 2
    return Floor(2 * call.macs / machine.flops(precision), call.bytes(size) / machine.bytes_per_second)


def total_floor(all_calls: Iterable[Call], machine: Hardware, precision: str = "fp16") -> float:
    """Return the least seconds of one layer, its calls one after another."""
    return sum(call.times * floor_of(call, machine, precision).seconds for call in all_calls)
