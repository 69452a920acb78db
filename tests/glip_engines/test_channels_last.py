"""The dynamic head rewritten for the plugin: three nodes a layer, (B, N, C) throughout, the same results."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
from glip_engines.rewriting.channels_last import use_plugin
from glip_engines.rewriting.deformable import PLUGIN_DOMAIN, PLUGIN_VERSION
from glip_engines.rewriting.dynamic_head import find_layers
from glip_export.model.config import HeadConfig
from glip_export.model.dyhead import DyConv
from glip_export.model.fpn import level_sizes
from glip_export.precision import to_precision
from onnx_ir.passes import common
from parity_data import ROOT, load_golden, stand_in_weights
from plugin_execution import by_torch, feeds_for, integers, plugin_nodes, run_with_plugin

from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.errors import BundleError

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def reference(node, inputs):
    return by_torch(inputs, **integers(node)).astype(inputs[0].dtype)


@pytest.fixture(scope="module")
def image_graph(tiny_bundle):
    def load(precision="fp32"):
        model = ir.load(tiny_bundle / "image.onnx")
        ir.external_data.load_to_model(model)
        return to_precision(model, precision)

    return load


@pytest.fixture(scope="module")
def unfused_graph(tiny_graphs):
    """Of a model without fusion, whose layers follow one another."""

    def load():
        model = ir.load(tiny_graphs(fusion=False) / "image.onnx")
        ir.external_data.load_to_model(model)
        return model

    return load


def run(model, feeds):
    return open_session(ir.serde.serialize_model(model).SerializeToString(), threads=1).run(None, feeds)


def assert_same(ours, expected, scores, boxes):
    assert (expected[1] > 0.05).sum() > 10, "nothing was detected: the comparison would say nothing"
    np.testing.assert_allclose(ours[1], expected[1], atol=scores)
    detected = expected[1] > 0
    np.testing.assert_allclose(ours[0][detected], expected[0][detected], atol=boxes)
    assert np.array_equal(ours[2][detected], expected[2][detected])


def test_the_nodes(image_graph):
    original = image_graph()
    weights = [layer.branches[reads].parts.weight for layer in find_layers(original) for reads in (0, -1, 1)]
    arrays = {value.name: value.const_value.numpy().copy() for value in weights}
    model = use_plugin(image_graph())
    assert model.opset_imports[PLUGIN_DOMAIN] == PLUGIN_VERSION
    assert not any(node.op_type in ("DeformConv", "InstanceNormalization") for node in model.graph)
    assert not set(arrays) & set(model.graph.initializers), "the unpacked weights are kept"
    nodes = plugin_nodes(model)
    assert [{integers(node)["reads"] for node in nodes[i : i + 3]} for i in (0, 3)] == [{0, -1, 1}] * 2
    assert {node.inputs[1].name for node in nodes} == {f"{name}_packed" for name in arrays}
    for node in nodes:
        # How parsers before TensorRT 10.10 look a plugin up; later ones read the domain too.
        assert node.attributes["plugin_namespace"].as_string() == PLUGIN_DOMAIN
        assert node.attributes["plugin_version"].as_string() == str(PLUGIN_VERSION)
        assert integers(node) == {
            "kernel_shape": (3, 3),
            "pads": (1, 1, 1, 1),
            "dilations": (1, 1),
            "strides": (2, 2) if integers(node)["reads"] == -1 else (1, 1),
            "out_channels": 32,
            "reads": integers(node)["reads"],
            "group": 1,
            "offset_group": 1,
        }
        assert set(integers(node)) == adapter_fields(), "a parser warns of what the plugin has and the node lacks"
        assert len(node.inputs) == 3 + 5
        packed = node.inputs[1].const_value.numpy()
        unpacked = packed[:, :32, :32].transpose(2, 1, 0).reshape(32, 32, 3, 3)
        assert np.array_equal(unpacked, arrays[node.inputs[1].name.removesuffix("_packed")])
        assert packed.shape == (9, 32, 64) and not packed[:, :, 32:].any()


def adapter_fields():
    """Names of the attributes that the plugin tells TensorRT."""
    source = (ROOT / "engines" / "plugin" / "adapter_common.h").read_text(encoding="utf-8")
    table = source[source.index("slots() {") : source.index("};", source.index("slots() {"))]
    return set(re.findall(r'\{"(\w+)"', table))


def makers(node):
    return {value.producer().op_type for value in node.inputs if value.producer() is not None}


def test_nothing_is_moved_between_layers(image_graph, unfused_graph):
    """A layer reads fusion's own (B, N, C) result, and fusion the layer's; without fusion a layer the one before it."""
    for model, fused in ((use_plugin(image_graph()), True), (use_plugin(unfused_graph()), False)):
        nodes = plugin_nodes(model)
        tokens = [nodes[i].inputs[0] for i in (0, 3)]
        assert all({node.inputs[0] for node in nodes[i : i + 3]} == {tokens[i // 3]} for i in (0, 3))
        if fused:  # the sum of normalized and updated features
            assert [value.producer().op_type for value in tokens] == ["Add", "Add"]
            joined = [node for node in model.graph if node.op_type == "Concat" and makers(node) == {"Max"}]
            assert [user.op_type for user, _ in joined[0].outputs[0].uses()] == ["LayerNormalization"]
        else:
            assert tokens[1].producer().op_type == "Concat" and makers(tokens[1].producer()) == {"Max"}
        for node in nodes:
            for user, _ in node.outputs[0].uses():
                assert user.op_type == "Slice"  # a level's rows


@pytest.mark.parametrize(("size", "batch"), [((96, 64), 2), ((64, 96), 1), ((32, 32), 1)], ids=str)
def test_results(image_graph, size, batch):
    feeds = feeds_for(size, batch)
    ours = run_with_plugin(use_plugin(image_graph()), feeds, reference)
    assert_same(ours, run(image_graph(), feeds), 2e-6, 2e-3)


def test_results_without_fusion(unfused_graph):
    feeds = feeds_for((96, 64), 2)
    ours = run_with_plugin(use_plugin(unfused_graph()), feeds, reference)
    assert_same(ours, run(unfused_graph(), feeds), 2e-6, 2e-3)


def test_half_precision(image_graph):
    """Data is half, positions are not; results are as near to fp32's as those of the graph with DeformConv."""
    model = use_plugin(image_graph("fp16"))
    for node in plugin_nodes(model):
        x, weight, bias, *maps = node.inputs
        assert {value.dtype for value in (x, weight, bias, node.outputs[0])} == {HALF}
        assert {value.dtype for value in maps} <= {FLOAT, None}
        assert {value.producer().op_type for value in maps} == {"Conv"}
    feeds = feeds_for((96, 64), 2)
    exact, before = run(image_graph(), feeds), run(image_graph("fp16"), feeds)
    ours = run_with_plugin(model, feeds, reference)
    assert (exact[1] > 0.05).sum() > 10
    worst = [np.abs(np.sort(found[1]) - np.sort(exact[1])).max() for found in (ours, before)]
    assert worst[0] <= max(1.5 * worst[1], 1e-3)
    assert worst[0] < 4e-3


@pytest.fixture(scope="module")
def golden_layer(tmp_path_factory):
    """The layer of the reference outputs, as a graph of its own, with its inputs and outputs."""
    arrays, meta = load_golden("unit_dyconv.npz")
    module = DyConv(HeadConfig(), 64).eval().requires_grad_(False)
    module.load_state_dict(stand_in_weights(meta["weights"], meta["prefix"]))
    inputs = [torch.from_numpy(arrays[f"in{i}"]) for i in range(5)]

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = module

        def forward(self, *maps):
            return tuple(self.layer(maps, level_sizes(maps)))

    path = tmp_path_factory.mktemp("layer") / "layer.onnx"
    names = {"input_names": [f"in{i}" for i in range(5)], "output_names": [f"out{i}" for i in range(5)]}
    axes = {name: {2: f"h_{name}", 3: f"w_{name}"} for group in names.values() for name in group}
    torch.onnx.export(Layer(), tuple(inputs), path, dynamo=False, opset_version=20, dynamic_axes=axes, **names)
    return path, arrays


def tidied(model):
    """As the exporter does it: constants are initializers, and nothing is there twice."""
    lift = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    return lift(common.IdentityEliminationPass()(model).model).model


def test_the_official_layer(golden_layer, harness):
    """Against outputs of the official code, the plugin's nodes run by the plugin's own code."""
    from plugin_execution import by_plugin

    path, arrays = golden_layer
    model = use_plugin(tidied(ir.load(path)))
    assert len(plugin_nodes(model)) == 3
    outputs = run_with_plugin(model, {f"in{i}": arrays[f"in{i}"] for i in range(5)}, by_plugin(harness))
    for i, output in enumerate(outputs):
        assert output.shape == arrays[f"out{i}"].shape
        assert np.abs(output - arrays[f"out{i}"]).max() <= 1e-4


def test_fewer_operators_of_each_kind(image_graph):
    """What a layer had for each level it has once, or not at all."""
    original, model = image_graph(), use_plugin(image_graph())
    before, after = (Counter(node.op_type for node in graph) for graph in (original.graph, model.graph))
    assert before["DeformConv"] == 26 and len(plugin_nodes(model)) == 6
    for operator in ("Gemm", "Sigmoid", "Relu", "Clip"):
        assert after[operator] < before[operator]
    assert before["Conv"] - after["Conv"] == 26  # level attention, now one product a layer


def break_weights(model):
    node = next(node for node in model.graph if node.op_type == "DeformConv")
    value = ir.Value(name="other", const_value=node.inputs[1].const_value, shape=node.inputs[1].shape)
    model.graph.register_initializer(value)
    node.replace_input_with(1, value)


def break_norm(model):
    node = next(node for node in model.graph if node.op_type == "InstanceNormalization")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)


def break_order(model):
    nodes = [node for node in model.graph if node.op_type == "DeformConv"]
    nodes[0].replace_input_with(0, nodes[1].inputs[0])


def break_end(model):
    node = next(node for node in model.graph if node.op_type == "Max" and "dyhead" in node.name)
    node.op_type = "Min"


@pytest.mark.parametrize("change", [break_weights, break_norm, break_order, break_end])
def test_a_layer_that_is_none_is_refused(image_graph, change):
    """Rather than rewritten into something else."""
    model = image_graph()
    change(model)
    with pytest.raises(BundleError, match="so it belongs to no layer that the plugin computes; export the bundle with"):
        use_plugin(model)
