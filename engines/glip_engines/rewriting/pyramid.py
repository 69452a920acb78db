"""The levels of the pyramid in a graph: their sizes, cut out of (B, N, C) and enlarged to one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from glip_engines.rewriting.edit import Writer

if TYPE_CHECKING:
    import onnx_ir

    from glip_engines.rewriting.dynamic_head import Layer

__all__ = ["Geometry", "shape_of", "widened"]


class Geometry:
    """Sizes of the levels, and how each map is enlarged to the one before it; the same in all layers."""

    def __init__(self, shapes: Sequence[onnx_ir.Value], writer: Writer) -> None:
        self.shapes = tuple(shapes)
        """(B, C, H, W) of each level."""
        self.sizes = [[writer.op("Gather", s, writer.constant([axis], np.int64)) for axis in (2, 3)] for s in shapes]
        """Height and width of each level, int64 of shape (1,)."""
        self.starts = [writer.constant([0], np.int64)]
        """Of each level, its first location; then the end."""
        for height, width in self.sizes:
            self.starts.append(writer.op("Add", self.starts[-1], writer.op("Mul", height, width)))
        self._bounds = [self.starts, [writer.op("Sub", start, self.starts[1]) for start in self.starts[1:]]]
        self._pieces: dict[tuple[onnx_ir.Value, int], onnx_ir.Value] = {}

    @classmethod
    def of(cls, layer: Layer, writer: Writer) -> Geometry:
        """Read the sizes of a layer's maps: where maps are split from (B, N, C), from what that was joined of."""
        return cls([shape_of(value, writer) for value in layer.maps], writer)

    def level(self, writer: Writer, tokens: onnx_ir.Value, level: int, *, first: int = 0) -> onnx_ir.Value:
        """Return one level of (B, N', C) tokens that begin with level `first`, 0 or 1."""
        if (tokens, level) not in self._pieces:
            bounds = self._bounds[first][level - first : level - first + 2]
            piece = writer.op("Slice", tokens, *bounds, writer.constant([1], np.int64), dtype=tokens.dtype)
            self._pieces[tokens, level] = piece
        return self._pieces[tokens, level]

    def as_map(self, writer: Writer, tokens: onnx_ir.Value, level: int, channels: int) -> onnx_ir.Value:
        """Return a level's (B, H * W, C) tokens as (B, C, H, W)."""
        import onnx_ir

        shape = writer.vector(0, *self.sizes[level], channels)
        last = writer.op("Reshape", tokens, shape, dtype=tokens.dtype)
        order = onnx_ir.AttrInt64s("perm", (0, 3, 1, 2))
        return writer.op("Transpose", last, attributes=[order], dtype=tokens.dtype)

    def enlarge(self, writer: Writer, tokens: onnx_ir.Value, level: int, channels: int) -> onnx_ir.Value:
        """Enlarge a level's (B, H * W, C) to the size of the level before it, bilinearly with aligned corners."""
        import onnx_ir

        last = writer.op("Reshape", tokens, writer.vector(0, *self.sizes[level], channels), dtype=tokens.dtype)
        batch = writer.op("Gather", self.shapes[level], writer.constant([0], np.int64))
        sizes = writer.vector(batch, *self.sizes[level - 1], channels)
        attributes = [
            onnx_ir.AttrString("mode", "linear"),
            onnx_ir.AttrString("coordinate_transformation_mode", "align_corners"),
        ]
        large = writer.op("Resize", last, None, None, sizes, attributes=attributes, dtype=tokens.dtype)
        return writer.reshape(large, 0, -1, channels, dtype=tokens.dtype)


def shape_of(value: onnx_ir.Value, writer: Writer) -> onnx_ir.Value:
    """Return the shape of a map or of another one of the same batch size, height and width, (B, C', H, W).

    One that other maps have too, where it can be found: of a map that was split from (B, N, C), the shape of the map
    it was joined of; of what a convolution that keeps the size gives, or a part of its channels, that of what it reads.
    """
    while _keeps_size(value.producer()):
        value = _first(value.producer())
    node = value.producer()
    if node is not None and node.op_type == "Reshape" and node.inputs[1] is not None:
        sizes = node.inputs[1].producer()
        source = sizes.inputs[2] if sizes is not None and sizes.op_type == "Concat" and len(sizes.inputs) == 4 else None
        maker = source.producer() if source is not None else None
        while maker is not None and maker.op_type in ("Unsqueeze", "Gather") and maker.inputs[0] is not None:
            maker = maker.inputs[0].producer()
        if maker is not None and maker.op_type == "Shape":
            return maker.outputs[0]
    return writer.op("Shape", value)


def _keeps_size(node: onnx_ir.Node | None) -> bool:
    """Return whether a node's output has the batch size, height and width of its first input."""
    if node is None:
        return False

    def attribute(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        given = node.attributes.get(name)
        return default if given is None else tuple(given.as_ints())

    if node.op_type == "Conv":
        kernel, pads = attribute("kernel_shape", ()), attribute("pads", (0, 0, 0, 0))
        same = len(kernel) == 2 and pads == tuple(side // 2 for side in kernel * 2) and all(side % 2 for side in kernel)
        return same and attribute("strides", (1, 1)) == attribute("dilations", (1, 1)) == (1, 1)
    if node.op_type == "Slice":
        axes = node.inputs[3].const_value if len(node.inputs) > 3 and node.inputs[3] is not None else None
        return axes is not None and axes.numpy().tolist() == [1]
    return node.op_type in ("Cast", "Sigmoid")


def _first(node: onnx_ir.Node | None) -> onnx_ir.Value:
    assert node is not None
    value = node.inputs[0]
    assert value is not None
    return value


def widened(writer: Writer, value: onnx_ir.Value) -> onnx_ir.Value:
    """Return a value in fp32; one of unknown type is."""
    import onnx_ir

    return writer.cast(value, onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT)
