"""The C interface of the deformable convolution (`engines/plugin/glip_deform.h`) in ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["MAX_LEVELS", "DataType", "Layout", "Level", "LevelStruct", "ProblemStruct", "Shape", "problem"]

MAX_LEVELS = 8


class DataType(IntEnum):
    """Type of features, weights, bias and result, or of offsets and masks."""

    F32 = 0
    F16 = 1
    BF16 = 2


class Layout(IntEnum):
    """Order of the axes of features and result."""

    NCHW = 0
    NHWC = 1


class LevelStruct(ctypes.Structure):
    """`GlipDeformLevel`."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("x_batch_stride", ctypes.c_longlong),
        ("offset_batch_stride", ctypes.c_longlong),
        ("mask_batch_stride", ctypes.c_longlong),
        ("y_batch_stride", ctypes.c_longlong),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("out_height", ctypes.c_int),
        ("out_width", ctypes.c_int),
    )


class ProblemStruct(ctypes.Structure):
    """`GlipDeformProblem`."""

    _fields_ = (
        ("batch", ctypes.c_int),
        ("in_channels", ctypes.c_int),
        ("out_channels", ctypes.c_int),
        ("kernel_height", ctypes.c_int),
        ("kernel_width", ctypes.c_int),
        ("stride_height", ctypes.c_int),
        ("stride_width", ctypes.c_int),
        ("pad_top", ctypes.c_int),
        ("pad_left", ctypes.c_int),
        ("dilation_height", ctypes.c_int),
        ("dilation_width", ctypes.c_int),
        ("data_type", ctypes.c_int),
        ("position_type", ctypes.c_int),
        ("x_layout", ctypes.c_int),
        ("y_layout", ctypes.c_int),
        ("mask_logits", ctypes.c_int),
        ("num_levels", ctypes.c_int),
        ("levels", LevelStruct * MAX_LEVELS),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Shape:
    """What all levels of a problem have in common; the defaults are GLIP's."""

    in_channels: int
    out_channels: int
    batch: int = 1
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    pad: int = 1
    dilation: int = 1
    data_type: DataType = DataType.F32
    position_type: DataType = DataType.F32
    x_layout: Layout = Layout.NCHW
    y_layout: Layout = Layout.NCHW
    mask_logits: bool = False
    """Whether masks are given before their sigmoid."""


@dataclass(frozen=True)
class Level:
    """One feature map: addresses and sizes. A batch stride of 0 means that images are contiguous."""

    x: int
    offset: int
    mask: int | None
    y: int
    size: tuple[int, int]
    """Height and width of the features."""
    out_size: tuple[int, int]
    offset_batch_stride: int = 0
    """In elements; for a flat read, that of the larger map."""
    mask_batch_stride: int = 0


def problem(shape: Shape, levels: Sequence[Level], weight: int = 0, bias: int | None = None) -> ProblemStruct:
    """Return a problem for the C interface. Buffers stay the caller's and must outlive the call that uses it.

    Args:
        shape: what all levels have in common.
        levels: at most `MAX_LEVELS`.
        weight: address of packed weights.
        bias: address of (out_channels,) numbers, or None.

    Raises:
        ValueError: too many levels.
    """
    if len(levels) > MAX_LEVELS:
        raise ValueError(f"{len(levels)} levels; legal is 1 to {MAX_LEVELS}")
    structs = (LevelStruct * MAX_LEVELS)()
    for i, level in enumerate(levels):
        structs[i] = LevelStruct(
            level.x,
            level.offset,
            level.mask,
            level.y,
            0,
            level.offset_batch_stride,
            level.mask_batch_stride,
            0,
            *level.size,
            *level.out_size,
        )
    return ProblemStruct(
        shape.batch,
        shape.in_channels,
        shape.out_channels,
        *shape.kernel,
        shape.stride,
        shape.stride,
        shape.pad,
        shape.pad,
        shape.dilation,
        shape.dilation,
        shape.data_type,
        shape.position_type,
        shape.x_layout,
        shape.y_layout,
        shape.mask_logits,
        len(levels),
        structs,
        weight,
        bias,
    )
