"""The best candidates of a level, found in groups first: TensorRT's TopK works through its axis serially.

A level has (classes x locations) scores, 1.3 million for 80 classes on the largest map of 800x1344. Cut into groups
that are searched side by side, and the best of each group searched again, far fewer follow one another. The result is
that of one TopK over all, equal scores included: whatever is among the best k is among the best k of its group, and
both sort by score first and by place second, since groups and their winners stay in order. (ONNX Runtime's search of
one long axis is fast, so bundles keep it.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from glip_deploy.frames.geometry import ceil_div
from glip_engines.rewriting.edit import Writer, clean, replace

if TYPE_CHECKING:
    import onnx_ir

    from glip_engines.rewriting.edit import Constants

__all__ = ["top_k_in_groups"]

_GROUP = 8192
"""Scores in a group."""
_TYPICAL = {"frames": (1, 800, 1344, 3), "class_map": (1, 80, 256)}
"""Sizes that decide how often to group where the graph does not fix them; results do not depend on them."""
_FIRST_STRIDE = 8


def top_k_in_groups(model: onnx_ir.Model, *, group: int = _GROUP, rounds: int | None = None) -> onnx_ir.Model:
    """Search every level's scores in groups first.

    Args:
        model: an image graph; changed. Others have no TopK and stay as they are.
        group: scores in a group.
        rounds: how often; None decides by the number of scores of each level.
    """
    constants: Constants = {}
    for level, node in enumerate([node for node in model.graph if node.op_type == "TopK"]):
        count = _rounds(model, level, group, _most(node)) if rounds is None else rounds
        if count and _most(node) < group:
            _search(Writer(model.graph, node, constants), model.graph, node, group, count)
    return clean(model)


def _most(node: onnx_ir.Node) -> int:
    """Return the largest k, which the graph takes the smaller of and the number of scores."""
    value = node.inputs[1]
    while value is not None and value.const_value is None:
        maker = value.producer()
        if maker is None or maker.op_type not in ("Reshape", "Min", "Cast", "Unsqueeze"):
            return np.iinfo(np.int64).max
        known = [v for v in maker.inputs if maker.op_type == "Min" and v is not None and v.const_value is not None]
        value = known[0] if known else maker.inputs[0]
    assert value is not None
    assert value.const_value is not None
    return int(value.const_value.numpy().reshape(-1)[0])


def _rounds(model: onnx_ir.Model, level: int, group: int, most: int) -> int:
    """Return how often to group: while what is left is longer than three groups."""
    sizes = {}
    for value in model.graph.inputs:
        if value.name in _TYPICAL and value.shape is not None:
            typical = zip(value.shape, _TYPICAL[value.name], strict=True)
            sizes[value.name] = [side if isinstance(side, int) else usual for side, usual in typical]
    if len(sizes) < len(_TYPICAL):
        return 0
    stride = _FIRST_STRIDE << level
    left = sizes["class_map"][1] * ceil_div(sizes["frames"][1], stride) * ceil_div(sizes["frames"][2], stride)
    count = 0
    while left > 3 * group:
        left, count = ceil_div(left, group) * most, count + 1
    return count


def _search(writer: Writer, graph: onnx_ir.Graph, node: onnx_ir.Node, group: int, rounds: int) -> None:
    """Put a search in `rounds` groupings in the place of a TopK over (B, scores)."""
    import onnx_ir

    values, wanted = node.inputs[:2]
    assert values is not None
    assert wanted is not None
    kind, most = values.dtype or onnx_ir.DataType.FLOAT, _most(node)
    found = []
    for _ in range(rounds):
        count = writer.size(values, 1)
        length, almost = writer.constant([group], np.int64), writer.constant([group - 1], np.int64)
        full = writer.op("Mul", writer.op("Div", writer.op("Add", count, almost), length), length)
        padding = writer.op("Sub", full, count)
        # Scores are not negative, so what fills the last group comes after all of them.
        below = writer.constant(-1, np.float32)
        filled = writer.op("Pad", values, writer.vector(0, 0, 0, padding), below, dtype=kind)
        groups = writer.reshape(filled, 0, -1, group, dtype=kind)
        best, place = _top(writer, graph, groups, writer.constant([most], np.int64), 2, kind)
        step = writer.constant(group, np.int64)
        starts = writer.op("Range", writer.constant(0, np.int64), writer.op("Squeeze", count), step)
        place = writer.op("Add", place, writer.reshape(starts, -1, 1))
        found.append(writer.reshape(place, 0, -1))
        values = writer.reshape(best, 0, -1, dtype=kind)
    best, place = _top(writer, graph, values, wanted, 1, kind)
    along = onnx_ir.AttrInt64("axis", 1)
    for places in reversed(found):
        place = writer.op("GatherElements", places, place, attributes=[along])
    for user, index in list(node.outputs[1].uses()):
        user.replace_input_with(index, place)
    replace(node, best, graph)


def _top(
    writer: Writer, graph: onnx_ir.Graph, values: onnx_ir.Value, k: onnx_ir.Value, axis: int, kind: onnx_ir.DataType
) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """Add a TopK; return values and places."""
    import onnx_ir

    attributes = [onnx_ir.AttrInt64(name, value) for name, value in (("axis", axis), ("largest", 1), ("sorted", 1))]
    best = writer.op("TopK", values, k, attributes=attributes, dtype=kind)
    node = best.producer()
    assert node is not None
    node.resize_outputs(2)
    place = node.outputs[1]
    place.name, place.type = f"{best.name}_places", onnx_ir.TensorType(onnx_ir.DataType.INT64)
    return best, place
