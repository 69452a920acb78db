"""Whole models against the official code's outputs: features, head outputs, candidates and final boxes."""

from __future__ import annotations

import numpy as np
import pytest
from parity_data import SHARED, golden_path
from parity_table import GOLDENS, compare_with_golden


@pytest.mark.parametrize("name", GOLDENS)
def test_model_agrees_with_the_official_one(name):
    if golden_path(f"{name}.npz") is None:
        pytest.skip(f"{name}.npz is not in tests/data and there is no {SHARED}")
    parity = compare_with_golden(name)
    bad = [row for row in parity.rows if not row.max_abs <= row.tolerance]
    assert not bad, bad
    assert len(parity.rows) >= 3
    for suffix, detections in parity.detections.items():
        same_detections(detections, parity.arrays, suffix)


def same_detections(detections, arrays, suffix=""):
    """Every stable golden detection is found: same label, box within 0.1 px, score within 1e-3; none is extra."""
    boxes, scores = arrays[f"final_boxes{suffix}"], arrays[f"final_scores{suffix}"]
    labels, stable = arrays[f"final_labels{suffix}"] - 1, arrays[f"final_stable{suffix}"]
    assert stable.sum() > 0.5 * len(stable)
    used = set()
    for i in range(len(boxes)):
        distance = np.abs(detections.boxes - boxes[i]).max(axis=1) + np.abs(detections.scores - scores[i])
        distance[(detections.labels != labels[i]) | np.isin(np.arange(len(distance)), list(used))] = np.inf
        best = int(distance.argmin()) if len(distance) else -1
        near = best >= 0 and np.abs(detections.boxes[best] - boxes[i]).max() <= 0.1
        if near and abs(detections.scores[best] - scores[i]) <= 1e-3 and np.isfinite(distance[best]):
            used.add(best)
        else:
            assert not stable[i], f"golden detection {i} is missing"
    assert len(detections) - len(used) <= (~stable).sum()
