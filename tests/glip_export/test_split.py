"""The image graph in two parts: what they compute together, and where their weights lie."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from glip_export.onnx_export import share_weights
from split_bundle import feed_of, unsplit

from glip_deploy import Bundle
from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.bundle.contract import PARTS


def run(graph, feed):
    session = open_session(graph)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def run_parts(folder, feed):
    frames = {name: feed[name] for name in ("frames", "image_sizes")}
    features = run(folder / "backbone.onnx", frames)
    rest = {name: array for name, array in feed.items() if name != "frames"}
    return features, run(folder / "head.onnx", {**features, **rest})


@pytest.mark.parametrize("fusion", [True, False])
def test_the_parts_together_are_the_whole(tiny_graphs, fusion):
    folder = tiny_graphs() if fusion else tiny_graphs(fusion=False)
    # Without fusion the whole tower is in the first part.
    head = onnx.load(str(folder / "head.onnx"), load_external_data=False).graph
    assert any(node.op_type == "DeformConv" for node in head.node) == fusion
    for batch, height, width, tokens, classes in ((1, 96, 160, 5, 2), (2, 64, 32, 30, 7)):
        feed = feed_of(height, batch, height, width, tokens, classes)
        features, found = run_parts(folder, feed)
        for stride, (name, level) in zip((8, 16, 32, 64, 128), features.items(), strict=True):
            assert name == f"features_p{stride.bit_length() - 1}"
            assert level.shape == (batch, 32, -(-height // stride), -(-width // stride))
        for name, expected in run(folder / "image.onnx", feed).items():
            np.testing.assert_allclose(found[name], expected, atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_weight_is_stored_once(tiny_bundle, half_export, precision):
    folder = tiny_bundle if precision == "fp32" else half_export / "bundle"
    whole = onnx.load(str(folder / "image.onnx"), load_external_data=False).graph
    known = {tensor.name: tensor.external_data for tensor in whole.initializer}
    for part in PARTS:
        graph = onnx.load(str(folder / f"{part}.onnx"), load_external_data=False).graph
        outside = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert outside and all(list(t.external_data) == list(known[t.name]) for t in outside)
        assert not (folder / f"{part}.onnx.data").exists()
        onnx.checker.check_model(str(folder / f"{part}.onnx"), full_check=True)
    feed = feed_of(5, 1, 96, 128, 6, 3)
    expected, found = run(folder / "image.onnx", feed), run_parts(folder, feed)[1]
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-5 if precision == "fp32" else 2e-3)


def test_the_manifest_says_what_the_parts_take_and_give(tiny_bundle):
    opened = Bundle.open(tiny_bundle)
    assert opened.is_split
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    for part in PARTS:
        graph = onnx.load(str(tiny_bundle / f"{part}.onnx"), load_external_data=False).graph
        for values, rows in ((graph.input, "inputs"), (graph.output, "outputs")):
            found = [
                [value.name, [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]] for value in values
            ]
            assert found == [[row["name"], row["shape"]] for row in manifest["io"][part][rows]]
    graphs = {row["graph"] for row in manifest["parity"]}
    assert graphs == {"text.onnx", "image.onnx", "backbone.onnx", "head.onnx"}
    assert manifest["format_version"] == 1


def test_a_bundle_of_before_is_not_split(tiny_bundle, tmp_path):
    old = unsplit(tiny_bundle, tmp_path / "old")
    assert not Bundle.open(old).is_split


def test_weights_that_differ_are_not_shared(tiny_graphs, tmp_path):
    """The file of the whole graph must have the very bytes, or the part keeps its own."""
    import onnx_ir

    shutil.copytree(tiny_graphs(), tmp_path, dirs_exist_ok=True)
    head = onnx_ir.load(tmp_path / "head.onnx")
    onnx_ir.external_data.load_to_model(head)
    name, value = next((n, v) for n, v in head.graph.initializers.items() if v.const_value.nbytes > 4096)
    value.const_value = onnx_ir.tensor(value.const_value.numpy() + 1, name=name)
    onnx_ir.save(head, tmp_path / "head.onnx", external_data="head.onnx.data", size_threshold_bytes=1024)
    with pytest.raises(ValueError, match=r"of head.onnx is not that of image.onnx"):
        share_weights(tmp_path / "head.onnx", tmp_path / "image.onnx")
    assert (tmp_path / "head.onnx.data").is_file()
