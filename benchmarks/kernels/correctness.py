"""Whether the deformable convolution's CUDA kernels are right: against the official code's outputs, and float64."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from glip_export.model.deform import TAPS, deform_conv2d

from glip_deploy.frames.geometry import ceil_div
from kernels.kernel import DeformLibrary, MapLevel
from kernels.timing import captured

__all__ = ["CASES", "TOLERANCE", "Case", "correctness", "random_levels"]

GOLDENS = Path(__file__).resolve().parents[2] / "tests" / "data" / "goldens" / "unit_dcn.npz"
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 1.6e-2}
"""Largest error over the largest value: sums of 2304 products, rounded once for fp16 and bf16."""


@dataclass(frozen=True)
class Case:
    """A launch to compare with float64."""

    sizes: tuple[tuple[int, int], ...]
    """(height, width) of the levels."""
    inner: int
    """Channels of the input."""
    outer: int
    """Channels of the result."""
    batch: int
    stride: int
    spread: float
    """Standard deviation of the offsets, in pixels."""

    def __str__(self) -> str:
        (height, width), *_ = self.sizes
        return (
            f"{len(self.sizes)} levels from {height}x{width}, {self.inner} to {self.outer}, batch {self.batch},"
            f" stride {self.stride}, offsets of {self.spread:g}"
        )


PYRAMID = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
"""P3 to P7 of an 800x1344 canvas."""
CASES = (
    Case(PYRAMID, 256, 256, 1, 1, 2.0),
    Case(PYRAMID[:4], 256, 256, 1, 2, 2.0),
    Case(((25, 42), (13, 21)), 256, 256, 3, 1, 30.0),
    Case(((9, 7), (1, 1), (2, 33)), 24, 40, 2, 1, 3.0),
    Case(((9, 7), (3, 64)), 16, 8, 2, 2, 3.0),
)


def correctness(library: DeformLibrary) -> list[dict[str, Any]]:
    """Compare the kernels with the official code's outputs, and with float64 on random inputs; a row for each case."""
    rows = goldens(library)
    generator = torch.Generator().manual_seed(0)
    for case in CASES:
        for precision, dtype in precisions().items():
            for last in (False, True):
                error = against_double(library, generator, case, dtype, last)
                rows.append(_row(f"{case}, {'NHWC' if last else 'NCHW'}", precision, error))
    rows.append(in_a_graph(library, generator))
    return rows


def _row(case: str, precision: str, error: float) -> dict[str, Any]:
    return {"case": case, "precision": precision, "error": error, "ok": error <= TOLERANCE[precision]}


def precisions() -> dict[str, torch.dtype]:
    """Return torch's types by name; bf16 from Ampere on."""
    found = {"fp32": torch.float32, "fp16": torch.float16}
    if torch.cuda.get_device_capability()[0] >= 8:
        found["bf16"] = torch.bfloat16
    return found


def goldens(library: DeformLibrary) -> list[dict[str, Any]]:
    """Run the official code's own cases, flat offset maps among them."""
    with np.load(GOLDENS, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    rows = []
    for case in json.loads(str(arrays["meta"])):
        name = case["name"]
        x, positions, weight, bias, out = (
            torch.from_numpy(arrays[f"{name}_{part}"]).cuda() for part in ("x", "offset_mask", "weight", "bias", "out")
        )
        offset, mask = positions[:, : 2 * TAPS].contiguous(), positions[:, 2 * TAPS :].sigmoid().contiguous()
        level = MapLevel(x.contiguous(), offset, mask, (out.shape[2], out.shape[3]))
        (ours,) = library.run(library.pack(weight, bias, case["stride"]), [level])
        rows.append(_row(f"golden {name}", "fp32", float((ours - out).abs().max() / out.abs().max())))
    return rows


def random_levels(
    generator: torch.Generator, sizes: Sequence[tuple[int, int]], channels: int, batch: int, stride: int, spread: float
) -> list[MapLevel]:
    """Return random maps with offsets and masks, in fp32, on the GPU.

    Args:
        generator: of random numbers, on the CPU.
        sizes: (height, width) of the maps.
        channels: of the maps.
        batch: maps of each size.
        stride: of the convolution, which decides the size of the offsets.
        spread: standard deviation of the offsets, in pixels.
    """

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).cuda()

    rows = []
    for height, width in sizes:
        out = (ceil_div(height, stride), ceil_div(width, stride))
        offset, mask = spread * noise(batch, 2 * TAPS, *out), noise(batch, TAPS, *out).sigmoid()
        rows.append(MapLevel(noise(batch, channels, height, width), offset, mask, out))
    return rows


def against_double(
    library: DeformLibrary, generator: torch.Generator, case: Case, dtype: torch.dtype, channels_last: bool
) -> float:
    """Return the largest error over the largest value, all levels in one launch."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    levels = [
        replace(level, x=level.x.to(dtype).contiguous(memory_format=form))
        for level in random_levels(generator, case.sizes, case.inner, case.batch, case.stride, case.spread)
    ]
    weight = torch.randn(case.outer, case.inner, 3, 3, generator=generator) / (TAPS * case.inner) ** 0.5
    weight, bias = weight.cuda().to(dtype), torch.randn(case.outer, generator=generator).cuda().to(dtype)
    found = library.run(library.pack(weight, bias, case.stride), levels, channels_last)
    worst = 0.0
    for level, ours in zip(levels, found, strict=True):
        x, offset, mask, wide, shift = (t.double() for t in (level.x, level.offset, level.mask, weight, bias))
        exact = deform_conv2d(x, offset, mask, wide, shift, case.stride)
        worst = max(worst, float((ours.double() - exact).abs().max() / exact.abs().max()))
    return worst


def in_a_graph(library: DeformLibrary, generator: torch.Generator) -> dict[str, Any]:
    """Capture a launch of five levels in a CUDA graph; replay it on other features."""
    levels = random_levels(generator, PYRAMID, 256, 1, 1, 2.0)
    weight, bias = torch.randn(256, 256, 3, 3, generator=generator).cuda(), torch.zeros(256).cuda()
    weights = library.pack(weight, bias)
    found, replay = captured(lambda: library.run(weights, levels))
    for level in levels:
        level.x.mul_(-2.0)
    expected = library.run(weights, levels)
    replay()
    torch.cuda.synchronize()
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return _row("in a CUDA graph, replayed", "fp32", 0.0 if same else 1.0)
