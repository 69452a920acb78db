"""Deformable convolution in plain operators: one GridSample of all taps, the mask, one MatMul.

Positions, sampling and modulation are fp32; the MatMul has the data's type, its bias is added in fp32. Sizes stay
dynamic and may be 1. The grid is normalized with align_corners=0, whose scale 2/size exists for a size of 1 too
(align_corners=1 divides by size - 1); GridSample's zero padding is the rule -1 < coordinate < size with corners
outside counting as zero.

GridSample's mode is left to its default. It is bilinear in every opset, but its name changed in opset 20 from
"bilinear" to "linear", and the parsers of TensorRT 10 and 11 read a name they do not know as nearest neighbor.

What depends on sizes alone is computed once for all layers: maps of one level have one size in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from glip_engines.rewriting.deformable import Deformable, deformable_nodes
from glip_engines.rewriting.edit import Writer, clean, replace
from glip_engines.rewriting.pyramid import shape_of

if TYPE_CHECKING:
    import onnx_ir

    from glip_engines.rewriting.edit import Constants

__all__ = ["use_native_ops"]


def use_native_ops(model: onnx_ir.Model) -> onnx_ir.Model:
    """Turn every `DeformConv` into plain operators.

    Args:
        model: a graph with standard `DeformConv` nodes; changed.

    Raises:
        BundleError: an attribute that engines are not built with.
    """
    graph = model.graph
    constants: Constants = {}
    known = _Known({}, {}, {}, {})
    for node in deformable_nodes(model):
        writer = Writer(graph, node, constants)
        replace(node, _sample_and_multiply(writer, Deformable.of(node), known), graph)
    return clean(model)


@dataclass(frozen=True)
class _Shapes:
    """The size (h, w) of an output, and what is reshaped to it."""

    height: onnx_ir.Value
    """int64 of shape (1,), as the width."""
    width: onnx_ir.Value
    grid: onnx_ir.Value
    """(B, taps * h, w, 2)"""
    mask: onnx_ir.Value
    """(B, 1, taps * h, w)"""
    columns: onnx_ir.Value
    """(B, Cin * taps, h * w)"""
    result: onnx_ir.Value
    """(B, Cout, h, w)"""

    @classmethod
    def of(cls, writer: Writer, shape: onnx_ir.Value) -> _Shapes:
        """Read them from a shape whose last two sides are the output's."""
        height, width = (_side(writer, shape, axis) for axis in (2, 3))
        return cls(
            height,
            width,
            writer.vector(0, -1, width, 2),
            writer.vector(0, 1, -1, width),
            writer.vector(0, -1, writer.op("Mul", height, width)),
            writer.vector(0, 0, height, width),
        )


@dataclass(frozen=True)
class _Known:
    """What earlier convolutions of a graph have made of the shapes of their maps."""

    maps: dict[onnx_ir.Value, onnx_ir.Value]
    """The shape of a map."""
    shapes: dict[onnx_ir.Value, _Shapes]
    """By the output's shape."""
    scales: dict[tuple[onnx_ir.Value, int], onnx_ir.Value]
    """By the input's shape and the axis."""
    bases: dict[tuple[object, ...], onnx_ir.Value]
    """By the output's side, the scale, and how the kernel moves."""

    def shape(self, writer: Writer, value: onnx_ir.Value) -> onnx_ir.Value:
        """Return `shape_of` a map, which is asked for once."""
        if value not in self.maps:
            self.maps[value] = shape_of(value, writer)
        return self.maps[value]


def _side(writer: Writer, shape: onnx_ir.Value, axis: int) -> onnx_ir.Value:
    return writer.op("Gather", shape, writer.constant([axis], np.int64))


def _sample_and_multiply(writer: Writer, parts: Deformable, known: _Known) -> onnx_ir.Value:
    """Add the nodes of one deformable convolution, (B, Cin, H, W) to (B, Cout, h, w)."""
    import onnx_ir

    single = onnx_ir.DataType.FLOAT
    offset = writer.cast(parts.offset, single, parts.dtype)
    shape = known.shape(writer, parts.offset)
    if shape not in known.shapes:
        known.shapes[shape] = _Shapes.of(writer, shape)
    out = known.shapes[shape]
    grids = [
        _normalized_positions(writer, parts, offset, axis, side, known)
        for axis, side in ((1, out.width), (0, out.height))  # GridSample wants x before y
    ]
    grid = writer.op("Concat", *grids, attributes=[onnx_ir.AttrInt64("axis", -1)])  # (B, taps, h, w, 2)
    sampled = writer.op(
        "GridSample",
        writer.cast(parts.x, single, parts.data),
        writer.op("Reshape", grid, out.grid),
        attributes=[
            onnx_ir.AttrString("padding_mode", "zeros"),
            onnx_ir.AttrInt64("align_corners", 0),
        ],
    )  # (B, Cin, taps * h, w)
    if parts.mask is not None:
        mask = writer.cast(parts.mask, single, parts.dtype)
        sampled = writer.op("Mul", sampled, writer.op("Reshape", mask, out.mask))
    sampled = writer.cast(sampled, parts.data, single)
    # Channel-major, tap-minor: the weight's own order.
    columns = writer.op("Reshape", sampled, out.columns, dtype=parts.data)
    weight = writer.reshape(parts.weight, 0, -1, dtype=parts.data)
    product = writer.op("MatMul", weight, columns, dtype=parts.data)  # (B, Cout, h * w)
    product = writer.op("Reshape", product, out.result, dtype=parts.data)
    product = writer.cast(product, single, parts.data)
    if parts.bias is not None:
        bias = writer.cast(parts.bias, single, parts.dtype)
        product = writer.op("Add", product, writer.reshape(bias, -1, 1, 1))
    return writer.cast(product, parts.dtype, single)


def _normalized_positions(
    writer: Writer, parts: Deformable, offset: onnx_ir.Value, axis: int, side: onnx_ir.Value, known: _Known
) -> onnx_ir.Value:
    """Return where every tap reads along one axis, (B, taps, h, w, 1) in GridSample's units.

    Args:
        writer: adds the nodes.
        parts: the convolution.
        offset: (B, 2 * taps, h, w) fp32.
        axis: 0 for y, 1 for x.
        side: h or w.
        known: of the graph.
    """
    # (2 * (tap_line + offset) + 1) / size - 1, arranged so that the large tensor needs one product and one sum.
    shape = known.shape(writer, parts.x)
    if (shape, axis) not in known.scales:
        known.scales[shape, axis] = _scale(writer, shape, axis)
    scale = known.scales[shape, axis]
    key = (side, scale, axis, *parts.attributes)
    if key not in known.bases:
        known.bases[key] = _base(writer, parts, axis, side, scale)
    first, last = writer.constant([axis], np.int64), writer.constant([2 * parts.taps], np.int64)
    along, step = writer.constant([1], np.int64), writer.constant([2], np.int64)
    moved = writer.op("Mul", writer.op("Slice", offset, first, last, along, step), scale)
    # Beyond -2 and 2 all samples are zero; clipped, no position is too large for an integer.
    bounds = (writer.constant(bound, np.float32) for bound in (-2, 2))
    grid = writer.op("Clip", writer.op("Add", moved, known.bases[key]), *bounds)
    return writer.op("Unsqueeze", grid, writer.constant([-1], np.int64))


def _scale(writer: Writer, shape: onnx_ir.Value, axis: int) -> onnx_ir.Value:
    """Return GridSample's units in a pixel of a map, 2 / size."""
    import onnx_ir

    single = onnx_ir.DataType.FLOAT
    side = _side(writer, shape, 2 + axis)
    size = writer.op("Cast", side, attributes=[onnx_ir.AttrInt64("to", single)], dtype=single)
    return writer.op("Div", writer.constant(2, np.float32), size)


def _base(writer: Writer, parts: Deformable, axis: int, side: onnx_ir.Value, scale: onnx_ir.Value) -> onnx_ir.Value:
    """Return where taps without an offset read, (taps, h, 1) or (taps, 1, w)."""
    import onnx_ir

    single = onnx_ir.DataType.FLOAT
    tap = np.arange(parts.taps)
    place = tap // parts.kernel[1] if axis == 0 else tap % parts.kernel[1]
    start = (place * parts.dilations[axis] - parts.pads[axis]).reshape(-1, 1, 1)
    zero, one = writer.constant(0, np.int64), writer.constant(1, np.int64)
    line = writer.op("Range", zero, writer.op("Squeeze", side), one)
    line = writer.op("Cast", line, attributes=[onnx_ir.AttrInt64("to", single)], dtype=single)
    line = writer.op("Mul", line, writer.constant(parts.strides[axis], np.float32))
    line = writer.reshape(line, *((-1, 1) if axis == 0 else (1, -1)))
    tap_line = writer.op("Add", writer.constant(start, np.float32), line)
    half_off = writer.op("Add", tap_line, writer.constant(0.5, np.float32))
    return writer.op("Sub", writer.op("Mul", half_off, scale), writer.constant(1, np.float32))
