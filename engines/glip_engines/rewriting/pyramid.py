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
        self.shapes, self._writer = tuple(shapes), writer
        """(B, C, H, W) of each level."""
        self.sizes = [[writer.op("Gather", s, writer.constant([axis], np.int64)) for axis in (2, 3)] for s in shapes]
        """Height and width of each level, int64 of shape (1,)."""
        self.starts = [writer.constant([0], np.int64)]
        """Of each level, its first location; then the end."""
        for height, width in self.sizes:
            self.starts.append(writer.op("Add", self.starts[-1], writer.op("Mul", height, width)))
        self._corners: tuple[list[onnx_ir.Value], list[onnx_ir.Value]] | None = None
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

    def enlarge(self, writer: Writer, tokens: onnx_ir.Value) -> onnx_ir.Value:
        """Enlarge levels 1 and up to the size of the level before each, bilinearly with aligned corners; fp32."""
        import onnx_ir

        if self._corners is None:
            self._corners = self._find_corners()
        total: onnx_ir.Value | None = None
        for place, share in zip(*self._corners, strict=True):
            read = writer.op("Gather", tokens, place, attributes=[onnx_ir.AttrInt64("axis", 1)], dtype=tokens.dtype)
            part = writer.op("Mul", widened(writer, read), share, dtype=onnx_ir.DataType.FLOAT)
            total = part if total is None else writer.op("Add", total, part, dtype=onnx_ir.DataType.FLOAT)
        assert total is not None
        return total

    def _find_corners(self) -> tuple[list[onnx_ir.Value], list[onnx_ir.Value]]:
        """Return for each of four corners where all enlarged locations read, (N',), and the corner's share, (N', 1)."""
        import onnx_ir

        writer = self._writer
        places: list[list[onnx_ir.Value]] = [[], [], [], []]
        shares: list[list[onnx_ir.Value]] = [[], [], [], []]
        for level in range(1, len(self.sizes)):
            start, width = self._bounds[1][level - 1], self.sizes[level][1]
            rows, columns = (
                self._corners_along(self.sizes[level - 1][axis], self.sizes[level][axis], axis) for axis in (0, 1)
            )
            for corner, (row, column) in enumerate((row, column) for row in rows for column in columns):
                place = writer.op("Add", writer.op("Mul", row[0], width), writer.op("Add", column[0], start))
                places[corner].append(writer.reshape(place, -1))
                shares[corner].append(writer.reshape(writer.op("Mul", row[1], column[1]), -1, 1))
        first = onnx_ir.AttrInt64("axis", 0)
        joined = [[writer.op("Concat", *parts, attributes=[first]) for parts in group] for group in (places, shares)]
        return joined[0], joined[1]

    def _corners_along(
        self, to: onnx_ir.Value, size: onnx_ir.Value, axis: int
    ) -> list[tuple[onnx_ir.Value, onnx_ir.Value]]:
        """Return index and share of the two samples along one axis, shaped (to, 1) or (1, to)."""
        import onnx_ir

        writer, kind = self._writer, onnx_ir.AttrInt64("to", onnx_ir.DataType.FLOAT)
        zero, one = writer.constant(0, np.int64), writer.constant([1], np.int64)
        last, steps = writer.op("Sub", size, one), writer.op("Max", writer.op("Sub", to, one), one)
        line = writer.op("Range", zero, writer.op("Squeeze", to), writer.constant(1, np.int64))
        line = writer.reshape(line, *((-1, 1) if axis == 0 else (1, -1)))
        scaled = writer.op("Mul", line, last)  # position times steps: whole numbers, so nothing is rounded
        before = writer.op("Div", scaled, steps)
        after = writer.op("Min", writer.op("Add", before, one), last)
        rest = writer.op("Sub", scaled, writer.op("Mul", before, steps))
        far = writer.op("Div", writer.op("Cast", rest, attributes=[kind]), writer.op("Cast", steps, attributes=[kind]))
        return [(before, writer.op("Sub", writer.constant(1, np.float32), far)), (after, far)]


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
