"""Deformable convolution in the operators an engine is built with: the plugin's, or TensorRT's own.

A bundle's graph has the standard `DeformConv`. Every function changes the model it is given and returns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import BundleError
from glip_deploy.frames.geometry import ceil_to
from glip_engines.rewriting.edit import Writer, before_widening, clean, replace

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from glip_engines.rewriting.edit import Constants

__all__ = [
    "PLUGIN_DOMAIN",
    "PLUGIN_OPERATOR",
    "PLUGIN_VERSION",
    "Deformable",
    "deformable_nodes",
    "pack_weights",
    "use_native_ops",
]

PLUGIN_DOMAIN = "glip"
PLUGIN_OPERATOR = "ModulatedDeformConv"
PLUGIN_VERSION = 3
_CHANNEL_STEP, _OUTPUT_STEP = 32, 64
"""What packed weights pad their input and output channels to; kChannelStep and kOutputStep of plugin/deform_math.h."""


@dataclass(frozen=True)
class Deformable:
    """The parts of a standard `DeformConv` node."""

    x: onnx_ir.Value
    weight: onnx_ir.Value
    offset: onnx_ir.Value
    bias: onnx_ir.Value | None
    mask: onnx_ir.Value | None
    dtype: onnx_ir.DataType
    """Of the node as the graph has it."""
    data: onnx_ir.DataType
    """Of `x` and `weight`, before a graph in half precision widened them for this node."""
    kernel: tuple[int, int]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    @property
    def attributes(self) -> tuple[tuple[int, ...], ...]:
        """Kernel, strides, pads and dilations."""
        return self.kernel, self.strides, self.pads, self.dilations

    @property
    def taps(self) -> int:
        """Number of positions the kernel reads."""
        return self.kernel[0] * self.kernel[1]

    @classmethod
    def of(cls, node: onnx_ir.Node) -> Deformable:
        """Read the parts of a node.

        Raises:
            BundleError: an attribute that engines are not built with.
        """
        import onnx_ir

        x, weight, offset, bias, mask = [*node.inputs, None, None][:5]
        assert x is not None
        assert weight is not None
        assert offset is not None

        def attribute(name: str, default: Sequence[int]) -> tuple[int, ...]:
            given = node.attributes.get(name)
            return tuple(default if given is None else given.as_ints())

        for name in ("group", "offset_group"):
            given = node.attributes.get(name)
            if given is not None and given.as_int() != 1:
                raise BundleError(
                    f"DeformConv {node.name}: {name} is {given.as_int()}, an engine takes 1 only;"
                    " export the bundle with glip-export"
                )
        sides = () if weight.shape is None else weight.shape[2:]
        kernel = attribute("kernel_shape", [side for side in sides if isinstance(side, int)])
        if len(kernel) != 2:
            raise BundleError(
                f"DeformConv {node.name}: kernel_shape is {list(kernel)}, an engine takes two known sides;"
                " export the bundle with glip-export"
            )
        dtype = x.dtype or onnx_ir.DataType.FLOAT
        data = dtype
        narrow_x, narrow_weight = before_widening(x), before_widening(weight)
        if narrow_x.dtype is not None and narrow_x.dtype == narrow_weight.dtype:
            x, weight, data = narrow_x, narrow_weight, narrow_x.dtype
        return cls(
            x,
            weight,
            offset,
            bias,
            mask,
            dtype,
            data,
            (kernel[0], kernel[1]),
            attribute("strides", (1, 1)),
            attribute("pads", (0, 0, 0, 0)),
            attribute("dilations", (1, 1)),
        )


def deformable_nodes(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """Return the standard `DeformConv` nodes of a graph, in its order."""
    return [node for node in model.graph if node.op_type == "DeformConv" and node.domain == ""]


def pack_weights(weight: NDArray[Any]) -> NDArray[Any]:
    """Return (O, I, h, w) weights as the kernels read them: (h * w, I, O), channels padded with zeros.

    The same as `glip_deform_pack_weights` of plugin/glip_deform.h.
    """
    out, channels, height, width = weight.shape
    packed = np.zeros((height * width, ceil_to(channels, _CHANNEL_STEP), ceil_to(out, _OUTPUT_STEP)), weight.dtype)
    packed[:, :channels, :out] = weight.reshape(out, channels, -1).transpose(2, 1, 0)
    return packed


def use_native_ops(model: onnx_ir.Model) -> onnx_ir.Model:
    """Turn every `DeformConv` into plain operators: one GridSample of all taps, the mask, one MatMul.

    Positions, sampling and modulation are fp32; the MatMul has the data's type, its bias is added in fp32. Sizes stay
    dynamic and may be 1. The grid is normalized with align_corners=0, whose scale 2/size exists for a size of 1 too
    (align_corners=1 divides by size - 1); GridSample's zero padding is the rule -1 < coordinate < size with corners
    outside counting as zero.

    GridSample's mode is left to its default. It is bilinear in every opset, but its name changed in opset 20 from
    "bilinear" to "linear", and the parsers of TensorRT 10 and 11 read a name they do not know as nearest neighbor.

    Raises:
        BundleError: an attribute that engines are not built with.
    """
    graph = model.graph
    constants: Constants = {}
    for node in deformable_nodes(model):
        writer = Writer(graph, node, constants)
        replace(node, _sample_and_multiply(writer, Deformable.of(node)), graph)
    return clean(model)


def _sample_and_multiply(writer: Writer, parts: Deformable) -> onnx_ir.Value:
    """Add the nodes of one deformable convolution, (B, Cin, H, W) to (B, Cout, h, w)."""
    import onnx_ir

    single = onnx_ir.DataType.FLOAT
    offset = writer.cast(parts.offset, single, parts.dtype)
    height, width = (writer.size(offset, axis) for axis in (2, 3))
    grids = [
        _normalized_positions(writer, parts, offset, axis, side)
        for axis, side in ((1, width), (0, height))  # GridSample wants x before y
    ]
    grid = writer.op("Concat", *grids, attributes=[onnx_ir.AttrInt64("axis", -1)])  # (B, taps, h, w, 2)
    tall = writer.vector(0, -1, width, 2)
    sampled = writer.op(
        "GridSample",
        writer.cast(parts.x, single, parts.data),
        writer.op("Reshape", grid, tall),
        attributes=[
            onnx_ir.AttrString("padding_mode", "zeros"),
            onnx_ir.AttrInt64("align_corners", 0),
        ],
    )  # (B, Cin, taps * h, w)
    if parts.mask is not None:
        mask = writer.cast(parts.mask, single, parts.dtype)
        sampled = writer.op("Mul", sampled, writer.op("Reshape", mask, writer.vector(0, 1, -1, width)))
    sampled = writer.cast(sampled, parts.data, single)
    # Channel-major, tap-minor: the weight's own order.
    shape = writer.vector(0, -1, writer.op("Mul", height, width))
    columns = writer.op("Reshape", sampled, shape, dtype=parts.data)
    weight = writer.reshape(parts.weight, 0, -1, dtype=parts.data)
    product = writer.op("MatMul", weight, columns, dtype=parts.data)  # (B, Cout, h * w)
    product = writer.op("Reshape", product, writer.vector(0, 0, height, width), dtype=parts.data)
    product = writer.cast(product, single, parts.data)
    if parts.bias is not None:
        bias = writer.cast(parts.bias, single, parts.dtype)
        product = writer.op("Add", product, writer.reshape(bias, -1, 1, 1))
    return writer.cast(product, parts.dtype, single)


def _normalized_positions(
    writer: Writer, parts: Deformable, offset: onnx_ir.Value, axis: int, side: onnx_ir.Value
) -> onnx_ir.Value:
    """Return where every tap reads along one axis, (B, taps, h, w, 1) in GridSample's units.

    Args:
        writer: adds the nodes.
        parts: the convolution.
        offset: (B, 2 * taps, h, w) fp32.
        axis: 0 for y, 1 for x.
        side: h or w.
    """
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
    tap_line = writer.op("Add", writer.constant(start, np.float32), line)  # (taps, h, 1) or (taps, 1, w)
    size = writer.op("Cast", writer.size(parts.x, 2 + axis), attributes=[onnx_ir.AttrInt64("to", single)], dtype=single)
    # (2 * (tap_line + offset) + 1) / size - 1, arranged so that the large tensor needs one product and one sum.
    scale = writer.op("Div", writer.constant(2, np.float32), size)
    half_off = writer.op("Add", tap_line, writer.constant(0.5, np.float32))
    base = writer.op("Sub", writer.op("Mul", half_off, scale), writer.constant(1, np.float32))
    first, last = writer.constant([axis], np.int64), writer.constant([2 * parts.taps], np.int64)
    along, step = writer.constant([1], np.int64), writer.constant([2], np.int64)
    grid = writer.op("Add", writer.op("Mul", writer.op("Slice", offset, first, last, along, step), scale), base)
    # Beyond -2 and 2 all samples are zero; clipped, no position is too large for an integer.
    grid = writer.op("Clip", grid, writer.constant(-2, np.float32), writer.constant(2, np.float32))
    return writer.op("Unsqueeze", grid, writer.constant([-1], np.int64))
