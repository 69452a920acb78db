"""Half precision: what is rounded, what stays fp32, what it costs, and that nothing overflows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
from glip_export.precision import ISLANDS, MOVEMENT, Island, round_weights, to_precision
from onnx_ir.passes.common import ShapeInferencePass
from parity_data import golden_path
from precision_table import LOUD, OUTPUTS, largest_half, loss_on_golden, mean_errors, session
from selection import slow, slowly
from tiny_glip import HIDDEN, tiny_state, write_tiny

from glip_deploy import Bundle, Detector
from glip_deploy.bundle.contract import STAGE_KEY, Stage, image_contract, text_contract
from glip_deploy.errors import OptionError, ParityError


@pytest.fixture(scope="module")
def raw(tiny_graphs):
    """A tiny image graph with its raw outputs, and inputs for it."""
    rng = np.random.default_rng(3)
    feed = {
        "frames": rng.integers(0, 256, (2, 96, 128, 3), dtype=np.uint8),
        "image_sizes": np.array([[96, 128], [80, 100]]),
        "text_embedding": rng.normal(size=(2, 7, HIDDEN)).astype(np.float32),
        "text_mask": np.ones((2, 7), np.int64),
        "class_map": np.full((2, 3, 7), 1 / 7, np.float32),
    }
    return tiny_graphs() / "image.onnx", feed


def run(model, folder, feed):
    return session(model, folder, "changed").run(list(OUTPUTS), feed)


def contract(graph):
    return [(value.name, value.dtype, list(value.shape)) for value in (*graph.inputs, *graph.outputs)]


@pytest.mark.parametrize("rounded", [False, True])
def test_inputs_and_outputs_stay_what_they_are(raw, rounded):
    path, _ = raw
    before = contract(ir.load(path).graph)
    assert contract(to_precision(ir.load(path), "fp16", rounded=rounded).graph) == before


def test_fp32_is_the_graph_itself(raw):
    model = ir.load(raw[0])
    assert to_precision(model, "fp32") is model


def test_every_type_is_explicit_and_islands_are_fp32(raw, tmp_path):
    """ONNX Runtime refuses a node whose inputs disagree, so loading it checks the types; islands are looked at."""
    path, feed = raw
    model = to_precision(ir.load(path), "fp16")
    run(model, tmp_path, feed)
    inferred = ShapeInferencePass()(model).model
    on_island = {island.name: 0 for island in ISLANDS}
    halves = 0
    for node in inferred.graph:
        holder = next((island for island in ISLANDS if island.holds(node)), None)
        kinds = {value.dtype for value in node.inputs if value is not None and value.dtype is not None}
        if holder is not None:
            on_island[holder.name] += 1
            assert ir.DataType.FLOAT16 not in kinds, (holder.name, node.name)
        halves += ir.DataType.FLOAT16 in kinds
    assert min(on_island.values()) > 0, on_island  # a renamed module would leave its island
    assert halves > 300
    products = [node for node in inferred.graph if node.op_type in ("MatMul", "Gemm", "Conv")]
    low = [n for n in products if n.inputs[1].dtype == ir.DataType.FLOAT16 or n.inputs[0].dtype == ir.DataType.FLOAT16]
    assert len(low) > 0.5 * len(products)


def test_weights_are_halved(raw, tmp_path):
    path, _ = raw

    def size(model):
        return sum(v.const_value.nbytes for v in model.graph.initializers.values())

    assert size(to_precision(ir.load(path), "fp16")) < 0.6 * size(ir.load(path))


@pytest.mark.parametrize(("precision", "bits"), [("fp16", 10), ("bf16", 7)])
def test_the_rounded_graph_rounds(raw, tmp_path, precision, bits):
    """Every value that is said to be rounded has no more mantissa than the precision."""
    path, feed = raw
    model = to_precision(ir.load(path), precision, rounded=True)
    names = [node.outputs[0].name for node in model.graph if (node.outputs[0].name or "").endswith("_rounded")]
    assert len(names) > 200
    for node in list(model.graph):
        if node.outputs[0].name in names and node.outputs[0] not in model.graph.outputs:
            node.outputs[0].dtype = ir.DataType.FLOAT
            model.graph.outputs.append(node.outputs[0])
    for value in session(model, tmp_path, "seen").run(names, feed):
        normal = np.abs(value[np.abs(value) > 1e-3])
        mantissa, _ = np.frexp(normal)
        steps = mantissa * 2.0 ** (bits + 1)
        assert (steps == np.round(steps)).all()


def test_the_typed_and_the_rounded_graph_are_one(raw, tmp_path):
    """Both come from one partition; the typed one loses no more, since a provider may keep more bits."""
    path, feed = raw
    expected = run(ir.load(path), tmp_path, feed)
    typed = mean_errors(run(to_precision(ir.load(path), "fp16"), tmp_path, feed), expected)
    rounded = mean_errors(run(to_precision(ir.load(path), "fp16", rounded=True), tmp_path, feed), expected)
    for name in OUTPUTS:
        assert 0 < typed[name] <= 1.5 * rounded[name]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_loss_is_that_of_rounding_the_weights(raw, tmp_path, precision):
    path, feed = raw
    expected = run(ir.load(path), tmp_path, feed)
    lowered = mean_errors(run(to_precision(ir.load(path), precision, rounded=True), tmp_path, feed), expected)
    weights = mean_errors(run(round_weights(ir.load(path), precision), tmp_path, feed), expected)
    for name in OUTPUTS:
        assert lowered[name] <= 3 * weights[name], name


def test_nothing_overflows_with_loud_text_and_fusion(raw, tmp_path):
    path, feed = raw
    gains = [name for name in ir.load(path).graph.initializers if "gamma" in name]
    assert gains and LOUD == 8  # all four are equal here, so they share one
    assert largest_half(path, feed, "fp16", tmp_path) < 65504 / 8


def test_an_overflow_would_be_seen(raw, tmp_path):
    """The search above finds one that is made."""
    path, feed = raw
    model = ir.load(path)
    for name, value in model.graph.initializers.items():
        if name.endswith("patch_embed.norm.weight"):
            value.const_value = ir.tensor(np.full(value.shape.numpy(), 6e4, np.float32), name=name)
    broken = tmp_path / "broken.onnx"
    ir.save(model, broken, external_data="broken.data")
    assert largest_half(broken, feed, "fp16", tmp_path) == float("inf")


def test_pixels_in_half_precision_cost_accuracy(raw, tmp_path):
    """An island is there for a reason; this one's is the easiest to see."""
    path, feed = raw
    expected = run(ir.load(path), tmp_path, feed)
    fewer = tuple(island for island in ISLANDS if island.name != "selection")
    kept = mean_errors(run(to_precision(ir.load(path), "fp16", rounded=True), tmp_path, feed), expected)
    given_up = mean_errors(
        run(to_precision(ir.load(path), "fp16", rounded=True, islands=fewer), tmp_path, feed), expected
    )
    assert given_up["logits"] > kept["logits"]


def test_an_island_is_found_by_operator_and_stage():
    island = Island("test", "no reason", ((Stage.FUSION, frozenset({"Softmax"})), (Stage.FPN, frozenset({"Conv"}))))

    def node(operator, stage):
        node = ir.Node("", operator, [], name="any name")
        node.metadata_props[STAGE_KEY] = stage.value
        return node

    assert island.holds(node("Softmax", Stage.FUSION)) and island.holds(node("Conv", Stage.FPN))
    assert not island.holds(node("Softmax", Stage.FPN)) and not island.holds(node("Softmax", Stage.BACKBONE))
    assert not island.holds(node("MatMul", Stage.FUSION))
    assert "Softmax" not in MOVEMENT


def test_a_weight_too_large_for_fp16_is_an_error(raw):
    def loud():
        model = ir.load(raw[0])
        name = next(name for name in model.graph.initializers if name.endswith("mlp.fc1.bias"))
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(np.full(value.shape.numpy(), 7e4, np.float32), name=name)
        return model

    with pytest.raises(OptionError, match=r"mlp\.fc1\.bias reaches 7e\+04, beyond what FLOAT16 holds .*bf16 or fp32"):
        to_precision(loud(), "fp16")
    to_precision(loud(), "bf16")


def test_an_unknown_precision_is_an_error(raw):
    with pytest.raises(OptionError, match='precision is "int8"; legal is fp32, fp16, bf16'):
        to_precision(ir.load(raw[0]), "int8")


@pytest.mark.parametrize("golden", [pytest.param("glip_T_od", marks=slow)])
def test_full_size_loses_little_more_than_rounded_weights(golden, tmp_path):
    """The stand-in weights amplify rounding; python benchmarks/parity/precision_table.py shows every golden."""
    if golden_path(f"{golden}.npz") is None:
        pytest.skip(f"{golden}.npz is not at hand")
    loss = loss_on_golden(golden, "fp16", tmp_path)
    assert loss.ratio <= 3
    assert loss.largest < 65504


def export(*arguments):
    command = [sys.executable, "-m", "glip_export.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_fp16_bundle_detects_like_the_fp32_one(tiny_bundle, half_export):
    half_bundle, said = half_export / "bundle", (half_export / "stderr").read_text()
    assert "lower all graphs to fp16" in said and "logits, fp16" in said
    manifest = json.loads((half_bundle / "manifest.json").read_text())
    assert manifest["precision"] == "fp16"
    assert manifest["io"] == json.loads((tiny_bundle / "manifest.json").read_text())["io"]
    lowered = [row for row in manifest["parity"] if "mean_abs" in row]
    assert len(lowered) == 12 and all(0 < row["mean_abs"] <= row["tolerance"] for row in lowered)
    weights = [sum(f.stat().st_size for f in folder.glob("*.data")) for folder in (half_bundle, tiny_bundle)]
    assert weights[0] < 0.6 * weights[1]
    frame = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    found = []
    for bundle in (tiny_bundle, half_bundle):
        with Detector.open(bundle, shortest_side=96, cache_dir=None) as detector:
            found.append(detector.detect(frame, "person. dog", 0.2, color="bgr"))
    full, half = found
    assert len(full) > 0 and abs(len(full) - len(half)) <= 1
    np.testing.assert_allclose(np.sort(full.scores)[-5:], np.sort(half.scores)[-5:], atol=5e-3)
    assert Bundle.open(half_bundle).key != Bundle.open(tiny_bundle).key


@slowly
def test_a_weight_fp16_cannot_hold_stops_the_export(tmp_path):
    state = tiny_state()
    state["language_backbone.body.model.embeddings.word_embeddings.weight"][4] = 1e5  # [MASK], which no prompt has
    write_tiny(tmp_path / "loud.pth", state)
    done = export("--model", tmp_path / "loud.pth", "--output", tmp_path / "out", "--precision", "fp16")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "beyond what FLOAT16 holds" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "loud.pth"]


def test_bad_precision_on_the_command_line(tiny_checkpoint, tmp_path):
    done = export("--model", tiny_checkpoint, "--output", tmp_path / "out", "--precision", "int4")
    assert done.returncode == 2 and 'argument --precision: "int4" is not a precision of bundles' in done.stderr


def test_a_loss_beyond_the_yardstick_stops_the_export(tiny_checkpoint, tiny_graphs, tmp_path, monkeypatch):
    from glip_export import bundle_writer, onnx_export, verify

    def traced_before(file, contract):
        def copy(model, folder):
            for part in (file, f"{file}.data"):
                shutil.copy(tiny_graphs() / part, folder)
            return contract

        return copy

    monkeypatch.setattr(onnx_export, "export_text", traced_before("text.onnx", text_contract(HIDDEN)))
    monkeypatch.setattr(
        onnx_export, "export_image", traced_before("image.onnx", image_contract(HIDDEN, raw_outputs=True))
    )

    def careless(model, precision, **options):
        return to_precision(model, "bf16", rounded=True, islands=())

    monkeypatch.setattr(verify, "to_precision", careless)
    for comparison in ("verify_text", "verify_image", "verify_split"):  # of the fp32 graphs, which pass
        monkeypatch.setattr(verify, comparison, lambda *arguments: [])
    with pytest.raises(ParityError, match=r"fp16 differs from torch by .*the bundle was not written"):
        bundle_writer.export_bundle(tiny_checkpoint, tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out").exists()
