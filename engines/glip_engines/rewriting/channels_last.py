"""The dynamic head in one layout, with the plugin: (B, N, C), the locations of all levels one after another.

Fusion works on (B, N, C) already, which is channels-last of every level. The plugin takes the levels that share weights
from that tensor in one call, so a layer is three plugin nodes, and between a layer and a fusion nothing is moved. What
stays per level is the convolution that makes offsets and masks (TensorRT's own, on maps), the statistics, and the last
elementwise pass.

Around the plugin nodes the layer is written anew, in the same arithmetic with its factors put together: group norm and
level attention scale and shift whole channels, so their product is one factor and one summand per channel, made of the
means and variances of the convolutions' results; the mean that DyReLU wants follows from the same means. All of these
are (B, branches, C) numbers in fp32, computed for all branches at once. Each level then needs one elementwise pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from glip_export.stages import inherit

from glip_engines.rewriting.deformable import (
    PLUGIN_DOMAIN,
    PLUGIN_OPERATOR,
    PLUGIN_VERSION,
    pack_weights,
)
from glip_engines.rewriting.dynamic_head import find_layers
from glip_engines.rewriting.edit import Writer, clean, replace
from glip_engines.rewriting.pyramid import Geometry, widened

if TYPE_CHECKING:
    import onnx_ir

    from glip_engines.rewriting.dynamic_head import Attention, Branch, Layer
    from glip_engines.rewriting.edit import Constants

__all__ = ["use_plugin"]


def use_plugin(model: onnx_ir.Model) -> onnx_ir.Model:
    """Turn every layer of the dynamic head into three nodes `glip::ModulatedDeformConv` and what belongs around them.

    Inputs of a node: X (B, N, C), all levels one after another; W, packed (`pack_weights`); the bias (C',); and for
    each level a map (B, 3 * taps, H, W) in fp32, whose first 2 * taps channels are offsets and whose others are masks
    before their sigmoid. X, W, the bias and the output have the data's type; sampling positions in half precision are
    too coarse. Attributes: those of `DeformConv`, out_channels, and `reads`: level i reads level i + reads of X, which
    is 0, 1 or -1. The output (B, N', C') has every level for which there is one to read, in the size of the smaller of
    the two; offsets and masks are read flat where their own map is the larger (docs/internals).

    The parsers of TensorRT 8.6 and 10.0 to 10.9 look a plugin up by the attributes `plugin_namespace` and
    `plugin_version`, later ones by the node's domain too, so a node has all of them.

    Args:
        model: an image graph, in any precision; changed.

    Raises:
        BundleError: an attribute that engines are not built with, or a deformable convolution that is not part of a
            layer as `glip-export` writes it.
    """
    constants: Constants = {}
    layers = find_layers(model)
    previous: _Written | None = None
    geometry: Geometry | None = None
    for layer in layers:
        start = Writer(model.graph, layer.convolutions[0], constants)
        geometry = geometry or Geometry.of(layer, start)
        previous = _LayerWriter(model, layer, geometry, constants).write(previous)
    if layers:
        model.graph.sort()
        model.opset_imports[PLUGIN_DOMAIN] = PLUGIN_VERSION
    return clean(model)


@dataclass(frozen=True)
class _Written:
    """A layer that was written."""

    tokens: onnx_ir.Value
    """(B, N, C)."""
    maps: tuple[onnx_ir.Value, ...]
    """Its levels, as the graph had them."""


class _LayerWriter:
    """Writes one layer anew and puts it in the old one's place."""

    def __init__(self, model: onnx_ir.Model, layer: Layer, geometry: Geometry, constants: Constants) -> None:
        self._model, self._layer, self._geometry = model, layer, geometry
        self._graph = model.graph
        self._count = len(layer.maps)
        self._deform = Writer(model.graph, layer.branches[0].node, constants)
        self._norm = Writer(model.graph, layer.branches[0].norm, constants)
        self._sum = Writer(model.graph, layer.outputs[0], constants)
        self._positions = Writer(model.graph, layer.convolutions[0], constants)
        self._data = layer.branches[0].parts.data
        self._seen: dict[onnx_ir.Value, tuple[onnx_ir.Value, onnx_ir.Value]] = {}
        self._channels = len(layer.attention.weight)

    def write(self, previous: _Written | None) -> _Written:
        """Write it; `previous` is the layer before it, if that was written."""
        layer, sum_ = self._layer, self._sum
        tokens = self._tokens(previous)
        results = {reads: self._convolve(branch, tokens) for reads, branch in layer.branches.items()}
        enlarged = [self._enlarge(results[1], level) for level in range(1, self._count)]
        factors, slopes = self._factors(results, enlarged)
        outputs = [self._level(level, results, enlarged, factors, slopes) for level in range(self._count)]
        import onnx_ir

        along = onnx_ir.AttrInt64("axis", 1)
        joined = sum_.op("Concat", *outputs, attributes=[along], dtype=self._data)
        old = tuple(node.outputs[0] for node in layer.outputs)
        views = [self._geometry.as_map(sum_, output, i, self._channels) for i, output in enumerate(outputs)]
        for level, (node, view) in enumerate(zip(layer.outputs, views, strict=True)):
            for user, _ in list(node.outputs[0].uses()):
                if user.op_type == "Shape":
                    replace(user, self._geometry.shapes[level], self._graph)
            replace(node, view, self._graph)
        _take_joined(views, joined, self._graph)
        return _Written(joined, old)

    # -- input and output -------------------------------------------------------------------------------------------

    def _tokens(self, previous: _Written | None) -> onnx_ir.Value:
        """Return what the layer reads as (B, N, C), and let its convolutions read it too."""
        import onnx_ir

        layer, writer = self._layer, self._positions
        if previous is not None and layer.maps == previous.maps:
            return previous.tokens
        tokens = _split_from(layer.maps)
        if tokens is None:
            flat = [writer.reshape(value, 0, 0, -1, dtype=self._data) for value in layer.maps]
            joined = writer.op("Concat", *flat, attributes=[onnx_ir.AttrInt64("axis", 2)], dtype=self._data)
            order = onnx_ir.AttrInt64s("perm", (0, 2, 1))
            return writer.op("Transpose", joined, attributes=[order], dtype=self._data)
        for level, node in enumerate(layer.convolutions):
            piece = self._geometry.level(writer, tokens, level)
            view = self._geometry.as_map(writer, piece, level, self._channels)
            weight = node.inputs[1]
            assert weight is not None
            node.replace_input_with(0, writer.cast(view, weight.dtype or onnx_ir.DataType.FLOAT, self._data))
        return tokens

    def _convolve(self, branch: Branch, tokens: onnx_ir.Value) -> onnx_ir.Value:
        """Add a plugin node."""
        import onnx_ir

        parts, writer = branch.parts, self._deform
        reads = next(key for key, value in self._layer.branches.items() if value is branch)
        weight, bias = parts.weight.const_value, parts.bias
        assert weight is not None
        assert bias is not None
        packed = writer.initializer(f"{parts.weight.name}_packed", pack_weights(weight.numpy()))
        single = onnx_ir.DataType.FLOAT
        positions = [writer.cast(node.outputs[0], single, single) for node in self._layer.convolutions]
        output = onnx_ir.Value(name=f"{branch.node.outputs[0].name}_plugin", type=onnx_ir.TensorType(self._data))
        attributes = [
            *(onnx_ir.AttrInt64s(name, value) for name, value in zip(_ATTRIBUTES, parts.attributes, strict=True)),
            # Of one group each (`Deformable.of`); parsers warn of attributes that the plugin has and a node lacks.
            onnx_ir.AttrInt64("group", 1),
            onnx_ir.AttrInt64("offset_group", 1),
            onnx_ir.AttrInt64("out_channels", len(branch.gamma)),
            onnx_ir.AttrInt64("reads", reads),
            onnx_ir.AttrString("plugin_namespace", PLUGIN_DOMAIN),
            onnx_ir.AttrString("plugin_version", str(PLUGIN_VERSION)),
        ]
        plugin = onnx_ir.Node(
            PLUGIN_DOMAIN,
            PLUGIN_OPERATOR,
            [tokens, packed, writer.cast(bias, self._data, parts.dtype), *positions],
            attributes,
            outputs=[output],
            name=branch.node.name,
            version=PLUGIN_VERSION,
        )
        branch.node.name = f"{branch.node.name}_standard"  # it is removed later, and names are looked up by
        self._graph.insert_before(branch.node, inherit(plugin, branch.node))
        return output

    def _enlarge(self, result: onnx_ir.Value, level: int) -> onnx_ir.Value:
        """Bring a level of the smaller maps' results to the size of the level before it, as it is: before its norm.

        An enlarged pixel's shares sum to one, so that what is then done to whole channels may be done afterwards.
        """
        piece = self._geometry.level(self._norm, result, level, first=1)
        return self._geometry.enlarge(self._sum, piece, level, self._channels)

    # -- what scales whole channels ---------------------------------------------------------------------------------

    def _factors(
        self, results: dict[int, onnx_ir.Value], enlarged: Sequence[onnx_ir.Value]
    ) -> tuple[onnx_ir.Value, list[onnx_ir.Value]]:
        """Return the factor of every branch of every level, (B, 3 * levels, C), and the rest of a level's own.

        Rows are ordered by `_ORDER`, then by level. Where a level lacks a branch, the row is one of another branch, and
        its attention is zero.

        Returns:
            The factors, and then (B, levels, C) each: the summand; slope and intercept of DyReLU's first line; slope
            and intercept of its second.
        """
        import onnx_ir

        norm, sum_, single = self._norm, self._sum, onnx_ir.DataType.FLOAT
        branches, attention = self._layer.branches, self._layer.attention
        pieces = self._pieces(norm, results)
        means, variances = zip(*(self._moments(piece) for piece in pieces), strict=True)
        along = [onnx_ir.AttrInt64("axis", 1)]
        mean, variance = (norm.op("Concat", *parts, attributes=along, dtype=single) for parts in (means, variances))
        scale, shift = self._normalize(
            mean, variance, [branches[reads] for reads in _ORDER for _ in range(self._count)]
        )
        # What the level attention sees of the smaller map is its mean once it is enlarged.
        seen = list(means)
        for level, whole in enumerate(enlarged):
            seen[_ORDER.index(1) * self._count + level] = self._mean(sum_, widened(sum_, whole))
        pooled = sum_.op("Concat", *seen, attributes=along, dtype=single)
        pooled = self._affine(sum_, pooled, scale, shift)
        strength = sum_.op("MatMul", pooled, sum_.constant(attention.weight[:, None], np.float32), dtype=single)
        strength = sum_.op("Add", strength, sum_.constant(attention.bias, np.float32), dtype=single)
        strength = self._hard_sigmoid(sum_.op("Relu", strength, dtype=single))
        strength = sum_.op("Mul", strength, sum_.constant(self._shares(), np.float32), dtype=single)
        factors = sum_.op("Mul", scale, strength, dtype=single)
        summand = self._over_branches(sum_.op("Mul", shift, strength, dtype=single))
        total = self._over_branches(sum_.op("Mul", pooled, strength, dtype=single))
        return factors, [summand, *self._lines(total, attention)]

    def _pieces(self, writer: Writer, results: dict[int, onnx_ir.Value]) -> list[onnx_ir.Value]:
        """Return results by branch and level: what each level's branch reads, or level 0's own where it has none."""
        own = [self._geometry.level(writer, results[0], level) for level in range(self._count)]
        rest = range(1, self._count)
        larger, smaller = ([self._geometry.level(writer, results[r], i, first=1) for i in rest] for r in (-1, 1))
        return [*own, own[0], *larger, *smaller, own[0]]

    def _moments(self, piece: onnx_ir.Value) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """Return mean and variance of every channel, (B, 1, C); of a piece that was seen before, the same."""
        import onnx_ir

        if piece not in self._seen:
            norm, single = self._norm, onnx_ir.DataType.FLOAT
            wide = widened(norm, piece)
            mean = self._mean(norm, wide)
            centered = norm.op("Sub", wide, mean, dtype=single)
            self._seen[piece] = mean, self._mean(norm, norm.op("Mul", centered, centered, dtype=single))
        return self._seen[piece]

    @staticmethod
    def _mean(writer: Writer, value: onnx_ir.Value, axis: int = 1) -> onnx_ir.Value:
        import onnx_ir

        axes = writer.constant([axis], np.int64)
        keep = [onnx_ir.AttrInt64("keepdims", 1)]
        return writer.op("ReduceMean", value, axes, attributes=keep, dtype=onnx_ir.DataType.FLOAT)

    def _normalize(
        self, mean: onnx_ir.Value, variance: onnx_ir.Value, rows: Sequence[Branch]
    ) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """Return group norm as a factor and a summand per channel, (B, rows, C), of each channel's moments."""
        import onnx_ir

        norm, single = self._norm, onnx_ir.DataType.FLOAT
        first = rows[0]
        size = self._channels // first.groups

        def grouped(value: onnx_ir.Value) -> onnx_ir.Value:
            return norm.reshape(value, 0, 0, first.groups, size, dtype=single)

        mean, variance = grouped(mean), grouped(variance)
        middle = self._mean(norm, mean, 3)
        off = norm.op("Sub", mean, middle, dtype=single)
        spread = norm.op("Add", variance, norm.op("Mul", off, off, dtype=single), dtype=single)
        epsilon = np.array([row.epsilon for row in rows], np.float32).reshape(-1, 1, 1)
        deviation = norm.op("Add", self._mean(norm, spread, 3), norm.constant(epsilon, np.float32), dtype=single)
        deviation = norm.op("Sqrt", deviation, dtype=single)
        gamma, beta = (
            norm.constant(np.stack(values).reshape(len(rows), first.groups, size), np.float32)
            for values in ([row.gamma for row in rows], [row.beta for row in rows])
        )
        scale = norm.op("Div", gamma, deviation, dtype=single)
        shift = norm.op("Sub", beta, norm.op("Mul", middle, scale, dtype=single), dtype=single)
        return norm.reshape(scale, 0, 0, -1, dtype=single), norm.reshape(shift, 0, 0, -1, dtype=single)

    def _shares(self) -> list[list[float]]:
        """Return one over the number of branches of every row's level, 0 where the level has no such branch."""
        has = {reads: [0 <= level + reads < self._count for level in range(self._count)] for reads in _ORDER}
        numbers = [sum(has[reads][level] for reads in _ORDER) for level in range(self._count)]
        return [[has[reads][level] / numbers[level]] for reads in _ORDER for level in range(self._count)]

    def _over_branches(self, rows: onnx_ir.Value) -> onnx_ir.Value:
        """Sum (B, branches * levels, C) over the branches."""
        import onnx_ir

        sum_, single = self._sum, onnx_ir.DataType.FLOAT
        apart = sum_.reshape(rows, 0, len(_ORDER), self._count, -1, dtype=single)
        keep = [onnx_ir.AttrInt64("keepdims", 0)]
        return sum_.op("ReduceSum", apart, sum_.constant([1], np.int64), attributes=keep, dtype=single)

    def _hard_sigmoid(self, value: onnx_ir.Value) -> onnx_ir.Value:
        import onnx_ir

        sum_, single = self._sum, onnx_ir.DataType.FLOAT
        value = sum_.op("Add", value, sum_.constant(3, np.float32), dtype=single)
        value = sum_.op("Clip", value, sum_.constant(0, np.float32), sum_.constant(6, np.float32), dtype=single)
        return sum_.op("Div", value, sum_.constant(6, np.float32), dtype=single)

    def _lines(self, pooled: onnx_ir.Value, attention: Attention) -> list[onnx_ir.Value]:
        """Return slope and intercept of DyReLU's two lines, (B, levels, C) each, of every level's mean."""
        import onnx_ir

        sum_, single = self._sum, onnx_ir.DataType.FLOAT
        hidden = sum_.op("Relu", self._linear(pooled, *attention.squeeze), dtype=single)
        values = self._hard_sigmoid(self._linear(hidden, *attention.excite))
        values = sum_.op("Sub", values, sum_.constant(0.5, np.float32), dtype=single)
        # Slopes are 1 + 2 a and 2 a.
        stretch = np.repeat(np.array([2, 1, 2, 1], np.float32), self._channels)
        raised = np.repeat(np.array([1, 0, 0, 0], np.float32), self._channels)
        values = self._affine(sum_, values, sum_.constant(stretch, np.float32), sum_.constant(raised, np.float32))
        bounds = [sum_.constant([part * self._channels], np.int64) for part in range(5)]
        last = sum_.constant([2], np.int64)
        return [sum_.op("Slice", values, bounds[i], bounds[i + 1], last, dtype=single) for i in range(4)]

    def _linear(self, x: onnx_ir.Value, weight: np.ndarray, bias: np.ndarray) -> onnx_ir.Value:
        import onnx_ir

        sum_, single = self._sum, onnx_ir.DataType.FLOAT
        product = sum_.op("MatMul", x, sum_.constant(np.ascontiguousarray(weight), np.float32), dtype=single)
        return sum_.op("Add", product, sum_.constant(bias, np.float32), dtype=single)

    @staticmethod
    def _affine(writer: Writer, x: onnx_ir.Value, slope: onnx_ir.Value, intercept: onnx_ir.Value) -> onnx_ir.Value:
        import onnx_ir

        single = onnx_ir.DataType.FLOAT
        return writer.op("Add", writer.op("Mul", x, slope, dtype=single), intercept, dtype=single)

    # -- the elementwise pass ---------------------------------------------------------------------------------------

    def _level(
        self,
        level: int,
        results: dict[int, onnx_ir.Value],
        enlarged: Sequence[onnx_ir.Value],
        factors: onnx_ir.Value,
        rest: Sequence[onnx_ir.Value],
    ) -> onnx_ir.Value:
        """Return a level's output, (B, H * W, C): its branches, weighted and added, through DyReLU."""
        import onnx_ir

        sum_, single = self._sum, onnx_ir.DataType.FLOAT

        def row(values: onnx_ir.Value, index: int) -> onnx_ir.Value:
            bounds = (sum_.constant([index + i], np.int64) for i in (0, 1))
            return sum_.op("Slice", values, *bounds, sum_.constant([1], np.int64), dtype=single)

        summand, slope, intercept, other_slope, other_intercept = (row(values, level) for values in rest)
        branches = {0: self._geometry.level(sum_, results[0], level)}
        if level:
            branches[-1] = self._geometry.level(sum_, results[-1], level, first=1)
        if level + 1 < self._count:
            branches[1] = enlarged[level]
        total = summand
        for reads, piece in branches.items():
            factor = row(factors, _ORDER.index(reads) * self._count + level)
            total = sum_.op("Add", sum_.op("Mul", widened(sum_, piece), factor, dtype=single), total, dtype=single)
        lines = (self._affine(sum_, total, slope, intercept), self._affine(sum_, total, other_slope, other_intercept))
        return sum_.cast(sum_.op("Max", *lines, dtype=single), self._data)


_ATTRIBUTES = ("kernel_shape", "strides", "pads", "dilations")
_ORDER = (0, -1, 1)
"""Branches by what they read, in the order of rows."""


def _split_from(maps: Sequence[onnx_ir.Value]) -> onnx_ir.Value | None:
    """Return the (B, N, C) that maps were split from by Transpose, Slice and Reshape, or None if they were not."""
    sources = set()
    for value in maps:
        for operator in ("Reshape", "Slice", "Transpose"):
            node = value.producer()
            if node is None or node.op_type != operator or node.inputs[0] is None:
                return None
            value = node.inputs[0]  # noqa: PLW2901
        assert node is not None
        if tuple(node.attributes["perm"].as_ints()) != (0, 2, 1):
            return None
        sources.add(value)
    return sources.pop() if len(sources) == 1 else None


def _take_joined(maps: Sequence[onnx_ir.Value], tokens: onnx_ir.Value, graph: onnx_ir.Graph) -> None:
    """Where all maps are flattened, joined and transposed to (B, N, C), put `tokens` in that place."""
    for user, _ in list(maps[0].uses()):
        if user.op_type != "Reshape":
            continue
        for joiner, _ in list(user.outputs[0].uses()):
            flat = [value.producer() if value is not None else None for value in joiner.inputs]
            sources = tuple(node.inputs[0] if node is not None and node.op_type == "Reshape" else None for node in flat)
            if joiner.op_type != "Concat" or sources != tuple(maps):
                continue
            for node, _ in list(joiner.outputs[0].uses()):
                if node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == (0, 2, 1):
                    replace(node, tokens, graph)
