"""The levels of the pyramid in a graph: their sizes, cut out of (B, N, C) and enlarged to one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from glip_engines.rewriting.edit import Writer

if TYPE_CHECKING:
    import onnx_ir

    from glip_engines.rewriting.dynamic_head import Layer

__all__ = ["Geometry", "widened"]


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
        return cls([_shape_of(value, writer) for value in layer.maps], writer)

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


def _shape_of(value: onnx_ir.Value, writer: Writer) -> onnx_ir.Value:
    """Return (B, C, H, W) of a map; of one that was split from (B, N, C), that of the map it was joined of."""
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


def widened(writer: Writer, value: onnx_ir.Value) -> onnx_ir.Value:
    """Return a value in fp32; one of unknown type is."""
    import onnx_ir

    return writer.cast(value, onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT)
