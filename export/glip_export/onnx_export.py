"""The graphs of a bundle: standard ONNX operators only, every axis dynamic, weights in files beside them.

The image branch is written whole, and cut in two where the text comes in: a backbone graph that runs once a frame, and
a head graph that runs once for each of several prompts. The parts read their weights from the whole graph's file.

The tracing exporter is used on purpose: with torch 2.13 it writes GLIP-T's image branch in about 20 seconds on two
cores, where the `dynamo=True` one needs five minutes for the same graph (most of it symbolic shape arithmetic).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.bundle.contract import (
    IMAGE_GRAPH,
    RAW_OUTPUTS,
    TEXT_GRAPH,
    GraphContract,
    backbone_contract,
    feature_tensors,
    head_contract,
    image_contract,
    text_contract,
)
from glip_export.stages import stamp

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    import torch

    from glip_export.model.glip import Glip

__all__ = [
    "OPSET",
    "drop_raw_outputs",
    "export_image",
    "export_text",
    "lower_graph",
    "share_weights",
    "split_image",
]

OPSET = 20  # DeformConv is 19, Gelu is 20
IR_VERSION = 10  # the first in which a node has metadata, where its stage is written
EXAMPLE_HW = (448, 544)  # large enough that every pyramid level has several windows and several locations
_SAME_TYPE = ("Add", "Concat", "Div", "Min", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze")
"""Operators that give int64 where all that they are given is."""


def export_text(model: Glip, directory: Path) -> GraphContract:
    """Write `text.onnx` and `text.onnx.data`; return what it takes and gives."""
    import torch

    from glip_export.model.glip import TextBranch

    contract = text_contract(model.config.bert.hidden)
    ids = torch.ones(2, min(9, model.config.longest_text), dtype=torch.int64)
    _trace(TextBranch(model), (ids, ids), contract, directory / TEXT_GRAPH)
    return contract


def export_image(model: Glip, directory: Path) -> GraphContract:
    """Write `image.onnx` and `image.onnx.data`, raw outputs included; return what it takes and gives.

    The values that `split_image` cuts at have the names of the contract.
    """
    import torch

    from glip_export.model.glip import ImageBranch

    contract = image_contract(model.config.bert.hidden, raw_outputs=True)
    batch, tokens, classes = 2, 9, 3
    height, width = EXAMPLE_HW
    example = (
        torch.zeros(batch, height, width, 3, dtype=torch.uint8),
        torch.tensor([[height, width]] * batch),
        torch.linspace(-1, 1, batch * tokens * model.config.bert.hidden).view(batch, tokens, -1),
        torch.ones(batch, tokens, dtype=torch.int64),
        torch.full((batch, classes, tokens), 1.0 / tokens),
    )
    features = feature_tensors(model.config.head.channels, model.config.head.strides)
    traced = GraphContract(contract.file, contract.inputs, (*contract.outputs, *features))
    _trace(ImageBranch(model, features=True), example, traced, directory / IMAGE_GRAPH)
    return _without_outputs(traced, directory, {tensor.name for tensor in features})


def split_image(model: Glip, image: GraphContract, directory: Path) -> tuple[GraphContract, GraphContract]:
    """Cut a written image graph into `backbone.onnx` and `head.onnx`, which read their weights from its file.

    Args:
        model: what `export_image` wrote.
        image: what that graph takes and gives.
        directory: where it lies.

    Returns:
        What the two take and give; the head has the outputs of the image graph.
    """
    import onnx

    config = model.config.head
    raw_outputs = len(image.outputs) > len(image_contract(model.config.bert.hidden).outputs)
    backbone = backbone_contract(config.channels, config.strides)
    head = head_contract(model.config.bert.hidden, config.channels, config.strides, raw_outputs=raw_outputs)
    whole = onnx.load(str(directory / image.file), load_external_data=False)
    values = {value.name: value for value in (*whole.graph.input, *whole.graph.output)}
    for tensor in backbone.outputs:
        kind = onnx.TensorProto.FLOAT
        values[tensor.name] = onnx.helper.make_tensor_value_info(tensor.name, kind, list(tensor.shape))
    for part in (backbone, head):
        inputs = [values[tensor.name] for tensor in part.inputs]
        onnx.save(_part(whole, inputs, [values[tensor.name] for tensor in part.outputs]), str(directory / part.file))
    return backbone, head


def drop_raw_outputs(contract: GraphContract, directory: Path) -> GraphContract:
    """Take logits, deltas and centerness out of a written image or head graph, with whatever computed only them."""
    return _without_outputs(contract, directory, {tensor.name for tensor in RAW_OUTPUTS})


def _without_outputs(contract: GraphContract, directory: Path, names: Collection[str]) -> GraphContract:
    import onnx

    path = directory / contract.file
    model = onnx.load(str(path), load_external_data=False)
    outputs = [output for output in model.graph.output if output.name not in names]
    onnx.save(_part(model, model.graph.input, outputs), str(path))
    return GraphContract(contract.file, contract.inputs, tuple(t for t in contract.outputs if t.name not in names))


def _part(
    model: onnx.ModelProto, inputs: Iterable[onnx.ValueInfoProto], outputs: Iterable[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    """Return the part of a graph that computes the outputs from the inputs, which may be any of its values."""
    import onnx

    part = onnx.ModelProto()
    part.CopyFrom(model)
    graph = part.graph
    inputs, outputs = list(inputs), list(outputs)
    given = {value.name for value in inputs}
    needed = {value.name for value in outputs}
    nodes = []
    for node in reversed(graph.node):
        if (needed - given).intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    nodes.reverse()
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    replaced: tuple[tuple[Any, list[Any]], ...] = (
        (graph.input, inputs),
        (graph.output, outputs),
        (graph.node, nodes),
        (graph.initializer, weights),
    )
    for field, kept in replaced:
        copies = [type(item).FromString(item.SerializeToString()) for item in kept]
        del field[:]
        field.extend(copies)
    return part


def share_weights(part: Path, whole: Path) -> None:
    """Let a graph read its weights from the file of another that has the same ones, and delete its own file.

    Args:
        part: a graph with weights in a file of its own.
        whole: a graph in the same folder that has every one of them, under the same name.

    Raises:
        ValueError: it has not.
    """
    import numpy as np
    import onnx

    model = onnx.load(str(part), load_external_data=False)
    theirs = {t.name: t for t in onnx.load(str(whole), load_external_data=False).graph.initializer}
    files: dict[str, Any] = {}

    def content(tensor: onnx.TensorProto) -> bytes:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = part.parent / entries["location"]
        data = files.setdefault(file.name, np.memmap(file, np.uint8, "r"))
        start = int(entries.get("offset", 0))
        return bytes(data[start : start + int(entries["length"])])

    own: set[str] = set()
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        other = theirs.get(tensor.name)
        if other is None or (other.data_type, other.dims) != (tensor.data_type, tensor.dims):
            raise ValueError(f"{whole.name} has no weight {tensor.name} of the type and shape that {part.name} has")
        if content(other) != content(tensor):
            raise ValueError(f"weight {tensor.name} of {part.name} is not that of {whole.name}")
        own.update(entry.value for entry in tensor.external_data if entry.key == "location")
        del tensor.external_data[:]
        tensor.external_data.extend(other.external_data)
    onnx.save(model, str(part))
    for name in own - {entry.value for t in theirs.values() for entry in t.external_data if entry.key == "location"}:
        (part.parent / name).unlink()


def lower_graph(path: Path, precision: str) -> None:
    """Rewrite a saved graph and its weights in a precision (`glip_export.precision`)."""
    import onnx_ir

    from glip_export.precision import to_precision

    model = onnx_ir.load(path)
    onnx_ir.external_data.load_to_model(model)  # the file they come from is about to be replaced
    _save(to_precision(model, precision), path)


def _trace(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    contract: GraphContract,
    path: Path,
) -> None:
    """Trace, tidy and save one graph."""
    import onnx_ir
    import torch

    axes: dict[str, Mapping[int, str]] = {
        tensor.name: tensor.dynamic_axes for tensor in (*contract.inputs, *contract.outputs)
    }
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".trace-") as scratch, warnings.catch_warnings():
        # The tracer warns at every size it sees as a constant; the export is verified at other sizes instead.
        warnings.simplefilter("ignore")
        raw = Path(scratch) / path.name
        torch.onnx.export(
            module,
            example,
            str(raw),
            dynamo=False,
            opset_version=OPSET,
            input_names=[t.name for t in contract.inputs],
            output_names=[t.name for t in contract.outputs],
            dynamic_axes=axes,
        )
        graph = stamp(_tidy(onnx_ir.load(raw)))
        for value, tensor in zip(graph.graph.outputs, contract.outputs, strict=True):
            value.shape = onnx_ir.Shape(tensor.shape)  # the tracer forgets that a box has four sides
        _save(graph, path)


def _tidy(model: onnx_ir.Model) -> onnx_ir.Model:
    """Halve the number of nodes: the tracer writes every use of a constant and of a size as nodes of its own."""
    from onnx_ir.passes import common

    _drop_idle_casts(model.graph)
    for tidying in (
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=4096),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        model = tidying(model).model
    return model


def _drop_idle_casts(graph: onnx_ir.Graph) -> None:
    """Take out casts of int64 values to int64: the tracer writes two after every division of sizes."""
    import onnx_ir

    integer = onnx_ir.DataType.INT64
    known = {value for value in (*graph.inputs, *graph.initializers.values()) if value.dtype == integer}
    for node in list(graph):
        whole = node.op_type in _SAME_TYPE and all(value in known for value in node.inputs if value is not None)
        if node.op_type == "Cast":
            whole = node.attributes["to"].as_int() == integer
            source = node.inputs[0]
            if whole and source in known and node.outputs[0] not in graph.outputs:
                assert source is not None
                for user, index in list(node.outputs[0].uses()):
                    user.replace_input_with(index, source)
        elif node.op_type == "Constant":
            tensor = node.attributes.get("value")
            whole = tensor is not None and tensor.as_tensor().dtype == integer
        elif node.op_type == "Shape":
            whole = True
        elif node.op_type == "TopK":
            known.add(node.outputs[1])
        elif node.op_type == "Gather":
            whole = node.inputs[0] in known
        if whole:
            known.add(node.outputs[0])


def _save(model: onnx_ir.Model, path: Path) -> None:
    """Write the graph, its weights in one external file (no 2 GB limit, and a small graph to look at)."""
    import onnx_ir

    model.producer_name = "glip-export"
    model.ir_version = max(model.ir_version, IR_VERSION)
    onnx_ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
