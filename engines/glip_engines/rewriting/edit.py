"""Small changes to an ONNX graph: adding nodes before one, replacing one, tidying up after."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from glip_export.stages import inherit

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Constants = dict[tuple[str, bytes], onnx_ir.Value]

__all__ = ["Writer", "before_widening", "clean", "replace"]


class Writer:
    """Adds nodes in front of one node, named after it and of its stage."""

    def __init__(self, graph: onnx_ir.Graph, anchor: onnx_ir.Node, constants: Constants) -> None:
        import onnx_ir

        self._ir, self._graph, self._anchor, self._constants = onnx_ir, graph, anchor, constants
        self._prefix = anchor.name or anchor.outputs[0].name or anchor.op_type
        self._count = 0

    def constant(self, value: ArrayLike, dtype: DTypeLike) -> onnx_ir.Value:
        """Return an initializer, the same one for equal arrays."""
        array = np.asarray(value, dtype)
        key = (f"{array.dtype}{array.shape}", array.tobytes())
        if key not in self._constants:
            number = next(i for i in count() if f"engine_constant_{i}" not in self._graph.initializers)
            self._constants[key] = self.initializer(f"engine_constant_{number}", array)
        return self._constants[key]

    def initializer(self, name: str, array: NDArray[Any]) -> onnx_ir.Value:
        """Add an initializer of this name."""
        tensor = self._ir.tensor(array, name=name)
        value = self._ir.Value(
            name=name,
            shape=self._ir.Shape(array.shape),
            type=self._ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value

    def op(
        self,
        operator: str,
        *inputs: onnx_ir.Value | None,
        attributes: Sequence[onnx_ir.Attr] = (),
        dtype: onnx_ir.DataType | None = None,
    ) -> onnx_ir.Value:
        """Add a node with one output, and return that."""
        name = f"{self._prefix}/{operator}_{self._count}"
        self._count += 1
        output = self._ir.Value(name=f"{name}_output", type=None if dtype is None else self._ir.TensorType(dtype))
        node = self._ir.Node("", operator, list(inputs), list(attributes), outputs=[output], name=name)
        self._graph.insert_before(self._anchor, inherit(node, self._anchor))
        return output

    def cast(
        self, value: onnx_ir.Value, dtype: onnx_ir.DataType, known: onnx_ir.DataType | None = None
    ) -> onnx_ir.Value:
        """Return the value in another type, or itself; `known` is its type where the graph does not say."""
        if (value.dtype or known) == dtype:
            return value
        return self.op("Cast", value, attributes=[self._ir.AttrInt64("to", dtype)], dtype=dtype)

    def reshape(self, value: onnx_ir.Value, *shape: int, dtype: onnx_ir.DataType | None = None) -> onnx_ir.Value:
        """Reshape to known sizes; 0 keeps an axis, -1 is the rest."""
        return self.op("Reshape", value, self.constant(shape, np.int64), dtype=dtype)

    def size(self, value: onnx_ir.Value, axis: int) -> onnx_ir.Value:
        """Return one size of a tensor, int64 of shape (1,)."""
        return self.op("Gather", self.op("Shape", value), self.constant([axis], np.int64))

    def vector(self, *sizes: int | onnx_ir.Value) -> onnx_ir.Value:
        """Return numbers and sizes as one shape, int64 of shape (n,)."""
        parts = [self.constant([size], np.int64) if isinstance(size, int) else size for size in sizes]
        return self.op("Concat", *parts, attributes=[self._ir.AttrInt64("axis", 0)])


def before_widening(value: onnx_ir.Value) -> onnx_ir.Value:
    """Return what a cast from half to single precision was given, or the value itself."""
    import onnx_ir

    node = value.producer()
    if node is None or node.op_type != "Cast" or node.attributes["to"].as_int() != onnx_ir.DataType.FLOAT:
        return value
    source = node.inputs[0]
    assert source is not None
    return source if source.dtype in (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16) else value


def replace(node: onnx_ir.Node, value: onnx_ir.Value, graph: onnx_ir.Graph) -> None:
    """Put `value` in the place of a node's output, and remove the node; the graph's own outputs keep their names."""
    old = node.outputs[0]
    for user, index in list(old.uses()):
        user.replace_input_with(index, value)
    for i, output in enumerate(graph.outputs):
        if output is old:
            name, value.shape, value.type = old.name, old.shape, value.type or old.type
            old.name = f"{name}_replaced"
            value.name = name
            graph.outputs[i] = value
    graph.remove(node, safe=True)


def clean(model: onnx_ir.Model) -> onnx_ir.Model:
    """Drop nodes whose outputs nothing uses, and casts to single precision that are taken back at once."""
    from onnx_ir.passes import common

    outputs = set(model.graph.outputs)
    for node in model.graph:
        if node.op_type == "Cast" and node.outputs[0] not in outputs:
            widened = node.inputs[0]
            assert widened is not None
            narrow = before_widening(widened)
            if narrow is not widened and narrow.dtype == node.attributes["to"].as_int():
                for user, index in list(node.outputs[0].uses()):
                    user.replace_input_with(index, narrow)
    cleaned: onnx_ir.Model = common.RemoveUnusedNodesPass()(model).model
    return cleaned
