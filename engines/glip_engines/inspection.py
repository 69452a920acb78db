"""What a parser understood: the network it made of a graph, compared with the graph.

A parser may accept a node and read it otherwise than it is written. TensorRT 10 and 11, for one, take a GridSample mode
that they do not know for nearest neighbor, without a word, and the engine is fast and wrong. So every network is walked
before it is built, whatever the version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glip_deploy.errors import EngineError
from glip_engines.deform_abi import MAX_LEVELS
from glip_engines.rewriting.deformable import PLUGIN_DOMAIN

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["Expected", "check_network", "single_tensors"]

_KINDS = {
    "Conv": "CONVOLUTION",
    "Gemm": "MATRIX_MULTIPLY",
    "GridSample": "GRID_SAMPLE",
    "InstanceNormalization": "NORMALIZATION",
    "LayerNormalization": "NORMALIZATION",
    "MatMul": "MATRIX_MULTIPLY",
    "Resize": "RESIZE",
    "Softmax": "SOFTMAX",
    "TopK": "TOPK",
}
"""Operators that make a kind of layer of their own."""
_PLAIN = frozenset(
    {"ACTIVATION", "ASSERTION", "CAST", "CONCATENATION", "CONSTANT", "ELEMENTWISE", "FILL", "GATHER", "IDENTITY"}
    | {"REDUCE", "SCALE", "SELECT", "SHAPE", "SHUFFLE", "SLICE", "SQUEEZE", "UNARY", "UNSQUEEZE"}
)
"""Kinds of layers that many operators make: element by element, of shapes, or moving data."""
_PLUGINS = frozenset({"PLUGIN", "PLUGIN_V2", "PLUGIN_V3"})
_TRUTHS = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or"})
"""Operators that make booleans of numbers."""
_COUNTED = ("GRID_SAMPLE", "NORMALIZATION", "SOFTMAX", "TOPK")
"""Kinds of which an operator makes exactly one layer, in every version."""
_PADDING = {"zeros": "FILL", "border": "CLAMP", "reflection": "REFLECT"}


@dataclass(frozen=True)
class Expected:
    """What a network must have, as far as the graph says: counts, so that it can be sent to another process."""

    kinds: Mapping[str, int]
    """Number of layers by kind, for those kinds that have an operator of their own."""
    single: Mapping[str, int]
    """Of these, the number whose data are fp32."""
    samplers: Mapping[str, int]
    """Number of GridSample nodes by interpolation, padding and align mode, as `check_network` writes them."""
    plugins: int
    """Number of the plugin's nodes."""

    @classmethod
    def of(cls, model: onnx_ir.Model) -> Expected:
        """Return what a rewritten graph says."""
        import onnx_ir

        halves = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
        nodes = [node for node in model.graph if node.op_type in _KINDS]
        single = (node for node in nodes if node.inputs[0] is None or node.inputs[0].dtype not in halves)
        return cls(
            dict(Counter(_KINDS[node.op_type] for node in nodes)),
            dict(Counter(_KINDS[node.op_type] for node in single)),
            dict(Counter(_sampler_of(node) for node in nodes if node.op_type == "GridSample")),
            sum(node.domain == PLUGIN_DOMAIN for node in model.graph),
        )


def _sampler_of(node: onnx_ir.Node) -> str:
    padding, align = node.attributes.get("padding_mode"), node.attributes.get("align_corners")
    return _sampler_text(
        "LINEAR",
        _PADDING["zeros" if padding is None else padding.as_string()],
        align is not None and align.as_int() == 1,
    )


def _sampler_text(mode: str, padding: str, align_corners: bool) -> str:
    return f"{mode}, {padding}, align_corners {int(align_corners)}"


def single_tensors(file: str) -> frozenset[str]:
    """Return the names of the tensors that the nodes of a graph make in fp32.

    Where the graph names no type it follows from the inputs: nodes of a typed graph do not mix the types of their data.
    """
    import onnx_ir

    kinds: dict[onnx_ir.Value, onnx_ir.DataType | None] = {}

    def kind(value: onnx_ir.Value | None) -> onnx_ir.DataType | None:
        if value is None:
            return None
        return value.dtype or (None if value.const_value is None else value.const_value.dtype) or kinds.get(value)

    for node in onnx_ir.load(file).graph:
        made = kind(node.inputs[1 if node.op_type == "Where" else 0]) if node.inputs else None
        if node.op_type == "Cast":
            made = onnx_ir.DataType(node.attributes["to"].as_int())
        elif node.op_type in ("Shape", "Size"):
            made = onnx_ir.DataType.INT64
        elif node.op_type in _TRUTHS:
            made = onnx_ir.DataType.BOOL
        elif node.op_type in ("Constant", "ConstantOfShape"):
            made = node.attributes["value"].as_tensor().dtype if "value" in node.attributes else None
        kinds[node.outputs[0]] = made
        for other in node.outputs[1:]:
            kinds[other] = onnx_ir.DataType.INT64 if node.op_type == "TopK" else made
    return frozenset(value.name for value in kinds if value.name and kind(value) == onnx_ir.DataType.FLOAT)


def check_network(module: Any, network: Any, expected: Expected, *, typed: bool) -> None:
    """Compare a parsed network with the graph it was parsed from.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
        network: what its parser made.
        expected: of the graph.
        typed: whether the network is strongly typed; only then do its tensors have the types of the graph.

    Raises:
        EngineError: the first difference, in words that follow "the parser".
    """
    layers: dict[str, list[Any]] = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        layers.setdefault(layer.type.name, []).append(layer)
    plugins = [layer for kind in _PLUGINS for layer in layers.pop(kind, [])]
    for kind, found in layers.items():
        if kind not in _PLAIN and not expected.kinds.get(kind):
            raise EngineError(f"makes a layer of kind {kind} ({found[0].name}), which nothing in the graph asks for")
    _check_count("plugin", len(plugins), expected.plugins)
    for kind in _COUNTED:
        found = layers.get(kind, [])
        _check_count(kind, len(found), expected.kinds.get(kind, 0))
        if typed:
            single = [layer for layer in found if _is_single(layer.get_input(0))]
            _check_count(f"fp32 {kind}", len(single), expected.single.get(kind, 0))
    _check_samplers(module, layers.get("GRID_SAMPLE", []), expected.samplers)
    if typed:
        _check_positions(layers.get("GRID_SAMPLE", []), (1,))
        _check_positions(plugins, range(3, 3 + MAX_LEVELS))


def _is_single(tensor: Any) -> bool:
    return bool(tensor.dtype.name == "FLOAT")


def _check_count(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise EngineError(f"makes {found} {what} layers, the graph asks for {wanted}")


def _check_samplers(module: Any, layers: list[Any], expected: Mapping[str, int]) -> None:
    wanted = Counter(expected)
    for layer in layers:
        name = layer.name
        layer.__class__ = module.IGridSampleLayer  # the bindings give every layer as its base class
        understood = _sampler_text(layer.interpolation_mode.name, layer.sample_mode.name, layer.align_corners)
        if not wanted[understood]:
            raise EngineError(
                f"reads GridSample {name} as {understood}; the graph says {' or '.join(sorted(expected))}"
            )
        wanted[understood] -= 1


def _check_positions(layers: list[Any], inputs: Iterable[int]) -> None:
    for layer in layers:
        for i in inputs:
            tensor = layer.get_input(i) if i < layer.num_inputs else None
            if tensor is not None and not _is_single(tensor):
                raise EngineError(f"gives {layer.name} its input {i} in {tensor.dtype.name}, the graph says fp32")
