"""Graphs rewritten for an engine builder compute what the portable ones do."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from engine_needs import needs_rtx
from glip_engines.flavours import Dialect, Flavour
from glip_engines.rewriting.channels_last import use_plugin
from glip_engines.rewriting.deformable import (
    PLUGIN_DOMAIN,
    PLUGIN_OPERATOR,
    PLUGIN_VERSION,
)
from glip_engines.rewriting.parsers import for_parser
from glip_engines.rewriting.products import over_locations_in_parts, products_as_sums
from glip_engines.rewriting.sampling import use_native_ops
from glip_engines.trt import GraphJob, Settings
from glip_engines.worker import Worker
from glip_export.precision import to_precision
from glip_export.stages import stage_of
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_data import load_golden
from selection import slow

from glip_deploy.backends import tensorrt as backend
from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.bundle.contract import Stage
from glip_deploy.errors import BundleError, EngineError

DCN_ARRAYS, DCN_CASES = load_golden("unit_dcn.npz")
OLD, NEW = Dialect(Flavour.TENSORRT, "8.6.1", 70), Dialect(Flavour.TENSORRT, "10.9.0", 80)
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def test_the_backend_looks_for_the_plugin_that_graphs_name():
    assert (PLUGIN_OPERATOR, str(PLUGIN_VERSION), PLUGIN_DOMAIN) == backend.PLUGIN_CREATOR


def run(model, feeds):
    session = open_session(ir.serde.serialize_model(model).SerializeToString(), threads=1)
    return session.run(None, feeds)


def one_node(dtype=FLOAT, *, bias=True, mask=True, kernel=(3, 3), known_kernel=True, **attributes):
    """A graph of one DeformConv, every size dynamic."""
    names = ("x", "weight", "offset", "bias", "mask")
    ranks = (4, 4, 4, 1, 4)
    values = [
        ir.Value(name=name, shape=ir.Shape([f"{name}_{i}" for i in range(rank)]), type=ir.TensorType(dtype))
        for name, rank in zip(names, ranks, strict=True)
    ]
    given_inputs = [v for v in values if (bias or v.name != "bias") and (mask or v.name != "mask")]
    inputs = [v if v in given_inputs else None for v in values]
    while inputs[-1] is None:
        inputs.pop()
    if known_kernel:
        attributes["kernel_shape"] = kernel
    kinds = [ir.AttrInt64s(k, v) if isinstance(v, tuple) else ir.AttrInt64(k, v) for k, v in attributes.items()]
    output = ir.Value(name="y", shape=ir.Shape(["b", "c", "h", "w"]), type=ir.TensorType(dtype))
    node = ir.Node("", "DeformConv", inputs, kinds, outputs=[output], name="/deform")
    graph = ir.Graph(given_inputs, [output], nodes=[node], opset_imports={"": 20}, name="one")
    return ir.Model(graph, ir_version=9)


def feeds_for(rng, *, batch=1, channels=2, out=3, size=(5, 6), out_size=None, kernel=(3, 3), reach=3.0, stride=1):
    height, width = out_size or tuple(-(-side // stride) for side in size)
    taps = kernel[0] * kernel[1]
    return {
        "x": rng.normal(size=(batch, channels, *size)).astype(np.float32),
        "weight": rng.normal(size=(out, channels, *kernel)).astype(np.float32),
        "offset": rng.uniform(-reach, reach, (batch, 2 * taps, height, width)).astype(np.float32),
        "bias": rng.normal(size=out).astype(np.float32),
        "mask": rng.uniform(0, 1, (batch, taps, height, width)).astype(np.float32),
    }


def assert_close(ours, expected):
    """Positions pass through GridSample's units, which costs a few roundings of an fp32 coordinate."""
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


def operators(model):
    return {(node.domain, node.op_type) for node in model.graph}


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 2),
    channels=st.integers(1, 4),
    out=st.integers(1, 4),
    stride=st.sampled_from([1, 2]),
    whole=st.booleans(),
    reach=st.sampled_from([0.0, 0.4, 3.0, 50.0]),
    seed=st.integers(0, 2**20),
)
def test_native_ops_compute_the_deformable_convolution(size, batch, channels, out, stride, whole, reach, seed):
    rng = np.random.default_rng(seed)
    feeds = feeds_for(rng, batch=batch, channels=channels, out=out, size=size, reach=reach, stride=stride)
    if whole:  # on pixels exactly, -1 and the far edge included, where the rule of zeros bites
        feeds["offset"] = np.round(feeds["offset"])
    shape = {"pads": (1, 1, 1, 1), "strides": (stride, stride)}
    expected = run(one_node(**shape), feeds)[0]
    assert_close(run(use_native_ops(one_node(**shape)), feeds)[0], expected)


@pytest.mark.parametrize("parts", [{"bias": False}, {"mask": False}, {"bias": False, "mask": False}])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
def test_other_kernels_and_missing_inputs(parts, kernel):
    rng = np.random.default_rng(3)
    shape = {"pads": (0, 1, 2, 3), "strides": (2, 1), "dilations": (1, 2), "kernel": kernel}
    height = (9 + 2 - kernel[0]) // 2 + 1
    width = 11 + 4 - 2 * (kernel[1] - 1)
    feeds = feeds_for(rng, size=(9, 11), out_size=(height, width), kernel=kernel)
    feeds = {name: value for name, value in feeds.items() if parts.get(name, True)}
    expected = run(one_node(**shape, **parts), feeds)[0]
    assert_close(run(use_native_ops(one_node(**shape, **parts)), feeds)[0], expected)


def test_one_graph_serves_every_size():
    model = use_native_ops(one_node(pads=(1, 1, 1, 1), strides=(2, 2)))
    original = one_node(pads=(1, 1, 1, 1), strides=(2, 2))
    rng = np.random.default_rng(0)
    for size in [(1, 1), (1, 7), (8, 1), (2, 2), (25, 42)]:
        feeds = feeds_for(rng, size=size, stride=2)
        assert_close(run(model, feeds)[0], run(original, feeds)[0])


@pytest.mark.parametrize("far", [1e4, 1e9, 1e30])
def test_far_positions_read_zero(far):
    feeds = feeds_for(np.random.default_rng(0), size=(5, 6))
    feeds["offset"][:] = far
    feeds["offset"][:, ::2] *= -1
    ours = run(use_native_ops(one_node(pads=(1, 1, 1, 1))), feeds)[0]
    assert np.array_equal(ours, np.broadcast_to(feeds["bias"][None, :, None, None], ours.shape))


@pytest.mark.parametrize("case", DCN_CASES, ids=lambda case: case["name"])
def test_native_ops_match_the_official_kernel(case):
    name = case["name"]
    x, offset_mask, weight, bias = (DCN_ARRAYS[f"{name}_{part}"] for part in ("x", "offset_mask", "weight", "bias"))
    height, width = case["out_hw"]

    def flat(values):  # the official kernel's read of a map larger than its output
        return values.reshape(len(values), -1)[:, : values.shape[1] * height * width].reshape(
            len(values), -1, height, width
        )

    feeds = {"x": x, "weight": weight, "offset": flat(offset_mask[:, :18]), "bias": bias}
    feeds["mask"] = flat(1 / (1 + np.exp(-offset_mask[:, 18:].astype(np.float64)))).astype(np.float32)
    stride = case["stride"]
    ours = run(use_native_ops(one_node(pads=(1, 1, 1, 1), strides=(stride, stride))), feeds)[0]
    golden = DCN_ARRAYS[f"{name}_out"]
    assert np.abs(ours - golden).max() <= 2e-5 * np.abs(golden).max()


def test_a_node_in_half_precision_samples_in_single():
    """Positions beyond 128 in half would be off by 1/16 pixel and more."""
    feeds = feeds_for(np.random.default_rng(1), channels=8, size=(3, 300), reach=1.0)
    halves = {name: value.astype(np.float16) for name, value in feeds.items()}
    exact = run(one_node(pads=(1, 1, 1, 1)), {name: value.astype(np.float32) for name, value in halves.items()})[0]
    model = use_native_ops(one_node(HALF, pads=(1, 1, 1, 1)))
    ours = run(model, halves)[0]
    assert ours.dtype == np.float16
    assert np.abs(ours.astype(np.float32) - exact).max() <= 3e-3 * np.abs(exact).max()


@pytest.mark.parametrize("attribute", ["group", "offset_group"])
@pytest.mark.parametrize("rewrite", [use_plugin, use_native_ops])
def test_groups_are_refused(rewrite, attribute):
    with pytest.raises(BundleError, match=rf"DeformConv /deform: {attribute} is 2, .* 1 only; export"):
        rewrite(one_node(**{attribute: 2}))


def test_the_plugin_is_for_whole_layers():
    with pytest.raises(
        BundleError, match=r"DeformConv /deform: its offsets .* export .*, or build it with --form nati"
    ):
        use_plugin(one_node())


def test_the_kernel_must_be_known():
    with pytest.raises(BundleError, match="kernel_shape"):
        use_native_ops(one_node(known_kernel=False))


# -- whole graphs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_graph(tiny_bundle):
    def load():
        model = ir.load(tiny_bundle / "image.onnx")
        ir.external_data.load_to_model(model)
        return model

    return load


def frame_feeds(size, batch=1, tokens=6, classes=3):
    rng = np.random.default_rng(7)
    return {
        "frames": rng.integers(0, 256, (batch, *size, 3), dtype=np.uint8),
        "image_sizes": np.array([[size[0] - 3, size[1] - 5]] * batch),
        "text_embedding": rng.normal(size=(batch, tokens, 32)).astype(np.float32),
        "text_mask": np.ones((batch, tokens), np.int64),
        "class_map": np.full((batch, classes, tokens), 1 / tokens, np.float32),
    }


def assert_same_candidates(ours, expected, atol):
    """Slots come sorted by score; equal scores may change places."""
    assert [a.shape for a in ours] == [a.shape for a in expected]
    assert (expected[1] > 0.05).sum() > 10, "nothing was detected: the comparison would say nothing"
    np.testing.assert_allclose(np.sort(ours[1]), np.sort(expected[1]), atol=atol)
    np.testing.assert_allclose(np.sort(ours[0], axis=1), np.sort(expected[0], axis=1), atol=1000 * atol)


@pytest.mark.parametrize("size", [(128, 160), (32, 64)], ids=str)
def test_the_image_branch_in_plain_operators(image_graph, size):
    model = for_parser(use_native_ops(image_graph()), NEW)
    assert ("", "DeformConv") not in operators(model)
    # TensorRT 10 and 11 read a mode they do not know ("linear", say) as nearest neighbor; the default is bilinear.
    assert all("mode" not in node.attributes for node in model.graph if node.op_type == "GridSample")
    feeds = frame_feeds(size, batch=2)
    assert_same_candidates(run(model, feeds), run(image_graph(), feeds), 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_positions_without_an_offset_are_computed_once_for_all_layers(image_graph, precision):
    """Each of five levels reads its own map, which is as what the level above makes of it, and four the one below."""
    model = use_native_ops(to_precision(image_graph(), precision))
    samplers = [node for node in model.graph if node.op_type == "GridSample"]
    ranges = [node for node in model.graph if node.op_type == "Range" and "DeformConv" in node.name]
    assert (len(samplers), len(ranges)) == (2 * 13, 2 * (5 + 4))
    scales = [node for node in model.graph if node.op_type == "Div" and "DeformConv" in node.name]
    assert len(scales) == 2 * 5


def test_a_half_graph_in_plain_operators_multiplies_in_half(image_graph):
    original, model = to_precision(image_graph(), "fp16"), use_native_ops(to_precision(image_graph(), "fp16"))
    samplers = [node for node in model.graph if node.op_type == "GridSample"]
    products = [node for node in model.graph if node.op_type == "MatMul" and "DeformConv" in node.name]
    assert len(samplers) == len(products) == sum(node.op_type == "DeformConv" for node in original.graph)
    assert {node.inputs[0].dtype for node in samplers} == {FLOAT}
    assert {node.inputs[1].producer().inputs[0].dtype for node in products} == {HALF}
    feeds = frame_feeds((64, 96))
    assert_same_candidates(run(model, feeds), run(original, feeds), 4e-3)


def test_frames_are_cast_before_anything_else(image_graph):
    model = for_parser(image_graph(), NEW)
    frames = next(value for value in model.graph.inputs if value.name == "frames")
    assert {user.op_type for user, _ in frames.uses()} == {"Cast"}
    feeds = frame_feeds((64, 96))
    assert_same_candidates(run(model, feeds), run(image_graph(), feeds), 0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_old_parser_gets_valid_opset_17(image_graph, tiny_bundle, precision):
    """ONNX Runtime refuses what opset 17 has not: that it runs is half the test."""

    def text_graph():
        model = ir.load(tiny_bundle / "text.onnx")
        ir.external_data.load_to_model(model)
        return model

    expected = use_native_ops(to_precision(image_graph(), precision))
    model = for_parser(use_native_ops(to_precision(image_graph(), precision)), OLD)
    assert model.opset_imports[""] == 17
    assert ("", "Gelu") not in operators(model)
    feeds = frame_feeds((64, 96))
    assert_same_candidates(run(model, feeds), run(expected, feeds), 1e-5 if precision == "fp32" else 4e-3)
    ids = {"input_ids": np.arange(5, 12)[None], "attention_mask": np.ones((1, 7), np.int64)}
    ours = run(for_parser(to_precision(text_graph(), precision), OLD), ids)[0]
    np.testing.assert_allclose(ours, run(text_graph(), ids)[0], atol=1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=slow), "fp16", pytest.param("bf16", marks=slow)])
def test_layer_norms_that_a_parser_may_refuse_are_written_out(image_graph, precision):
    """TensorRT 10.0 to 10.5 set their precision in strongly typed networks too, which these reject."""

    def norms(version, flavour=Flavour.TENSORRT):
        model = for_parser(use_native_ops(to_precision(image_graph(), precision)), Dialect(flavour, version, 80))
        return model, sum(node.op_type == "LayerNormalization" for node in model.graph)

    kept, count = norms("10.6.0")
    assert count > 10
    assert [norms(version)[1] for version in ("11.1.0", "10.9", "8.6.1")] == [count] * 3
    assert norms("1.4.0", Flavour.RTX)[1] == count
    assert norms("10.0.1")[1] == norms("10.5.0")[1] == 0
    written, _ = norms("10.3.0")
    if precision != "bf16":  # which ONNX Runtime's CPU does not run
        feeds = frame_feeds((64, 96), batch=2)
        tolerance = 1e-5 if precision == "fp32" else 4e-3
        assert_same_candidates(run(written, feeds), run(kept, feeds), tolerance)


def test_products_in_fp32_become_sums_for_turing(image_graph):
    original = use_native_ops(to_precision(image_graph(), "fp16"))
    model = products_as_sums(use_native_ops(to_precision(image_graph(), "fp16")))
    products = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    assert products
    assert all(any(value.dtype == HALF for value in node.inputs) for node in products)
    feeds = frame_feeds((64, 96), batch=2)
    feeds["text_embedding"][-1] *= 0.5  # pictures that differ, so that mixing them shows
    assert_same_candidates(run(model, feeds), run(original, feeds), 1e-4)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=slow), "fp16", "bf16"])
def test_products_over_all_locations_are_computed_in_parts(image_graph, precision):
    original = use_native_ops(to_precision(image_graph(), precision))
    softmaxes = [
        node for node in original.graph if stage_of(node) is Stage.FUSION_SOFTMAX and node.op_type == "Softmax"
    ]
    model = over_locations_in_parts(use_native_ops(to_precision(image_graph(), precision)))
    names = {node.name for node in original.graph}
    added = [node for node in model.graph if node.name not in names]
    products = [node for node in added if node.op_type == "MatMul"]
    assert softmaxes and len(products) == 2 * len(softmaxes)  # the parts, and the rest
    for node in products:
        assert stage_of(node) in (Stage.FUSION, Stage.FUSION_SOFTMAX)
        if precision == "fp16":  # products of numbers that were rounded to fp16, else they would be of fp32 numbers
            for factor in node.inputs:
                assert factor.dtype == FLOAT and factor.producer().op_type == "Cast"
                assert factor.producer().inputs[0].dtype == HALF
            assert [(user.op_type, user.outputs[0].dtype) for user, _ in node.outputs[0].uses()] == [("Cast", HALF)]
    for node in added:  # sums of parts are fp32, and rounded once
        if node.op_type == "ReduceSum":
            assert node.outputs[0].dtype == FLOAT
    if precision == "bf16":  # which ONNX Runtime does not multiply on a CPU
        return
    for size in ((32, 32), (64, 96)):  # 23 locations at least, of which two are no part's
        feeds = frame_feeds(size)
        assert_same_candidates(run(model, feeds), run(original, feeds), 4e-3 if precision == "fp16" else 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    locations=st.integers(23, 200),
    columns=st.integers(1, 4),
    batch=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
def test_any_number_of_locations(rows, locations, columns, batch, seed):
    rng = np.random.default_rng(seed)
    scores, x, y = (
        ir.Value(name=name, shape=ir.Shape([f"{name}_{i}" for i in range(3)]), type=ir.TensorType(FLOAT))
        for name in ("scores", "x", "y")
    )
    softmax = ir.Node("", "Softmax", [scores], [ir.AttrInt64("axis", -1)], name="softmax")
    softmax.metadata_props["glip.stage"] = Stage.FUSION_SOFTMAX.value
    softmax.outputs[0].type = ir.TensorType(FLOAT)
    node = ir.Node("", "MatMul", [softmax.outputs[0], x], outputs=[y], name="product")
    graph = ir.Graph([scores, x], [y], nodes=[softmax, node], opset_imports={"": 20}, name="g")
    feeds = {
        "scores": rng.normal(size=(batch, rows, locations)).astype(np.float32),
        "x": rng.normal(size=(batch, locations, columns)).astype(np.float32),
    }
    weights = np.exp(feeds["scores"].astype(np.float64))
    expected = weights / weights.sum(-1, keepdims=True) @ feeds["x"]
    ours = run(over_locations_in_parts(ir.Model(graph, ir_version=9)), feeds)[0]
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_error_of_fp16_sums_over_all_locations():
    """Why the parts are summed in fp32: in fp16, terms are smaller than half a unit in the last place of the sum."""
    rng = np.random.default_rng(0)
    locations = 100 * 168 + 50 * 84 + 25 * 42 + 13 * 21 + 7 * 11
    logits = rng.normal(size=locations)
    weights = (np.exp(logits) / np.exp(logits).sum()).astype(np.float16)
    values = (1 + 0.3 * rng.normal(size=locations)).astype(np.float16)
    exact = weights.astype(np.float64) @ values.astype(np.float64)
    in_half, in_single = np.float16(0), np.float32(0)
    for weight, value in zip(weights, values, strict=True):
        in_half = np.float16(np.float32(weight) * np.float32(value) + np.float32(in_half))
        in_single += np.float32(weight) * np.float32(value)
    assert abs(in_half - exact) > 0.3 * exact
    assert abs(in_single - exact) < 1e-4 * exact


@needs_rtx
@pytest.mark.parametrize("cast", [True, False])
def test_casts_make_a_product_of_fp16_numbers_with_fp32_sums(tmp_path, cast):
    """TensorRT-RTX has no products of fp32 numbers on Turing, so what it builds there is one of fp16 numbers."""
    kind = HALF if cast else FLOAT
    a, b, y = (ir.Value(name=n, shape=ir.Shape(["m", 4096]), type=ir.TensorType(kind)) for n in ("a", "b", "y"))
    b.shape, y.shape = ir.Shape([4096, 64]), ir.Shape(["m", 64])
    if not cast:
        nodes = [ir.Node("", "MatMul", [a, b], outputs=[y], name="product")]
    else:
        wide = [ir.Value(name=f"wide_{i}", type=ir.TensorType(FLOAT)) for i in range(3)]
        nodes = [
            ir.Node("", "Cast", [a], [ir.AttrInt64("to", FLOAT)], outputs=wide[:1]),
            ir.Node("", "Cast", [b], [ir.AttrInt64("to", FLOAT)], outputs=wide[1:2]),
            ir.Node("", "MatMul", wide[:2], outputs=wide[2:], name="product"),
            ir.Node("", "Cast", wide[2:], [ir.AttrInt64("to", HALF)], outputs=[y]),
        ]
    graph = ir.Graph([a, b], [y], nodes=nodes, opset_imports={"": 20}, name="g")
    ir.save(ir.Model(graph, ir_version=9), tmp_path / "g.onnx")
    shapes = {"a": ((1, 4096), (16, 4096), (64, 4096)), "b": ((4096, 64),) * 3}
    job = GraphJob(str(tmp_path / "g.onnx"), str(tmp_path / "g.plan"), (shapes,))
    with Worker(Settings(Flavour.RTX, "fp16", "SM75")) as worker:
        if cast:
            worker.build(job, lambda fraction, phase: None)
        else:
            with pytest.raises(EngineError, match="could not build"):
                worker.build(job, lambda fraction, phase: None)


def test_a_gemm_that_is_not_a_linear_layer():
    values = [ir.Value(name=n, shape=ir.Shape([4, 4]), type=ir.TensorType(FLOAT)) for n in ("a", "b", "y")]
    node = ir.Node("", "Gemm", values[:2], [ir.AttrFloat32("alpha", 2.0)], outputs=[values[2]], name="/odd")
    graph = ir.Graph(values[:2], values[2:], nodes=[node], opset_imports={"": 20}, name="g")
    with pytest.raises(BundleError, match="Gemm /odd is no linear layer"):
        products_as_sums(ir.Model(graph, ir_version=9))
