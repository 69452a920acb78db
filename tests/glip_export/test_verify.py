"""The parity report: it must see every kind of wrong export, and nothing in a right one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from glip_export import verify
from glip_export.bundle_writer import export_bundle
from glip_export.tokenizer import build_tokenizer
from glip_export.verify import ParityRow
from onnx import numpy_helper
from selection import slow
from tiny_glip import VOCABULARY, tiny_model, tiny_state, write_tiny

from glip_deploy.errors import ParityError


def test_another_shape_is_an_error():
    with pytest.raises(ParityError, match=r"logits has shape \(2, 2\), torch gives \(2, 3\)"):
        verify._row("image.onnx", "logits", np.zeros((2, 2)), np.zeros((2, 3)), 1)


def test_errors_are_absolute_and_relative():
    row = verify._row("image.onnx", "logits", np.array([1.0, -4.5]), np.array([1.0, -4.0]), 0.1)
    assert (row.max_abs, row.max_rel, row.ok) == (0.5, 0.125, False)
    assert row.to_dict() == {
        "graph": "image.onnx", "output": "logits", "max_abs": 0.5, "max_rel": 0.125, "tolerance": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(("error", "ok"), [(1e-3, True), (1.001e-3, False), (np.nan, False), (np.inf, False)])
def test_only_what_is_within_tolerance_passes(error, ok):
    row = ParityRow("image.onnx", "logits", error, 0, 1e-3)
    assert row.ok is ok
    if ok:
        verify.check([row])
    else:
        with pytest.raises(ParityError, match="logits differs from torch"):
            verify.check([ParityRow("image.onnx", "deltas", 0, 0, 1e-3), row])


def bend(directory, name, factor):
    """Scale the largest weight of a written graph."""
    path = directory / name
    model = onnx.load(str(path))
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    tensor = max(floats, key=lambda t: int(np.prod(t.dims)))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    onnx.save(model, str(path))


@pytest.mark.parametrize("name", ["text.onnx", "image.onnx"])
def test_a_weight_that_is_off_is_seen(tiny_bundle, tmp_path, name):
    model, tokenizer = tiny_model(), build_tokenizer(VOCABULARY)

    def compared():
        if name == "text.onnx":
            return verify.verify_text(model, tmp_path, tokenizer)
        return verify.verify_image(model, tmp_path, verify.reference(model, tokenizer))

    for file in tiny_bundle.glob(f"{name}*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = compared()
    assert len(rows) == 2 and all(row.ok for row in rows)
    bend(tmp_path, name, 1.5)
    assert not all(row.ok for row in compared())


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=slow) for seed in range(1, 13)])
def test_no_good_checkpoint_is_refused(tmp_path, seed):
    """When candidates were compared by their final scores, some sets of random weights were refused."""
    options = {0: {"tunable_tokens": 64}, 1: {"fusion": False}}.get(seed % 4, {})
    rows = export_bundle(write_tiny(tmp_path / "m.pth", tiny_state(seed, **options)), tmp_path / "bundle").manifest[
        "parity"
    ]
    assert any("candidates" in row["output"] for row in rows)
