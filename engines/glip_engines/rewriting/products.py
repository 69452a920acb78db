"""Matrix products that TensorRT would compute too coarsely, or cannot compute, as they are written.

Fusion updates the text from all locations of the image: (heads x tokens) by locations, 22,400 of them at 800x1344, by
256 channels. That is so small a result of so long a sum that a GPU computes it on two of its multiprocessors.
`over_locations_in_parts` cuts the sum into parts that are computed side by side and added. So that cutting
moves nothing, the softmax is computed in the order of its scores, locations first.

In a strongly typed network an fp16 product may be summed in fp16. That suffices for the few hundred terms of nearly all
of them, but not in that product, whose factors are near 4e-5. The factors of each part are cast to fp32 and its result
back, which asks for a product of fp16 numbers with sums in fp32. (TensorRT-RTX reads it so: it builds it for Turing,
where it refuses products of fp32 numbers. Without the cast back it takes it for one of these.) The parts are added in
fp32.

TensorRT-RTX on Turing (SM75) multiplies matrices in half precision only. Symptom: "Cannot compile operation ... for
Turing (SM75): FP32 GEMM is not supported". The products of the fp32 islands are small (the classifiers of DyReLU, the
alignment of tokens and locations, class scores), so they are written as a broadcast product and a sum, still in fp32.
The builder fuses the two: the broadcast product takes no memory (the activation memory of an engine for 128 tokens and
16,800 locations is that of the output alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from glip_export.stages import stage_of

from glip_deploy.bundle.contract import Stage
from glip_deploy.errors import BundleError
from glip_engines.rewriting.edit import Writer, before_widening, clean, replace

if TYPE_CHECKING:
    import onnx_ir

    from glip_engines.rewriting.edit import Constants

__all__ = ["over_locations_in_parts", "products_as_sums"]

_PARTS = 21
"""Every canvas has more locations than this (the sides are multiples of 32), so that no part is empty, nor the rest."""


def over_locations_in_parts(model: onnx_ir.Model) -> onnx_ir.Model:
    """Compute products over all locations in parts, and sum those of fp16 numbers in fp32.

    Args:
        model: a graph with stages, in any precision; changed.
    """
    graph = model.graph
    constants: Constants = {}
    for node in list(graph):
        left, right = [*node.inputs, None, None][:2]
        if node.op_type == "MatMul" and left is not None and right is not None and _is_over_locations(left):
            shares = _by_location(left, graph, constants)
            replace(node, _in_parts(Writer(graph, node, constants), shares, right), graph)
    return clean(model)


def _in_parts(writer: Writer, left: onnx_ir.Value, right: onnx_ir.Value) -> onnx_ir.Value:
    """Multiply (B, N, M), transposed, by (B, N, C): `_PARTS` equal parts of N side by side, and what is left of it."""
    import onnx_ir

    half, single = onnx_ir.DataType.FLOAT16, onnx_ir.DataType.FLOAT
    kind = left.dtype or single
    factors = single if kind == half else kind  # products of bf16 numbers are summed in fp32 as they are
    zero, one = writer.constant([0], np.int64), writer.constant([1], np.int64)
    parts = writer.constant([_PARTS], np.int64)
    count = writer.size(right, 1)
    size = writer.op("Div", writer.op("Sub", count, one), parts)
    whole = writer.op("Mul", size, parts)
    shape = writer.vector(0, _PARTS, size, -1)

    def multiply(values: Sequence[onnx_ir.Value], order: Sequence[int]) -> onnx_ir.Value:
        """Multiply the first value, its axes in this order, by the second."""
        turned = writer.op("Transpose", values[0], attributes=[onnx_ir.AttrInt64s("perm", order)], dtype=kind)
        product = writer.op("MatMul", *(writer.cast(v, factors, kind) for v in (turned, values[1])), dtype=factors)
        return writer.cast(writer.cast(product, kind, factors), single)

    first = [writer.op("Slice", value, zero, whole, one, dtype=kind) for value in (left, right)]
    last = [writer.op("Slice", value, whole, count, one, dtype=kind) for value in (left, right)]
    apart = [writer.op("Reshape", value, shape, dtype=kind) for value in first]
    keep = onnx_ir.AttrInt64("keepdims", 0)
    total = writer.op("ReduceSum", multiply(apart, (0, 1, 3, 2)), one, attributes=[keep], dtype=single)
    return writer.cast(writer.op("Add", total, multiply(last, (0, 2, 1)), dtype=single), kind, single)


def _by_location(value: onnx_ir.Value, graph: onnx_ir.Graph, constants: Constants) -> onnx_ir.Value:
    """Return a softmax over locations, (B, M, N), as (B, N, M), computed in that order, which its scores are in."""
    import onnx_ir

    softmax, kind = value.producer(), value.dtype
    while softmax is not None and softmax.op_type != "Softmax" and softmax.inputs[0] is not None:
        softmax = softmax.inputs[0].producer()
    assert softmax is not None
    scores = softmax.inputs[0]
    assert scores is not None
    writer, wide = Writer(graph, softmax, constants), scores.dtype
    source = before_widening(scores)
    turn = source.producer()
    if turn is not None and turn.op_type == "Transpose" and tuple(turn.attributes["perm"].as_ints()) == (0, 2, 1):
        scores = turn.inputs[0]
        assert scores is not None
        scores = scores if wide is None else writer.cast(scores, wide)
    else:
        order = onnx_ir.AttrInt64s("perm", (0, 2, 1))
        scores = writer.op("Transpose", scores, attributes=[order], dtype=wide)
    along = onnx_ir.AttrInt64("axis", 1)
    shares = writer.op("Softmax", scores, attributes=[along], dtype=wide)
    return shares if kind is None else writer.cast(shares, kind, onnx_ir.DataType.FLOAT)


def _is_over_locations(value: onnx_ir.Value) -> bool:
    """Return whether a value is the softmax over locations, cast or moved."""
    node = value.producer()
    while node is not None and node.op_type in ("Cast", "Reshape", "Transpose") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "Softmax" and stage_of(node) is Stage.FUSION_SOFTMAX


def products_as_sums(model: onnx_ir.Model) -> onnx_ir.Model:
    """Turn every fp32 MatMul and Gemm into Mul and ReduceSum.

    Args:
        model: a graph in fp16, lowered and rewritten; changed.

    Raises:
        BundleError: a Gemm that is no linear layer.
    """
    import onnx_ir

    graph = model.graph
    constants: Constants = {}
    halves = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
    for node in list(graph):
        if node.op_type not in ("MatMul", "Gemm") or any(v is not None and v.dtype in halves for v in node.inputs):
            continue
        writer = Writer(graph, node, constants)
        left, right = node.inputs[:2]
        assert left is not None
        assert right is not None
        if node.op_type == "Gemm":
            product = _linear(writer, node, left, right)
        elif right.is_initializer() and right.shape is not None and right.shape.rank() == 1:  # (..., K) by (K,)
            product = _sum(writer, left, right, -1)
        else:  # (..., M, K) by (..., K, N)
            wide = writer.op("Unsqueeze", left, writer.constant([-1], np.int64))
            tall = writer.op("Unsqueeze", right, writer.constant([-3], np.int64))
            product = _sum(writer, wide, tall, -2)
        replace(node, product, graph)
    return clean(model)


def _sum(writer: Writer, left: onnx_ir.Value, right: onnx_ir.Value, axis: int) -> onnx_ir.Value:
    import onnx_ir

    keep = onnx_ir.AttrInt64("keepdims", 0)
    return writer.op("ReduceSum", writer.op("Mul", left, right), writer.constant([axis], np.int64), attributes=[keep])


def _linear(writer: Writer, node: onnx_ir.Node, x: onnx_ir.Value, weight: onnx_ir.Value) -> onnx_ir.Value:
    """Write out a Gemm as the exporter makes it of a linear layer: (M, K) by (N, K), plus (N,)."""
    standard = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    given = {**standard, **{name: attribute.value for name, attribute in node.attributes.items()}}
    if given != {**standard, "transB": 1}:
        raise BundleError(f"Gemm {node.name} is no linear layer; export the bundle with glip-export")
    product = _sum(writer, writer.op("Unsqueeze", x, writer.constant([1], np.int64)), weight, -1)
    bias = [value for value in node.inputs[2:] if value is not None]
    return writer.op("Add", product, *bias) if bias else product
