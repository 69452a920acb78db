"""The rewriting for an engine keeps the stage of every node and gives the nodes it adds one."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from glip_engines.flavours import Dialect, Flavour
from glip_engines.rewriting.channels_last import use_plugin
from glip_engines.rewriting.deformable import PLUGIN_OPERATOR
from glip_engines.rewriting.parsers import for_parser
from glip_engines.rewriting.products import products_as_sums
from glip_engines.rewriting.sampling import use_native_ops
from glip_export.precision import to_precision
from glip_export.stages import stage_of

from glip_deploy.bundle.contract import IMAGE_GRAPH, Stage


@pytest.mark.parametrize("rewrite", [use_plugin, use_native_ops])
def test_rewritten_graphs_have_stages(tiny_bundle, rewrite):
    model = to_precision(ir.load(tiny_bundle / IMAGE_GRAPH), "fp16")
    before = {node.name: stage_of(node) for node in model.graph if node.op_type != "DeformConv"}
    model = products_as_sums(for_parser(rewrite(model), Dialect(Flavour.TENSORRT, "8.6.1", 70)))
    after = {node.name: stage_of(node) for node in model.graph}  # raises where one is missing
    assert all(after[name] is before[name] for name in after.keys() & before.keys())
    added = {node.op_type: stage_of(node) for node in model.graph if node.name not in before}
    assert added["Erf"] in (Stage.BACKBONE, Stage.TEXT_LAYERS)
    assert added[PLUGIN_OPERATOR if rewrite is use_plugin else "GridSample"] is Stage.DEFORMABLE
