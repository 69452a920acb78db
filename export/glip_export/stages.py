"""The stage of every node: which block of the network it belongs to, written into a graph and read from it.

The exporter calls `stamp` once, when a graph has just been traced and its nodes still carry the paths of the modules
that computed them ("/backbone/body/layers.0/norm1/LayerNormalization"). Everyone else reads `stage_of` or `stages_of`:
names change, stages stay, through lowering and through the rewriting for an engine.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from glip_deploy.bundle.contract import STAGE_KEY, Stage
from glip_deploy.errors import BundleError

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["inherit", "stage_of", "stages_of", "stamp"]

_SCOPES = (
    (r"/backbone/body/", Stage.BACKBONE),
    (r"/backbone/fpn/", Stage.FPN),
    (r"/model/", Stage.TEXT),
    (r"/head/(?!dyhead_tower)", Stage.PREDICTION),
)
"""Start of a node's name to its stage; the modules are those of `glip_export.model`."""

_TOWER = re.compile(r"/head/dyhead_tower\.(\d+)/(.+)")
_MARKS = ((r"b_attn/", Stage.FUSION), (r"attention/", Stage.TEXT_LAYERS), (r"offset/", Stage.DYHEAD))
"""What a module of the tower has inside, to what it is as a whole."""
_PARTS = (
    (Stage.FUSION, r"b_attn/attn/Softmax_1$", Stage.FUSION_SOFTMAX),  # the first one is over tokens
    (Stage.DYHEAD, r"(offset/|Sigmoid)", Stage.OFFSETS),
    (Stage.DYHEAD, r"DyConv\.\d+/bn/", Stage.GROUP_NORM),
    (Stage.DYHEAD, r"DyConv\.\d+/", Stage.DEFORMABLE),
)
"""Parts of a module of the tower that are stages of their own."""


def stamp(model: onnx_ir.Model) -> onnx_ir.Model:
    """Write its stage on every node, by the node's name; a graph that has its stages already is left as it is.

    This is the only place that knows the tracer's names. Besides the exporter it serves bundles that were exported
    before nodes carried a stage.

    Args:
        model: a text or image graph in the exporter's own names; changed.

    Returns:
        The same model.

    Raises:
        BundleError: a node that belongs to no block.
    """
    nodes = list(model.graph)
    if nodes and all(STAGE_KEY in node.metadata_props for node in nodes):
        return model
    tower = _tower(nodes)
    # Nodes of no module: the text graph ends with them, the image graph begins and ends with them.
    outermost = Stage.INPUT if any((node.name or "").startswith("/head/") for node in nodes) else Stage.TUNED_PROMPT
    waiting = []
    for node in nodes:
        name = node.name or ""
        if name.startswith("/cast/"):  # written by `glip_export.precision`
            waiting.append(node)
            continue
        stage = _by_name(name, tower)
        if stage is None and re.fullmatch(r"/[^/]+", name):
            stage = outermost
        elif outermost is Stage.INPUT:
            outermost = Stage.SELECTION
        if stage is None:
            raise BundleError(
                f"{node.op_type} {name or 'without a name'} belongs to no known block of the network;"
                " export the bundle again with glip-export"
            )
        node.metadata_props[STAGE_KEY] = stage.value
    for node in waiting:
        value = node.inputs[0]
        source = value.producer() if value is not None else None
        inherit(node, source or next(user for user, _ in node.outputs[0].uses()))
    return model


def _tower(nodes: list[onnx_ir.Node]) -> dict[str, Stage]:
    """Tell what each module of the tower is, by its number: fusion, BERT layer or DyConv."""
    found: dict[str, Stage] = {}
    for node in nodes:
        match = _TOWER.match(node.name or "")
        if match is not None:
            for mark, stage in _MARKS:
                if re.match(mark, match[2]):
                    found[match[1]] = stage
    return found


def _by_name(name: str, tower: dict[str, Stage]) -> Stage | None:
    name = re.sub(r"_\d+(?=/)", "", name)  # a module that is called again gets a number: "DyConv.1_2/bn_2/Reshape"
    match = _TOWER.match(name)
    if match is None:
        return next((stage for scope, stage in _SCOPES if re.match(scope, name)), None)
    whole = tower.get(match[1])
    return next((part for of, scope, part in _PARTS if of is whole and re.match(scope, match[2])), whole)


def stage_of(node: onnx_ir.Node) -> Stage:
    """Return the stage that is written on a node.

    Raises:
        BundleError: there is none, or none that this version knows; `stamp` helps graphs of before.
    """
    written = node.metadata_props.get(STAGE_KEY)
    try:
        return Stage(written or "")
    except ValueError:
        raise BundleError(
            f"{node.op_type} {node.name} has {'no stage' if written is None else f'the unknown stage {written!r}'};"
            " export the bundle again with glip-export"
        ) from None


def inherit(node: onnx_ir.Node, source: onnx_ir.Node) -> onnx_ir.Node:
    """Give a node that is added to a graph the stage of the one it is added for, if that has one; return it."""
    if STAGE_KEY in source.metadata_props:
        node.metadata_props[STAGE_KEY] = source.metadata_props[STAGE_KEY]
    return node


def stages_of(path: Path) -> dict[str, Stage]:
    """Return the stage of every node of a graph file, by the node's name, in the graph's order.

    Args:
        path: `text.onnx` or `image.onnx` of a bundle, of any precision; weights are not read.

    Raises:
        BundleError: a node without a stage that cannot be placed either.
    """
    import onnx_ir

    return {node.name or "": stage_of(node) for node in stamp(onnx_ir.load(path)).graph}
