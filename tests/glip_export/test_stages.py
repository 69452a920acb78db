"""Every node of a graph carries the block of the network it belongs to; old graphs are placed by their names."""

from __future__ import annotations

import re
import shutil
from collections import Counter

import onnx_ir as ir
import pytest
from glip_export.onnx_export import drop_raw_outputs, export_text, lower_graph
from glip_export.precision import EVERY_FLOAT, ISLANDS, to_precision
from glip_export.stages import inherit, stage_of, stages_of, stamp
from selection import slow
from tiny_glip import HIDDEN, tiny_model

from glip_deploy.bundle.contract import IMAGE_GRAPH, STAGE_KEY, TEXT_GRAPH, Stage, image_contract
from glip_deploy.errors import BundleError

IMAGE_STAGES = {*Stage} - {Stage.TEXT, Stage.TUNED_PROMPT}


@pytest.fixture(scope="module", params=["fusion", "no fusion", pytest.param("tuned", marks=slow)])
def folder(request, tiny_graphs, tmp_path_factory):
    """Both graphs of a tiny model: with fusion, without, and prompt-tuned."""
    options = {"no fusion": {"fusion": False}, "tuned": {"tunable_tokens": 64}}.get(request.param, {})
    folder = tmp_path_factory.mktemp("graphs")
    shutil.copytree(tiny_graphs(**options), folder, dirs_exist_ok=True)
    drop_raw_outputs(image_contract(HIDDEN, raw_outputs=True), folder)
    return folder


def forget(model):
    """Make it a graph of before: no node carries a stage."""
    for node in model.graph:
        node.metadata_props.pop(STAGE_KEY, None)
    return model


def test_every_node_has_its_stage(folder, request):
    image, text = stages_of(folder / IMAGE_GRAPH), stages_of(folder / TEXT_GRAPH)
    assert len(image) == len(ir.load(folder / IMAGE_GRAPH).graph) > 1500
    without = {Stage.FUSION, Stage.FUSION_SOFTMAX, Stage.TEXT_LAYERS}
    kind = request.node.callspec.params["folder"]
    assert set(image.values()) == (IMAGE_STAGES - without if kind == "no fusion" else IMAGE_STAGES)
    assert set(text.values()) == ({Stage.TEXT, Stage.TUNED_PROMPT} if kind == "tuned" else {Stage.TEXT})


def test_the_stages_are_in_the_file_and_not_made_up_on_reading(folder):
    for name in (IMAGE_GRAPH, TEXT_GRAPH):
        model = ir.load(folder / name)
        assert model.ir_version >= 10
        assert {node.name: stage_of(node) for node in model.graph} == stages_of(folder / name)


@pytest.mark.parametrize(
    ("operator", "stages"),
    [
        ("DeformConv", {Stage.DEFORMABLE}),
        ("InstanceNormalization", {Stage.GROUP_NORM}),
        ("TopK", {Stage.SELECTION}),
        ("ReduceMean", {Stage.DYHEAD}),
        ("ReduceL2", {Stage.PREDICTION}),
        ("Conv", {Stage.FPN, Stage.OFFSETS, Stage.DYHEAD, Stage.PREDICTION}),
        ("Gelu", {Stage.BACKBONE, Stage.TEXT_LAYERS}),
        ("Softmax", {Stage.BACKBONE, Stage.TEXT_LAYERS, Stage.FUSION, Stage.FUSION_SOFTMAX}),
        ("Sigmoid", {Stage.OFFSETS, Stage.SELECTION}),
        ("Less", {Stage.INPUT}),
    ],
)
def test_operators_are_where_the_paper_puts_them(folder, operator, stages, request):
    found = {stage_of(node) for node in ir.load(folder / IMAGE_GRAPH).graph if node.op_type == operator}
    if request.node.callspec.params["folder"] == "no fusion":
        stages = stages - {Stage.TEXT_LAYERS, Stage.FUSION, Stage.FUSION_SOFTMAX}
    assert found == stages


def test_stages_follow_the_path_of_a_frame(folder):
    order = list(dict.fromkeys(stages_of(folder / IMAGE_GRAPH).values()))
    assert order[:3] == [Stage.INPUT, Stage.BACKBONE, Stage.FPN] and order[-1] is Stage.SELECTION


# What the islands were when they were read from names; the precision of no node may change by accident.
FORMER_ISLANDS = {
    "sampling": (
        {"Conv", "Sigmoid", "DeformConv", "ModulatedDeformConv"},
        r"/head/dyhead_tower\.\d+/(offset|Sigmoid|DyConv)",
    ),
    "group norm": ({"InstanceNormalization"}, r"/head/dyhead_tower"),
    "pooling": (
        {"ReduceMean", "Gemm", "Conv"},
        r"/head/dyhead_tower\.\d+/(ReduceMean|relu(_\d+)?/(ReduceMean|fc)|AttnConv)",
    ),
    "softmax over locations": ({"Softmax"}, r"/head/dyhead_tower\.\d+/b_attn/attn/Softmax_1$"),
    "predictions": (EVERY_FLOAT, r"/head/(?!dyhead_tower)"),
    "selection": (EVERY_FLOAT, r"/[^/]*$"),
}


def test_islands_by_stage_are_those_by_node_name(folder):
    held = Counter()
    for name in (IMAGE_GRAPH, TEXT_GRAPH):
        for node in ir.load(folder / name).graph:
            now = [island.name for island in ISLANDS if island.holds(node)]
            before = [
                name
                for name, (operators, scope) in FORMER_ISLANDS.items()
                if node.op_type in operators and re.match(scope, node.name)
            ]
            assert now == before, node.name
            held.update(now)
    assert sum(held.values()) > 300


def test_a_graph_without_stages_gets_the_same_ones(folder, tmp_path):
    for name in (IMAGE_GRAPH, TEXT_GRAPH):
        ir.save(forget(ir.load(folder / name)), tmp_path / name)
        assert not any(STAGE_KEY in node.metadata_props for node in ir.load(tmp_path / name).graph)
        assert stages_of(tmp_path / name) == stages_of(folder / name)


def test_lowering_keeps_stages_and_gives_casts_one(folder, tmp_path):
    for name in (IMAGE_GRAPH, TEXT_GRAPH):
        expected = stages_of(folder / name)
        for rounded in (False, True):
            lowered = to_precision(ir.load(folder / name), "fp16", rounded=rounded)
            ir.save(lowered, tmp_path / name, external_data=f"{name}.data")
            found = {node.name: stage_of(node) for node in ir.load(tmp_path / name).graph}
            assert {key: found[key] for key in expected} == expected
            assert len(found) > len(expected)


def test_a_lowered_graph_of_before_is_placed_too(folder, tmp_path):
    ir.save(to_precision(ir.load(folder / IMAGE_GRAPH), "fp16"), tmp_path / "low.onnx", external_data="low.data")
    ir.save(forget(ir.load(tmp_path / "low.onnx")), tmp_path / "old.onnx")
    expected, found = stages_of(tmp_path / "low.onnx"), stages_of(tmp_path / "old.onnx")
    assert list(found) == list(expected)
    assert all(found[name] is stage for name, stage in expected.items() if not name.startswith("/cast/"))


def test_lower_graph_and_drop_raw_outputs_keep_them(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lower_graph(tmp_path / IMAGE_GRAPH, "bf16")
    assert all(STAGE_KEY in node.metadata_props for node in ir.load(tmp_path / IMAGE_GRAPH).graph)


def test_a_node_of_no_block_is_refused(folder):
    model = forget(ir.load(folder / IMAGE_GRAPH))
    node = next(node for node in model.graph if node.op_type == "DeformConv")
    for name, shown in (
        ("/elsewhere/Conv", "/elsewhere/Conv"),
        ("", "without a name"),
        ("/head/dyhead_tower.99/x", "99"),
    ):
        node.name = name
        with pytest.raises(BundleError, match=rf"DeformConv .*{shown}.* belongs to no known block.*export the bundle"):
            stamp(forget(model))


def test_an_export_with_such_a_node_fails(tmp_path, monkeypatch):
    import torch
    from glip_export.model import glip

    class Elsewhere(torch.nn.Module):
        def forward(self, x):
            return x * 2

    class Changed(glip.TextBranch):
        def __init__(self, model):
            super().__init__(model)
            self.elsewhere = Elsewhere()

        def forward(self, ids, mask):
            return self.elsewhere(super().forward(ids, mask))

    monkeypatch.setattr(glip, "TextBranch", Changed)
    with pytest.raises(BundleError, match=r"Mul /elsewhere/Mul belongs to no known block"), torch.inference_mode():
        export_text(tiny_model(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_reading_a_node_without_a_stage_or_with_a_foreign_one_is_an_error():
    node = ir.Node("", "Mul", [], name="/x/Mul")
    with pytest.raises(BundleError, match=r"Mul /x/Mul has no stage; export the bundle again with glip-export"):
        stage_of(node)
    assert STAGE_KEY not in inherit(ir.Node("", "Add", [], name="y"), node).metadata_props
    node.metadata_props[STAGE_KEY] = "engine room"
    with pytest.raises(BundleError, match="has the unknown stage 'engine room'"):
        stage_of(node)
    node.metadata_props[STAGE_KEY] = "fusion"
    assert stage_of(inherit(ir.Node("", "Add", [], name="y"), node)) is Stage.FUSION
