"""Whole models against the official code's outputs: features, head outputs, candidates and final boxes."""

from __future__ import annotations

import pytest
from parity_data import SHARED, golden_path, same_detections
from parity_table import GOLDENS, compare_with_golden
from selection import slow

LEFT_OUT = ("glip_T_few", "glip_T_veryfew", "glip_B_od", "glip_B_caption")
"""Those of models that take longer to make than to run, and whose blocks GLIP-T and GLIP-T (A) have too."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) if name in LEFT_OUT else name for name in GOLDENS])
def test_model_agrees_with_the_official_one(name):
    if golden_path(f"{name}.npz") is None:
        pytest.skip(f"{name}.npz is not in tests/data and there is no {SHARED}")
    parity = compare_with_golden(name)
    bad = [row for row in parity.rows if not row.max_abs <= row.tolerance]
    assert not bad, bad
    assert len(parity.rows) >= 3
    for suffix, detections in parity.detections.items():
        same_detections(detections, parity.arrays, suffix)
