"""The parity report: it must see every kind of wrong export, and nothing in a right one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from glip_export import verify
from glip_export.tokenizer import build_tokenizer
from glip_export.verify import ParityRow
from onnx import numpy_helper
from tiny_glip import VOCABULARY, tiny_model

from glip_deploy.errors import ParityError

BOXES = np.array([[0, 0, 10, 10], [5, 5, 20, 20], [0, 0, 10, 10], [0, 0, 0, 0]], np.float32)
SCORES = np.array([0.9, 0.8, 0.7, 0.0], np.float32)
LABELS = np.array([0, 1, 1, 0], np.int64)


def errors(boxes, scores, labels):
    box, score = verify._candidate_rows((boxes, scores, labels), (BOXES, SCORES, LABELS))
    return box.max_abs, score.max_abs


def test_the_same_candidates_have_no_error():
    assert errors(BOXES, SCORES, LABELS) == (0, 0)


def test_rank_does_not_matter():
    order = [2, 0, 3, 1]
    assert errors(BOXES[order], SCORES[order], LABELS[order]) == (0, 0)


def test_a_moved_box_and_a_changed_score_are_measured():
    boxes, scores = BOXES.copy(), SCORES.copy()
    boxes[1, 2] += 0.5
    scores[0] -= 0.01
    assert errors(boxes, scores, LABELS) == pytest.approx((0.5, 0.01), abs=1e-6)


@pytest.mark.parametrize("labels", [[1, 1, 1, 0], [0, 0, 0, 0]])
def test_a_wrong_label_is_no_match(labels):
    box, _ = errors(BOXES, SCORES, np.array(labels))
    assert box > 4 or box == float("inf")


def test_a_candidate_that_is_gone():
    scores = SCORES.copy()
    scores[0] = 0
    assert errors(BOXES, scores, LABELS) == (float("inf"), float("inf"))


def test_another_number_of_slots_is_an_error():
    with pytest.raises(ParityError, match="3 candidates, torch gives 4"):
        errors(BOXES[:3], SCORES[:3], LABELS[:3])


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


@pytest.mark.parametrize(("name", "function"), [("text.onnx", "verify_text"), ("image.onnx", "verify_image")])
def test_a_weight_that_is_off_is_seen(tiny_bundle, tmp_path, name, function):
    model, tokenizer = tiny_model(), build_tokenizer(VOCABULARY)
    for file in tiny_bundle.glob(f"{name}*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = getattr(verify, function)(model, tmp_path, tokenizer)
    assert len(rows) == 2 and all(row.ok for row in rows)
    bend(tmp_path, name, 1.5)
    rows = getattr(verify, function)(model, tmp_path, tokenizer)
    assert not all(row.ok for row in rows)
