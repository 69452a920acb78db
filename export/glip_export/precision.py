"""Precision lives in the graph: fp16 or bf16 weights and activations, with the fp32 islands listed in `ISLANDS`.

TensorRT 11 and TensorRT-RTX are strongly typed, so what runs in which precision is decided here, by casts, and not by
a builder flag. The graph's inputs and outputs keep their types.

ONNX Runtime's CPU provider keeps fp32 between two half-precision nodes, so running the typed graph there proves
little. `to_precision(..., rounded=True)` gives the same graph with fp32 as the carrier and every half-precision value
explicitly rounded: what an engine computes, short of the fusions that round less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.bundle.contract import Stage
from glip_deploy.errors import OptionError
from glip_export.stages import inherit, stage_of, stamp

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

__all__ = ["ISLANDS", "PRECISIONS", "Island", "round_weights", "to_precision"]

PRECISIONS = ("fp32", "fp16", "bf16")

HEAVY = frozenset({"MatMul", "Gemm", "Conv", "LayerNormalization", "Gelu", "Softmax"})
"""Half precision unless on an island, whatever their inputs are. LayerNormalization's own statistics are fp32
(`stash_type` is 1). Every other operator follows its inputs: fp32 only if all of them are."""

MOVEMENT = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "GatherElements", "Identity", "Pad", "Relu", "Reshape", "Slice", "Split"}
    | {"Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
"""Their outputs are inputs (or zero), so there is nothing to round."""

TYPED_INPUTS = {"Resize": (0,)}
"""Operators some of whose floating-point inputs are fp32 by definition: the others' indices."""

DEFORMABLE = frozenset({"DeformConv", "ModulatedDeformConv"})

FLOAT_FREE = frozenset(
    {"Shape", "Size", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or"}
)
"""Operators whose output is no floating-point number."""


@dataclass(frozen=True)
class Island:
    """Nodes that compute in fp32."""

    name: str
    reason: str
    places: tuple[tuple[Stage, frozenset[str]], ...]
    """Stages, and of each the ONNX operators that are on the island."""
    returns: bool = True
    """Whether the output goes back to half precision at once; otherwise fp32 lasts until it meets a half value."""

    def holds(self, node: onnx_ir.Node) -> bool:
        """Return whether the node, which has a stage, is on the island."""
        stage = stage_of(node)
        return any(stage is place and node.op_type in operators for place, operators in self.places)


EVERY_FLOAT = HEAVY | frozenset(
    {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Max",
        "Min",
        "Clip",
        "Relu",
        "Exp",
        "Sqrt",
        "Pow",
        "Sigmoid",
        "ReduceL2",
        "ReduceMean",
    }
    | {"Where", "TopK", "Gather", "GatherElements", "Concat", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Split"}
    | {"Slice", "Expand", "Flatten"}
)

ISLANDS = (
    Island(
        "sampling",
        "a step of 1/8 pixel from position 128 on is too coarse for a bilinear read; the 3x3 convolution that makes the"
        " offsets is a hundredth of the arithmetic",
        ((Stage.OFFSETS, frozenset({"Conv", "Sigmoid"})), (Stage.DEFORMABLE, DEFORMABLE)),
        returns=False,
    ),
    Island(
        "group norm",
        "the squares of a group of up to 16 x 16,800 values are summed",
        ((Stage.GROUP_NORM, frozenset({"InstanceNormalization"})),),
    ),
    Island(
        "pooling",
        "means over up to 16,800 locations, and the few numbers per channel that DyReLU and the level attention make"
        " of them, which scale whole maps",
        ((Stage.DYHEAD, frozenset({"ReduceMean", "Gemm", "Conv"})),),
        returns=False,
    ),
    Island(
        "softmax over locations",
        "probabilities of 22,400 locations are near 4e-5, where fp16 is subnormal",
        ((Stage.FUSION_SOFTMAX, frozenset({"Softmax"})),),
    ),
    Island(
        "predictions",
        "logits and box deltas are what the user sees, and cost a thousandth of the arithmetic",
        ((Stage.PREDICTION, EVERY_FLOAT),),
        returns=False,
    ),
    Island(
        "selection",
        "coordinates and pixels need more than 11 bits, ranks depend on small differences, and what a tuned prompt adds"
        " is added once",
        ((Stage.INPUT, EVERY_FLOAT), (Stage.SELECTION, EVERY_FLOAT), (Stage.TUNED_PROMPT, EVERY_FLOAT)),
        returns=False,
    ),
)


def to_precision(
    model: onnx_ir.Model,
    precision: str,
    *,
    rounded: bool = False,
    islands: Sequence[Island] = ISLANDS,
) -> onnx_ir.Model:
    """Return the graph in a precision; the argument is changed and must not be used again.

    Args:
        model: a graph of a bundle (text or image branch), in fp32.
        precision: one of PRECISIONS; "fp32" returns the graph as it is.
        rounded: keep fp32 types and round every half-precision value instead.
        islands: what stays fp32; another choice than ISLANDS shows what breaks without one.

    Raises:
        OptionError: unknown precision, or a weight beyond what fp16 can hold.
    """
    if precision not in PRECISIONS:
        raise OptionError(f'precision is "{precision}"; legal is {", ".join(PRECISIONS)}')
    if precision == "fp32":
        return model
    return _Lowering(stamp(model), precision, rounded, islands).run()


class _Lowering:
    """One pass over the nodes, in order; casts are made once per value and direction."""

    def __init__(self, model: onnx_ir.Model, precision: str, rounded: bool, islands: Sequence[Island]) -> None:
        import onnx_ir as ir

        self.ir, self.model, self.graph, self.islands, self.rounded = ir, model, model.graph, islands, rounded
        self.half = ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.BFLOAT16
        self.floats: set[onnx_ir.Value] = set()
        """Values that are floating-point numbers."""
        self.halves: set[onnx_ir.Value] = set()
        """Those of them in half precision."""
        self.casts: dict[tuple[onnx_ir.Value, bool], onnx_ir.Value] = {}
        self.weights: dict[onnx_ir.Value, onnx_ir.Value] = {}
        self.current: onnx_ir.Node = self.graph[0]
        """The node being lowered: casts made for it have its stage."""

    def run(self) -> onnx_ir.Model:
        from onnx_ir.passes import common

        ir = self.ir
        for value in (*self.graph.inputs, *self.graph.initializers.values()):
            if value.dtype == ir.DataType.FLOAT:
                self.floats.add(value)
        for node in list(self.graph):
            self._lower_node(node)
        for i, value in enumerate(self.graph.outputs):
            if value in self.halves:
                self._widen_output(i, value)
        model: onnx_ir.Model = common.RemoveUnusedNodesPass()(self.model).model
        return model

    def _lower_node(self, node: onnx_ir.Node) -> None:
        ir = self.ir
        self.current = node
        outputs = self._float_outputs(node)
        self.floats.update(outputs)
        island = next((island for island in self.islands if island.holds(node)), None)
        half = island is None and self._is_half(node, outputs)
        typed = TYPED_INPUTS.get(node.op_type, range(len(node.inputs)))
        for i in typed:
            value = node.inputs[i]
            if value in self.floats and node.op_type not in ("Shape", "Size"):
                if node.op_type in DEFORMABLE and i in (0, 1):
                    # What is sampled and what it is multiplied with are half; positions, blending and sums are not.
                    value = self._as_half(value)
                node.replace_input_with(i, self._as_half(value) if half else self._as_float(value))
        if half and not self.rounded:
            if node.op_type == "Cast":  # of integers: 0, 1 and small counts, exact
                node.attributes["to"] = ir.AttrInt64("to", self.half)
            for value in outputs:
                value.type = ir.TensorType(self.half)
                self.halves.add(value)
        elif half and node.op_type in MOVEMENT:
            self.halves.update(outputs)
        elif half or node.op_type in DEFORMABLE or (island is not None and island.returns):
            for value in outputs:
                self._round(value)

    def _is_half(self, node: onnx_ir.Node, outputs: Sequence[onnx_ir.Value]) -> bool:
        """Return whether a node outside all islands computes in half precision."""
        if not outputs:
            return False
        if node.op_type in HEAVY:
            return True
        if node.op_type in ("ConstantOfShape", "Range"):
            return False
        moving = [value for value in node.inputs if value in self.floats and not value.is_initializer()]
        return not moving or any(value in self.halves for value in moving)

    def _float_outputs(self, node: onnx_ir.Node) -> list[onnx_ir.Value]:
        """Return the floating-point outputs, by the operator's own rule of types."""
        ir = self.ir
        op = node.op_type
        if op in FLOAT_FREE:
            return []
        if op == "Cast":
            return list(node.outputs) if node.attributes["to"].as_int() == ir.DataType.FLOAT else []
        if op == "ConstantOfShape":
            fill = node.attributes.get("value")
            return list(node.outputs) if fill is None or fill.as_tensor().dtype == ir.DataType.FLOAT else []
        data = node.inputs[1] if op == "Where" else node.inputs[0]
        if data not in self.floats:
            return []
        return [node.outputs[0]] if op == "TopK" else list(node.outputs)

    # -- values in the other precision ------------------------------------------------------------------------------

    def _as_half(self, value: onnx_ir.Value) -> onnx_ir.Value:
        if value in self.halves:
            return value
        if value.is_initializer():
            return self._half_weight(value)
        return self._cast(value, to_half=True)

    def _as_float(self, value: onnx_ir.Value) -> onnx_ir.Value:
        return self._cast(value, to_half=False) if value in self.halves else value

    def _half_weight(self, value: onnx_ir.Value) -> onnx_ir.Value:
        if value not in self.weights:
            assert value.const_value is not None
            exact = value.const_value.numpy()
            kind = self.half.numpy()
            with np.errstate(over="ignore"):
                low: NDArray[Any] = exact.astype(kind)
            if not np.isfinite(low.astype(np.float32)).all():
                worst = float(np.abs(exact).max())
                raise OptionError(
                    f"weight {value.name} reaches {worst:.3g}, beyond what {self.half.name} holds (65504 for FLOAT16);"
                    " use bf16 or fp32"
                )
            tensor = self.ir.tensor(low.astype(np.float32) if self.rounded else low, name=f"{value.name}_half")
            new = self.ir.Value(
                name=f"{value.name}_half",
                shape=value.shape,
                type=self.ir.TensorType(self.ir.DataType.FLOAT if self.rounded else self.half),
                const_value=tensor,
            )
            self.graph.register_initializer(new)
            self.weights[value] = new
            self.floats.add(new)
            self.halves.add(new)
        return self.weights[value]

    def _cast(self, value: onnx_ir.Value, *, to_half: bool) -> onnx_ir.Value:
        key = (value, to_half)
        if key not in self.casts:
            if self.rounded and not to_half:
                return value  # the carrier is fp32 already
            nodes = self._cast_nodes(value, to_half)
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], nodes)
            else:
                self.graph.insert_after(producer, nodes)
            self.casts[key] = self._note(nodes[-1].outputs[0], to_half)
        return self.casts[key]

    def _cast_nodes(self, value: onnx_ir.Value, to_half: bool) -> list[onnx_ir.Node]:
        """Make the nodes of a cast; two where it only rounds."""
        ir = self.ir
        suffix = "half" if to_half else "float"
        kind = self.half if to_half else ir.DataType.FLOAT
        first = self._cast_node(value, kind, f"{value.name}_{suffix}")
        if not (self.rounded and to_half):
            return [first]
        return [first, self._cast_node(first.outputs[0], ir.DataType.FLOAT, f"{value.name}_rounded")]

    def _cast_node(self, value: onnx_ir.Value, kind: onnx_ir.DataType, name: str) -> onnx_ir.Node:
        ir = self.ir
        output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(kind))
        to = ir.AttrInt64("to", kind)
        return inherit(ir.Node("", "Cast", [value], [to], outputs=[output], name=f"/cast/{name}"), self.current)

    def _note(self, value: onnx_ir.Value, half: bool) -> onnx_ir.Value:
        self.floats.add(value)
        if half:
            self.halves.add(value)
        return value

    def _round(self, value: onnx_ir.Value) -> None:
        """Let everything that reads `value` read it in half precision."""
        producer = value.producer()
        assert producer is not None
        users = list(value.uses())
        nodes = self._cast_nodes(value, to_half=True)
        self.graph.insert_after(producer, nodes)
        new = self._note(nodes[-1].outputs[0], True)
        for user, index in users:
            user.replace_input_with(index, new)
        for i, output in enumerate(self.graph.outputs):
            if output is value:
                self._widen_output(i, new)

    def _widen_output(self, index: int, value: onnx_ir.Value) -> None:
        """Keep the graph's output name and type: the fp32 form of `value` takes its place."""
        ir = self.ir
        output = self.graph.outputs[index]
        name, shape = output.name, output.shape
        producer = value.producer()
        assert producer is not None
        self.current = producer
        node = self._cast_node(value, ir.DataType.FLOAT, f"{name}_wide")
        self.graph.insert_after(producer, node)
        output.name = f"{name}_narrow"
        node.outputs[0].name, node.outputs[0].shape = name, shape
        self.graph.outputs[index] = node.outputs[0]


def round_weights(model: onnx_ir.Model, precision: str) -> onnx_ir.Model:
    """Return the fp32 graph with its weights rounded and nothing else: the yardstick for `to_precision`.

    A released model's accuracy survives that; the arithmetic must not lose much more.

    Args:
        model: a graph of a bundle, in fp32; changed.
        precision: "fp16" or "bf16".
    """
    import onnx_ir as ir

    kind = (ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.BFLOAT16).numpy()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(tensor.numpy().astype(kind).astype(np.float32), name=value.name)
    return model
