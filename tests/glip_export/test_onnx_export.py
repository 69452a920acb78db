"""The two graphs: standard operators, the sizes they promise, and torch's numbers at every size."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from glip_export.model.glip import ImageBranch
from glip_export.onnx_export import drop_raw_outputs, export_text
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_glip import HIDDEN, VOCABULARY, tiny_model

from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.bundle.contract import image_contract

GRAPHS = ("text", "image")


@pytest.fixture(scope="module")
def raw(tiny_graphs):
    """The image graph with its raw outputs, and the model it came from."""
    directory, contract = tiny_graphs(), image_contract(HIDDEN, raw_outputs=True)
    return tiny_model(), directory, contract, open_session(directory / contract.file)


@pytest.mark.parametrize("name", GRAPHS)
def test_only_standard_operators_and_weights_outside(tiny_bundle, name):
    graph = onnx.load(str(tiny_bundle / f"{name}.onnx"), load_external_data=False)
    assert [(o.domain, o.version >= 19) for o in graph.opset_import] == [("", True)]
    assert {node.domain for node in graph.graph.node} == {""}
    outside = [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for t in outside for entry in t.external_data if entry.key == "location"} == {
        f"{name}.onnx.data"
    }
    assert sum(int(np.prod(t.dims)) for t in outside) > 10_000
    onnx.checker.check_model(str(tiny_bundle / f"{name}.onnx"), full_check=True)


def test_deformable_convolution_is_one_node_each(tiny_bundle):
    graph = onnx.load(str(tiny_bundle / "image.onnx"), load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("DeformConv") == 13 * 2  # 13 in a DyConv over five levels, 2 blocks
    assert "GridSample" not in operators
    assert operators.count("Constant") == operators.count("Identity") == 0


@pytest.mark.parametrize("name", GRAPHS)
def test_the_manifest_states_what_the_graph_takes(tiny_bundle, name):
    contract = json.loads((tiny_bundle / "manifest.json").read_text())["io"][name]
    graph = onnx.load(str(tiny_bundle / contract["file"]), load_external_data=False).graph
    types = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64", onnx.TensorProto.UINT8: "uint8"}
    for values, promised in ((graph.input, contract["inputs"]), (graph.output, contract["outputs"])):
        found = [
            {
                "name": value.name,
                "dtype": types[value.type.tensor_type.elem_type],
                "shape": [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]
        assert found == [{key: row[key] for key in ("name", "dtype", "shape")} for row in promised]


@settings(deadline=None, max_examples=12, derandomize=True)
@given(st.integers(1, 3), st.integers(2, 40), st.data())
def test_text_graph_is_torch_at_every_length(tiny_bundle, batch, tokens, data):
    seed = data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(VOCABULARY), (batch, tokens))
    mask = (np.arange(tokens) < rng.integers(1, tokens + 1, (batch, 1))).astype(np.int64)
    (found,) = open_session(tiny_bundle / "text.onnx").run(None, {"input_ids": ids, "attention_mask": mask})
    with torch.inference_mode():
        expected = tiny_model().encode_text(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def feed_of(seed, batch, height, width, tokens, classes):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, tokens + 1, (batch, 1))
    rows = rng.random((batch, classes, tokens)).astype(np.float32) + 1e-3
    return {
        "frames": rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8),
        "image_sizes": np.stack([rng.integers(1, side + 1, batch) for side in (height, width)], axis=1),
        "text_embedding": rng.normal(size=(batch, tokens, HIDDEN)).astype(np.float32),
        "text_mask": (np.arange(tokens) < lengths).astype(np.int64),
        "class_map": rows / rows.sum(-1, keepdims=True),
    }


@pytest.mark.parametrize(
    ("batch", "height", "width", "tokens", "classes"),
    [
        (1, 32, 32, 2, 1),
        (1, 64, 288, 3, 2),
        (1, 416, 32, 5, 1),
        (2, 96, 128, 7, 9),
        (3, 160, 96, 40, 3),
        (1, 256, 320, 14, 20),
        (2, 448, 544, 9, 3),
    ],
)
def test_image_graph_is_torch_at_every_size(raw, batch, height, width, tokens, classes):
    model, _, contract, runner = raw
    feed = feed_of(height + width, batch, height, width, tokens, classes)
    names = [tensor.name for tensor in contract.outputs]
    found = dict(zip(names, runner.run(names, feed), strict=True))
    with torch.inference_mode():
        outputs = ImageBranch(model)(*(torch.from_numpy(array) for array in feed.values()))
    expected = dict(zip(names, (output.numpy() for output in outputs), strict=True))
    for name in ("logits", "deltas", "centerness"):
        assert found[name].shape == expected[name].shape
        np.testing.assert_allclose(found[name], expected[name], atol=2e-4, rtol=0)
    assert found["boxes"].shape == expected["boxes"].shape
    # Equals may swap places: as sorted lists, the scores agree.
    np.testing.assert_allclose(np.sort(found["scores"]), np.sort(expected["scores"]), atol=1e-4, rtol=0)
    limits = feed["image_sizes"][:, None, ::-1] - 1
    for corner in (found["boxes"][..., :2], found["boxes"][..., 2:]):
        assert (corner >= 0).all() and (corner <= limits).all()
    assert found["labels"].min() >= 0 and found["labels"].max() < classes


def test_a_class_without_tokens_is_never_detected(raw):
    _, _, _, runner = raw
    feed = feed_of(1, 1, 64, 64, 6, 3)
    feed["class_map"][0, 1] = 0
    scores, labels = runner.run(["scores", "labels"], feed)
    assert (scores > 0).any()
    assert not ((labels == 1) & (scores > 0)).any()


def test_what_lies_outside_the_picture_does_not_matter(raw):
    _, _, _, runner = raw
    feed = feed_of(2, 1, 96, 96, 6, 3)
    feed["image_sizes"][:] = (70, 50)
    other = {**feed, "frames": feed["frames"].copy()}
    other["frames"][:, 70:] = 255
    other["frames"][:, :, 50:] = 255
    for first, second in zip(runner.run(None, feed), runner.run(None, other), strict=True):
        np.testing.assert_array_equal(first, second)


def test_raw_outputs_can_be_left_out(raw, tmp_path):
    _, directory, whole, runner = raw
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    contract = drop_raw_outputs(whole, tmp_path)
    assert [tensor.name for tensor in contract.outputs] == ["boxes", "scores", "labels"]
    lean = open_session(tmp_path / contract.file)
    feed = feed_of(3, 2, 64, 96, 5, 2)
    for first, second in zip(lean.run(None, feed), runner.run(["boxes", "scores", "labels"], feed), strict=True):
        np.testing.assert_array_equal(first, second)


def test_without_fusion_too(tiny_graphs):
    """GLIP-T (A): the text meets the image in the dot product only."""
    model, contract = tiny_model(fusion=False), image_contract(HIDDEN, raw_outputs=True)
    runner = open_session(tiny_graphs(fusion=False) / contract.file)
    names = [tensor.name for tensor in contract.outputs]
    for batch, height, width, tokens, classes in ((1, 64, 96, 3, 2), (2, 160, 64, 12, 5)):
        feed = feed_of(width, batch, height, width, tokens, classes)
        found = dict(zip(names, runner.run(names, feed), strict=True))
        with torch.inference_mode():
            outputs = ImageBranch(model)(*(torch.from_numpy(array) for array in feed.values()))
        for name, expected in zip(names, outputs, strict=True):
            if name in ("logits", "deltas", "centerness"):
                np.testing.assert_allclose(found[name], expected.numpy(), atol=2e-4, rtol=0)
        np.testing.assert_allclose(np.sort(found["scores"]), np.sort(outputs[1].numpy()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tokens", [2, 5, 64])
def test_a_tuned_prompt_is_in_the_text_graph(tmp_path, tokens):
    model = tiny_model(tunable_tokens=64)
    rows = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(5))
    model.rpn.tunable_linear.weight.copy_(rows)
    with torch.inference_mode():
        contract = export_text(model, tmp_path)
    ids = np.random.default_rng(tokens).integers(5, len(VOCABULARY), (2, tokens))
    (found,) = open_session(tmp_path / contract.file).run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    model.rpn.tunable_linear.weight.zero_()
    with torch.inference_mode():
        plain = model.encode_text(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.int64))
    expected = plain + rows[:tokens]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5, rtol=0)
