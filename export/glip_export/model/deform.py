"""Modulated deformable convolution (DCNv2), as GLIP uses it, in plain torch and as one ONNX node.

`flat_read` is the quirk every port gets wrong: the convolution that looks one level up has a smaller output than the
offset map it is given, and the official CUDA kernel indexes that map's *buffer* with the output's size. The released
weights were trained that way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["KERNEL", "TAPS", "DeformConv", "deform_conv2d", "flat_read"]

DeformConv = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""A deformable convolution: the arguments of `deform_conv2d`, in its order, and its result.

Every module that contains one takes it as an argument, so that another implementation (a kernel, one that trains
faster) can be given. Only `deform_conv2d` itself can be exported.
"""

KERNEL = 3
TAPS = KERNEL * KERNEL


def flat_read(values: Tensor, height: int, width: int) -> Tensor:
    """Reinterpret a (B, C, H, W) map as (B, C, height, width) by its first elements, per image.

    Not a crop and not a resize: element i of the result's buffer is element i of the map's buffer (official
    `deform_conv_kernel_cuda.cu`, which never sees the offset tensor's size).
    """
    channels = int(values.shape[1])  # a number also while a graph is traced, where sizes are nodes
    return values.flatten(1)[:, : height * width * channels].reshape(-1, channels, height, width)


class _OnnxDeformConv(torch.autograd.Function):
    """Becomes the standard ONNX `DeformConv` (opset 19) while a graph is traced; only shapes are computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        return x.new_zeros(x.shape[0], weight.shape[0], offset.shape[2], offset.shape[3])

    @staticmethod
    def symbolic(g: Any, x: Any, offset: Any, mask: Any, weight: Any, bias: Any, stride: int) -> Any:
        shape = {"kernel_shape_i": [KERNEL, KERNEL], "pads_i": [1, 1, 1, 1], "strides_i": [stride, stride]}
        return g.op("DeformConv", x, weight, offset, bias, mask, **shape)


def deform_conv2d(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """Convolve with 3x3 taps moved by `offset` and scaled by `mask`; padding 1, one group.

    A tap reads bilinearly at (integer position + offset), zero unless -1 < coordinate < size, with corners outside
    the map counting as zero.

    Args:
        x: (B, Cin, H, W) features.
        offset: (B, 18, h, w) in pixels of `x`; channels 2k and 2k+1 are dy and dx of tap k, row-major.
        mask: (B, 9, h, w) modulation, after the sigmoid.
        weight: (Cout, Cin, 3, 3).
        bias: (Cout,).
        stride: 1 or 2; h = ceil(H / stride).

    Returns:
        (B, Cout, h, w).
    """
    if torch.onnx.is_in_onnx_export():
        traced: Tensor = _OnnxDeformConv.apply(x, offset, mask, weight, bias, stride)  # type: ignore[no-untyped-call]
        return traced
    if x.is_meta:  # reading taps is no arithmetic that anybody counts, and takes as long as with numbers
        taps = x.new_empty(x.shape[0], weight[0].numel(), offset.shape[2] * offset.shape[3])
        return (weight.flatten(1) @ taps + bias[:, None]).reshape(x.shape[0], -1, *offset.shape[2:])
    return _sample_and_multiply(x, offset, mask, weight, bias, stride)


def _sample_and_multiply(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """Gather the nine taps one by one (so memory stays near one feature map) and accumulate their products."""
    batch, channels, in_h, in_w = x.shape
    out_h, out_w = offset.shape[-2:]
    flat = x.flatten(2)
    rows = torch.arange(out_h, dtype=x.dtype, device=x.device)[:, None] * stride - 1
    columns = torch.arange(out_w, dtype=x.dtype, device=x.device)[None, :] * stride - 1
    out = bias[None, :, None].expand(batch, -1, out_h * out_w)
    for tap in range(TAPS):
        y = rows + tap // KERNEL + offset[:, 2 * tap]
        z = columns + tap % KERNEL + offset[:, 2 * tap + 1]
        top, left = y.floor(), z.floor()
        sampled: Tensor | None = None
        for corner_y, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
            for corner_x, weight_x in ((left, left + 1 - z), (left + 1, z - left)):
                inside = (corner_y >= 0) & (corner_y < in_h) & (corner_x >= 0) & (corner_x < in_w)
                share = (weight_y * weight_x * mask[:, tap]) * inside
                index = corner_y.clamp(0, in_h - 1).long() * in_w + corner_x.clamp(0, in_w - 1).long()
                read = flat.gather(2, index.flatten(1)[:, None].expand(-1, channels, -1))
                part = read * share.flatten(1)[:, None]
                sampled = part if sampled is None else sampled + part
        assert sampled is not None
        out = out + weight[:, :, tap // KERNEL, tap % KERNEL] @ sampled
    return out.reshape(batch, -1, out_h, out_w)
