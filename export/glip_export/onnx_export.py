"""The two graphs of a bundle: standard ONNX operators only, every axis dynamic, weights in one file beside each.

The tracing exporter is used on purpose: with torch 2.13 it writes GLIP-T's image branch in about 20 seconds on two
cores, where the `dynamo=True` one needs five minutes for the same graph (most of it symbolic shape arithmetic).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.bundle.contract import (
    IMAGE_GRAPH,
    RAW_OUTPUTS,
    TEXT_GRAPH,
    GraphContract,
    image_contract,
    text_contract,
)
from glip_export.stages import stamp

if TYPE_CHECKING:
    import onnx_ir
    import torch

    from glip_export.model.glip import Glip

__all__ = [
    "OPSET",
    "drop_raw_outputs",
    "export_image",
    "export_text",
    "lower_graph",
]

OPSET = 20  # DeformConv is 19, Gelu is 20
IR_VERSION = 10  # the first in which a node has metadata, where its stage is written
EXAMPLE_HW = (448, 544)  # large enough that every pyramid level has several windows and several locations


def export_text(model: Glip, directory: Path) -> GraphContract:
    """Write `text.onnx` and `text.onnx.data`; return what it takes and gives."""
    import torch

    from glip_export.model.glip import TextBranch

    contract = text_contract(model.config.bert.hidden)
    ids = torch.ones(2, min(9, model.config.longest_text), dtype=torch.int64)
    _trace(TextBranch(model), (ids, ids), contract, directory / TEXT_GRAPH)
    return contract


def export_image(model: Glip, directory: Path) -> GraphContract:
    """Write `image.onnx` and `image.onnx.data`, raw outputs included; return what it takes and gives."""
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
    _trace(ImageBranch(model), example, contract, directory / IMAGE_GRAPH)
    return contract


def drop_raw_outputs(contract: GraphContract, directory: Path) -> GraphContract:
    """Take logits, deltas and centerness out of a written image graph, with whatever computed only them."""
    import onnx

    path = directory / contract.file
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    raw = {tensor.name for tensor in RAW_OUTPUTS}
    outputs = [output for output in graph.output if output.name not in raw]
    needed = {output.name for output in outputs}
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    nodes.reverse()
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, kept in ((graph.output, outputs), (graph.node, nodes), (graph.initializer, weights)):
        copies = [type(item).FromString(item.SerializeToString()) for item in kept]
        del field[:]
        field.extend(copies)
    onnx.save(model, str(path))
    return GraphContract(contract.file, contract.inputs, tuple(t for t in contract.outputs if t.name not in raw))


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


def _save(model: onnx_ir.Model, path: Path) -> None:
    """Write the graph, its weights in one external file (no 2 GB limit, and a small graph to look at)."""
    import onnx_ir

    model.producer_name = "glip-export"
    model.ir_version = max(model.ir_version, IR_VERSION)
    onnx_ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
