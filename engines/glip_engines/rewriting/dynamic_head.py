"""The layers of a graph's dynamic head, found by their structure, with the weights of every part.

A layer convolves each pyramid level's map, and its neighbors', deformably; normalizes the results in groups; adds them,
each weighted by its level attention; and applies DyReLU. `glip_export.model.dyhead` is what the exporter traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import BundleError
from glip_engines.rewriting.deformable import Deformable, deformable_nodes
from glip_engines.rewriting.edit import before_widening

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

__all__ = ["Attention", "Branch", "Layer", "find_layers"]

_MOVES = ("Cast", "Flatten", "Reshape", "Sigmoid", "Slice")
"""What may stand between the convolution that makes offsets and masks, and the deformable one that uses them."""


@dataclass(frozen=True)
class Branch:
    """One of a layer's three deformable convolutions, with the group norm that follows; levels share its weights."""

    node: onnx_ir.Node
    """A `DeformConv` of it."""
    parts: Deformable
    norm: onnx_ir.Node
    """The `InstanceNormalization` after that."""
    groups: int
    epsilon: float
    gamma: Array
    """(C,)."""
    beta: Array


@dataclass(frozen=True)
class Attention:
    """What scales whole maps: level attention and DyReLU."""

    weight: Array
    """(C,), of the level attention."""
    bias: float
    squeeze: tuple[Array, Array]
    """(C, S) and (S,): DyReLU's first linear layer."""
    excite: tuple[Array, Array]
    """(S, 4 C) and (4 C,): its second."""


@dataclass(frozen=True)
class Layer:
    """One DyConv over all levels, from the largest map to the smallest."""

    maps: tuple[onnx_ir.Value, ...]
    """What it reads, (B, C, H, W) each."""
    convolutions: tuple[onnx_ir.Node, ...]
    """Of each level: makes 2 * taps offsets, then taps masks before their sigmoid."""
    branches: dict[int, Branch]
    """By what level i reads: 0 for its own map, -1 for the larger one before it, 1 for the smaller one after it."""
    attention: Attention
    outputs: tuple[onnx_ir.Node, ...]
    """Of each level: the last node."""


def find_layers(model: onnx_ir.Model) -> list[Layer]:
    """Return the layers of a graph in their order.

    Raises:
        BundleError: a deformable convolution that is not part of a layer as `glip-export` writes it.
    """
    layers: dict[onnx_ir.Value | None, list[tuple[onnx_ir.Node, Deformable, onnx_ir.Node]]] = {}
    for node in deformable_nodes(model):
        parts = Deformable.of(node)
        makers = {_maker(node, value) for value in (parts.offset, parts.mask)}
        if len(makers) != 1:
            raise _unlike(node, "its offsets and masks are not of one convolution")
        maker = makers.pop()
        layers.setdefault(maker.inputs[1], []).append((node, parts, maker))
    return [_read_layer(found) for found in layers.values()]


def _read_layer(found: list[tuple[onnx_ir.Node, Deformable, onnx_ir.Node]]) -> Layer:
    convolutions = tuple(dict.fromkeys(maker for _, _, maker in found))  # in the graph's order: level by level
    maps = tuple(before_widening(_input(maker, 0)) for maker in convolutions)
    if len(set(maps)) != len(maps):
        raise _unlike(found[0][0], "two levels read one map")
    nodes: dict[int, dict[int, onnx_ir.Node]] = {}
    parts_of: dict[int, Deformable] = {}
    for node, parts, maker in found:
        if parts.x not in maps:
            raise _unlike(node, "it reads a map that is no level's")
        level, reads = convolutions.index(maker), maps.index(parts.x) - convolutions.index(maker)
        first = parts_of.setdefault(reads, parts)
        if (first.weight, first.bias, first.attributes) != (parts.weight, parts.bias, parts.attributes):
            raise _unlike(node, "levels do not share its weights")
        nodes.setdefault(reads, {})[level] = node
    count = len(maps)
    wanted = {0: range(count), -1: range(1, count), 1: range(count - 1)}
    if {reads: sorted(levels) for reads, levels in nodes.items()} != {r: list(levels) for r, levels in wanted.items()}:
        raise _unlike(found[0][0], "not every level reads its neighbors and itself")
    branches = {reads: _read_branch(nodes[reads], parts_of[reads]) for reads in wanted}
    if branches[0].parts.mask is None or any(branch.parts.bias is None for branch in branches.values()):
        raise _unlike(found[0][0], "it has no masks or no bias")
    tails = [_Tail.of(nodes[0][level]) for level in range(count)]
    if any(not np.array_equal(a, b) for tail in tails for a, b in zip(tail.arrays(), tails[0].arrays(), strict=True)):
        raise _unlike(found[0][0], "levels do not share level attention and DyReLU")
    return Layer(maps, convolutions, branches, tails[0].attention, tuple(tail.output for tail in tails))


def _read_branch(nodes: dict[int, onnx_ir.Node], parts: Deformable) -> Branch:
    """Read the group norm of a branch; all levels must have the same."""
    norms = []
    for node in nodes.values():
        split = _next(node, "Reshape")
        norm = _next(split, "InstanceNormalization")
        scale = _next(_next(norm, "Reshape"), "Mul")
        shift = _next(scale, "Add")
        groups, ones, zeros = _constant(split, 1), _constant(norm, 1), _constant(norm, 2)
        if groups.tolist() != [0, len(ones), -1] or not (ones == 1).all() or zeros.any():
            raise _unlike(node, "no group norm follows it")
        norms.append((norm, len(ones), norm.attributes["epsilon"].as_float(), _factor(scale), _factor(shift)))
    first = norms[0]
    for other in norms[1:]:
        if other[1:3] != first[1:3] or not all(np.array_equal(a, b) for a, b in zip(other[3:], first[3:], strict=True)):
            raise _unlike(other[0], "levels do not share a group norm")
    return Branch(next(iter(nodes.values())), parts, *first)


@dataclass(frozen=True)
class _Tail:
    """What follows a level's own group norm, down to its output."""

    attention: Attention
    output: onnx_ir.Node

    @classmethod
    def of(cls, node: onnx_ir.Node) -> _Tail:
        normalized = node
        for operator in ("Reshape", "InstanceNormalization", "Reshape", "Mul", "Add"):
            normalized = _next(normalized, operator)
        projection = _next(_next(normalized, "ReduceMean"), "Conv")
        total = _next(_next(normalized, "Mul"), "Add")
        while not any(user.op_type == "ReduceMean" for user in _users(total)):
            total = _next(total, "Add")
        squeeze = _next(_next(total, "ReduceMean"), "Gemm")
        excite = _next(_next(squeeze, "Relu"), "Gemm")
        ends = {_next(_next(user, "Add"), "Max") for user in _users(total) if user.op_type == "Mul"}
        kinds = Counter(user.op_type for user in _users(total))
        if len(ends) != 1 or kinds != {"ReduceMean": 1, "Mul": 2}:
            raise _unlike(node, "no DyReLU follows it")
        weights = [(_constant(gemm, 1).T, _constant(gemm, 2)) for gemm in (squeeze, excite)]
        attention = Attention(
            _constant(projection, 1).reshape(-1), float(_constant(projection, 2)[0]), weights[0], weights[1]
        )
        return cls(attention, ends.pop())

    def arrays(self) -> tuple[Any, ...]:
        """Return all weights, to compare."""
        a = self.attention
        return (a.weight, a.bias, *a.squeeze, *a.excite)


def _unlike(node: onnx_ir.Node, why: str) -> BundleError:
    return BundleError(
        f"{node.op_type} {node.name}: {why}, so it belongs to no layer that the plugin computes;"
        " export the bundle with glip-export, or build it with --form native"
    )


def _input(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _maker(node: onnx_ir.Node, value: onnx_ir.Value | None) -> onnx_ir.Node:
    """Return the convolution that makes offsets or masks."""
    maker = value.producer() if value is not None else None
    while maker is not None and maker.op_type in _MOVES:
        maker = _input(maker, 0).producer()
    if maker is None or maker.op_type != "Conv":
        raise _unlike(node, "its offsets and masks are of no convolution")
    return maker


def _users(node: onnx_ir.Node) -> Iterator[onnx_ir.Node]:
    """Yield what reads a node's output, through casts."""
    for user, _ in node.outputs[0].uses():
        if user.op_type == "Cast":
            yield from _users(user)
        else:
            yield user


def _next(node: onnx_ir.Node, operator: str) -> onnx_ir.Node:
    found = {user for user in _users(node) if user.op_type == operator}
    if len(found) != 1:
        raise _unlike(node, f"{len(found)} {operator} read it where one does")
    return found.pop()


def _constant(node: onnx_ir.Node, index: int) -> NDArray[Any]:
    value = _input(node, index)
    if value.const_value is None:
        raise _unlike(node, f"input {index} is not constant")
    array = value.const_value.numpy()
    return array if array.dtype.kind == "i" else array.astype(np.float32)


def _factor(node: onnx_ir.Node) -> Array:
    """Return the constant of a product or a sum, one number per channel."""
    index = next((i for i, value in enumerate(node.inputs) if value is not None and value.const_value is not None), -1)
    return np.asarray(_constant(node, max(index, 0)), np.float32).reshape(-1)
