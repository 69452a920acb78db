"""The deformable convolution's CUDA library on torch tensors, and a DyConv that runs on it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from glip_engines.deform_abi import DataType, Layout, Level, ProblemStruct, Shape, problem
from glip_export.model.deform import TAPS, deform_conv2d, flat_read
from glip_export.model.dyhead import DeformConvNorm, DyConv
from glip_export.model.fpn import LevelSizes
from glip_export.model.glip import Glip
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "TYPES",
    "DeformLibrary",
    "KernelDyConv",
    "MapLevel",
    "Weights",
    "convolve_in_torch",
    "use_kernel",
    "with_library",
]

TYPES = {torch.float32: DataType.F32, torch.float16: DataType.F16, torch.bfloat16: DataType.BF16}


@dataclass(frozen=True)
class MapLevel:
    """One feature map of a launch."""

    x: Tensor
    """(B, C, H, W), contiguous or channels last."""
    offset: Tensor
    """(B, 18, h, w), contiguous; for a flat read, the larger map."""
    mask: Tensor
    out: tuple[int, int]
    """(height, width) of the result; smaller than the offsets' for a flat read."""


@dataclass(frozen=True)
class Weights:
    """One set of weights, packed for the kernels."""

    packed: Tensor
    bias: Tensor
    shape: Shape


class DeformLibrary:
    """`glip_deform.h` through ctypes, on torch's current stream.

    Args:
        file: built by `glip_engines.compile.build_library`.

    Raises:
        OSError: not a library, or one for another system.
    """

    def __init__(self, file: Path) -> None:
        self._library: Any = ctypes.CDLL(str(file))
        self._library.glip_deform_problem_error.restype = ctypes.c_char_p
        for name in ("packed_weight_bytes", "workspace_bytes"):
            getattr(self._library, f"glip_deform_{name}").restype = ctypes.c_ulonglong
        self._library.glip_deform_launch.argtypes = (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_ulonglong,
            ctypes.c_void_p,
        )
        self._library.glip_deform_pack_weights.argtypes = (ctypes.c_void_p,) * 4

    def pack(self, weight: Tensor, bias: Tensor, stride: int = 1, pad: int = 1) -> Weights:
        """Bring (Cout, Cin, 3, 3) weights, on the GPU, into the kernels' order."""
        shape = Shape(weight.shape[1], weight.shape[0], stride=stride, pad=pad, data_type=TYPES[weight.dtype])
        size = self._library.glip_deform_packed_weight_bytes(ctypes.byref(problem(shape, [])))
        packed = torch.empty(size, dtype=torch.uint8, device=weight.device)
        given = problem(shape, [])
        weight = weight.contiguous()
        status = self._library.glip_deform_pack_weights(
            ctypes.addressof(given), weight.data_ptr(), packed.data_ptr(), _stream()
        )
        self._check(status, given)
        return Weights(packed, bias.contiguous(), shape)

    def run(self, weights: Weights, levels: Sequence[MapLevel], channels_last: bool = False) -> list[Tensor]:
        """Convolve several maps in one launch.

        Args:
            weights: of `pack`.
            levels: up to eight, all contiguous or all channels last.
            channels_last: memory format of the results.

        Returns:
            (B, Cout, h, w) of each.
        """
        first = levels[0].x
        form = torch.channels_last if channels_last else torch.contiguous_format
        results = [
            torch.empty(
                (first.shape[0], weights.shape.out_channels, *level.out),
                dtype=first.dtype,
                device=first.device,
                memory_format=form,
            )
            for level in levels
        ]
        launch = self.bind(weights, levels, results)
        launch()
        return results

    def bind(self, weights: Weights, levels: Sequence[MapLevel], results: Sequence[Tensor]) -> Callable[[], None]:
        """Put a launch together once, to be repeated; the tensors must stay where they are."""
        first = levels[0]
        shape = replace(
            weights.shape,
            batch=first.x.shape[0],
            position_type=TYPES[first.offset.dtype],
            x_layout=_layout(first.x),
            y_layout=_layout(results[0]),
        )
        rows = [
            Level(
                level.x.data_ptr(),
                level.offset.data_ptr(),
                level.mask.data_ptr(),
                result.data_ptr(),
                (level.x.shape[2], level.x.shape[3]),
                level.out,
                level.offset[0].numel(),
                level.mask[0].numel(),
            )
            for level, result in zip(levels, results, strict=True)
        ]
        given = problem(shape, rows, weights.packed.data_ptr(), weights.bias.data_ptr())
        size = int(self._library.glip_deform_workspace_bytes(ctypes.byref(given)))
        workspace = torch.empty(max(16, size), dtype=torch.uint8, device=first.x.device)
        kept = (*levels, *results, weights, workspace)

        def launch(_kept: Any = kept) -> None:
            status = self._library.glip_deform_launch(
                ctypes.addressof(given), workspace.data_ptr(), workspace.numel(), _stream()
            )
            self._check(status, given)

        return launch

    def _check(self, status: int, given: ProblemStruct) -> None:
        if status:
            reason = self._library.glip_deform_problem_error(ctypes.byref(given))
            raise RuntimeError(reason.decode() if reason else f"the deformable convolution failed: CUDA error {status}")


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def _layout(x: Tensor) -> Layout:
    if x.is_contiguous():
        return Layout.NCHW
    assert x.is_contiguous(memory_format=torch.channels_last), "neither contiguous nor channels last"
    return Layout.NHWC


Convolve = Callable[[DeformConvNorm, Sequence[MapLevel]], list[Tensor]]


def convolve_in_torch(module: DeformConvNorm, levels: Sequence[MapLevel]) -> list[Tensor]:
    """Compute in plain torch and fp32 what the kernels compute, to check everything around them without a GPU."""
    assert module.conv.bias is not None
    weight, bias = module.conv.weight.float(), module.conv.bias.float()
    results = []
    for level in levels:
        offset, mask = flat_read(level.offset, *level.out), flat_read(level.mask, *level.out)
        y = deform_conv2d(level.x.float(), offset, mask, weight, bias, module.stride)
        results.append(y.to(level.x.dtype))
    return results


class KernelDyConv(nn.Module):
    """A DyConv whose 13 deformable convolutions are three launches: each set of weights serves all its levels.

    Args:
        own: its parameters; the convolution that makes positions becomes fp32.
        convolve: computes the convolutions of one set of weights.
    """

    def __init__(self, own: DyConv, convolve: Convolve) -> None:
        super().__init__()
        own.offset.float()
        self.own, self.convolve = own, convolve

    def forward(self, features: Sequence[Tensor], sizes: LevelSizes) -> list[Tensor]:
        """See `DyConv.forward`."""
        own = self.own
        maps = [x.contiguous(memory_format=torch.channels_last) for x in features]
        positions = [own.offset(x.float()) for x in maps]  # as in an engine: fp16 is too coarse for positions
        offsets = [p[:, : 2 * TAPS].contiguous() for p in positions]
        masks = [p[:, 2 * TAPS :].sigmoid().contiguous() for p in positions]
        last = len(maps) - 1
        rows = {
            "own": [MapLevel(maps[i], offsets[i], masks[i], sizes[i]) for i in range(len(maps))],
            "below": [MapLevel(maps[i - 1], offsets[i], masks[i], sizes[i]) for i in range(1, len(maps))],
            "above": [MapLevel(maps[i + 1], offsets[i], masks[i], sizes[i + 1]) for i in range(last)],
        }
        modules = dict(zip(("above", "own", "below"), cast("Sequence[DeformConvNorm]", own.DyConv), strict=True))
        found = {name: [modules[name].bn(y) for y in self.convolve(modules[name], rows[name])] for name in rows}
        outputs = []
        for i, size in enumerate(sizes):
            branches = [found["own"][i]]
            if i > 0:
                branches.append(found["below"][i - 1])
            if i < last:
                y = found["above"][i]
                branches.append(F.interpolate(y, size=size, mode="bilinear", align_corners=True))
            outputs.append(own.relu(own.combine(branches)))
        return outputs


def use_kernel(model: Glip, convolve: Convolve) -> None:
    """Make every DyConv of a model run on `convolve`, with positions in fp32; other parameters stay as they are."""
    tower = model.rpn.head.dyhead_tower
    for i, module in enumerate(tower):
        if isinstance(module, DyConv):
            tower[i] = KernelDyConv(module, convolve)


def with_library(library: DeformLibrary) -> Convolve:
    """Return a `Convolve` on the GPU; weights are packed when a module is first met."""
    packed: dict[int, Weights] = {}

    def convolve(module: DeformConvNorm, levels: Sequence[MapLevel]) -> list[Tensor]:
        if id(module) not in packed:
            assert module.conv.bias is not None
            packed[id(module)] = library.pack(module.conv.weight, module.conv.bias, module.stride)
        return library.run(packed[id(module)], levels)

    return convolve
