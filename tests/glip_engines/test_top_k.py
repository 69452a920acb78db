"""The best in groups are the best of all: the same ones, in the same order, equal scores included."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from glip_engines.flavours import Dialect, Flavour
from glip_engines.rewriting import rewrite
from glip_engines.rewriting.top_k import top_k_in_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from glip_deploy.backends.onnxruntime import open_session


def one_node(k):
    """The best `k` of (B, scores) as the exporter writes it: all of them where there are fewer."""
    x = ir.Value(name="x", shape=ir.Shape(["b", "n"]), type=ir.TensorType(ir.DataType.FLOAT))
    limit, axis, one = (
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
        for name, array in (("limit", np.array([k])), ("axis", np.array([1])), ("one", np.array([-1])))
        for tensor in [ir.tensor(array, name=name)]
    )
    size = ir.Node("", "Gather", [ir.Node("", "Shape", [x]).outputs[0], axis], name="size")
    least = ir.Node("", "Min", [limit, size.outputs[0]], name="least")
    wanted = ir.Node("", "Reshape", [least.outputs[0], one], name="wanted")
    attributes = [ir.AttrInt64("axis", 1), ir.AttrInt64("largest", 1), ir.AttrInt64("sorted", 1)]
    best = ir.Node("", "TopK", [x, wanted.outputs[0]], attributes, num_outputs=2, name="best")
    ends = [ir.Node("", "Identity", [value]) for value in best.outputs]
    for node, name, kind in zip(ends, ("values", "places"), (1, 7), strict=True):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType(kind))
    nodes = [size.inputs[0].producer(), size, least, wanted, best, *ends]
    outputs = [node.outputs[0] for node in ends]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=[limit, axis, one], opset_imports={"": 20}, name="one")
    return ir.Model(graph, ir_version=9)


def run(model, x):
    session = open_session(ir.serde.serialize_model(model).SerializeToString(), threads=1)
    return session.run(None, {"x": x})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    k=st.integers(1, 9),
    group=st.integers(10, 30),
    rounds=st.integers(1, 3),
    count=st.integers(1, 400),
    batch=st.integers(1, 2),
    different=st.sampled_from([1, 2, 5, 10**6]),
    seed=st.integers(0, 2**20),
)
def test_the_same_as_one_search(k, group, rounds, count, batch, different, seed):
    """With scores that are all equal, nearly all equal, or hardly ever; zero is the commonest score there is."""
    x = np.random.default_rng(seed).integers(0, different, (batch, count)).astype(np.float32) / different
    values, places = run(top_k_in_groups(one_node(k), group=group, rounds=rounds), x)
    expected = run(one_node(k), x)
    assert np.array_equal(values, expected[0])
    assert np.array_equal(places, expected[1])
    order = np.argsort(-x, axis=1, kind="stable")[:, : min(k, count)]  # score first, place second
    assert np.array_equal(places, order)


def test_as_it_is_used():
    x = np.random.default_rng(0).random((1, 80 * 16800), dtype=np.float32)
    x = np.where(x > 0.99, np.round(x, 4), 0).astype(np.float32)  # many equal scores, and many empty places
    for rounds in (1, 2):
        ours, expected = run(top_k_in_groups(one_node(1000), rounds=rounds), x), run(one_node(1000), x)
        assert all(np.array_equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize(
    ("pinned", "searches"),
    [
        ({}, [3, 3, 2, 1, 1]),  # 1,344,000, 336,000, 84,000, 21,840 and 6,160 scores
        ({"classes": 1, "height": 224, "width": 320}, [1, 1, 1, 1, 1]),
        ({"classes": 3, "height": 800, "width": 1344}, [2, 1, 1, 1, 1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["native", "plugin"])
def test_how_often_a_level_is_searched(tiny_bundle, pinned, searches, form):
    dialect = Dialect(Flavour.TENSORRT, "10.9", 80)
    model = rewrite(ir.load(tiny_bundle / "image.onnx"), dialect, precision="fp16", form=form, pinned=pinned)
    found = [node.name.split("/")[1] for node in model.graph if node.op_type == "TopK"]
    assert [found.count(name) for name in dict.fromkeys(found)] == searches
