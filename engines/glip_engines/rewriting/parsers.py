"""The graph in the operators that the ONNX parser of a TensorRT version knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from glip_engines.rewriting.edit import Writer, clean, replace

if TYPE_CHECKING:
    import onnx_ir

    from glip_engines.flavours import Dialect
    from glip_engines.rewriting.edit import Constants

__all__ = ["for_parser"]


def for_parser(model: onnx_ir.Model, dialect: Dialect) -> onnx_ir.Model:
    """Express what a parser refuses by other operators; the results stay the same.

    - uint8 may enter a network and be cast, nothing else: frames are cast first.
    - TensorRT 10.0 to 10.5 may refuse layer norms: they are written out, in fp32.
    - TensorRT 8.6 reads opset 17: Gelu is written out, and axes of reductions, which are inputs since, are attributes.

    Args:
        model: after `use_plugin` or `use_native_ops`; changed.
        dialect: of the TensorRT that will read it.
    """
    import onnx_ir

    graph = model.graph
    constants: Constants = {}
    for value in graph.inputs:
        users = list(value.uses())
        if value.dtype == onnx_ir.DataType.UINT8 and users:
            first = min((user for user, _ in users), key=list(graph).index)
            wide = Writer(graph, first, constants).cast(value, onnx_ir.DataType.FLOAT)
            for user, index in users:
                user.replace_input_with(index, wide)
    if dialect.may_refuse_layer_norms:
        return _without_layer_norms(model)
    return _as_opset_17(model) if dialect.is_8 else model


def _without_layer_norms(model: onnx_ir.Model) -> onnx_ir.Model:
    """Write out every LayerNormalization over the last axis, in fp32 whatever the type of its data."""
    import onnx_ir

    graph = model.graph
    constants: Constants = {}
    single = onnx_ir.DataType.FLOAT
    for node in list(graph):
        axis, epsilon = node.attributes.get("axis"), node.attributes.get("epsilon")
        if node.op_type != "LayerNormalization" or (axis is not None and axis.as_int() != -1):
            continue
        x, scale, bias = [*node.inputs, None][:3]
        assert x is not None
        assert scale is not None
        data = scale.dtype or single
        writer = Writer(graph, node, constants)
        last = writer.constant([-1], np.int64)
        wide = writer.cast(x, single, data)
        centered = writer.op("Sub", wide, writer.op("ReduceMean", wide, last))
        variance = writer.op("ReduceMean", writer.op("Mul", centered, centered), last)
        floor = writer.constant(1e-5 if epsilon is None else epsilon.as_float(), np.float32)
        y = writer.op("Div", centered, writer.op("Sqrt", writer.op("Add", variance, floor)))
        y = writer.op("Mul", y, writer.cast(scale, single, data))
        if bias is not None:
            y = writer.op("Add", y, writer.cast(bias, single, data))
        replace(node, writer.cast(y, data, single), graph)
    return clean(model)


def _as_opset_17(model: onnx_ir.Model) -> onnx_ir.Model:
    import onnx_ir

    graph = model.graph
    constants: Constants = {}
    for node in list(graph):
        if node.op_type == "Gelu":
            replace(node, _gelu(Writer(graph, node, constants), node.inputs[0]), graph)
        elif node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.inputs) > 1:
            axes = node.inputs[1]
            assert axes is not None
            assert axes.const_value is not None
            node.attributes["axes"] = onnx_ir.AttrInt64s("axes", axes.const_value.numpy().tolist())
            node.resize_inputs(1)
        elif node.op_type == "Split":
            node.attributes.pop("num_outputs", None)  # equal parts are the default of opset 13
    model.opset_imports[""] = 17
    for node in graph:
        if node.domain == "":
            node.version = None
    return clean(model)


def _gelu(writer: Writer, x: onnx_ir.Value | None) -> onnx_ir.Value:
    """Write out x * (1 + erf(x / sqrt(2))) / 2."""
    import onnx_ir

    assert x is not None
    single = onnx_ir.DataType.FLOAT
    data = x.dtype or single
    wide = writer.cast(x, single, data)
    cdf = writer.op("Erf", writer.op("Mul", wide, writer.constant(0.5**0.5, np.float32)))
    doubled = writer.op("Mul", wide, writer.op("Add", cdf, writer.constant(1, np.float32)))
    return writer.cast(writer.op("Mul", doubled, writer.constant(0.5, np.float32)), data, single)
