"""Full size: an official-format GLIP-T through glip-export and `Detector`, to the official code's final boxes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from glip_export.bundle_writer import export_bundle
from parity_data import load_golden, same_detections, stand_in_state

from glip_deploy import Detector


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    directory = tmp_path_factory.mktemp("full")
    checkpoint = directory / "glip_t.pth"
    torch.save({"model": {f"module.{key}": value for key, value in stand_in_state("glip_T").items()}}, checkpoint)
    result = export_bundle(checkpoint, directory / "glip_t")
    checkpoint.unlink()
    assert result.manifest["variant"] == "GLIP-T"
    yield result.path
    shutil.rmtree(directory)  # a gigabyte


@pytest.fixture(scope="module")
def detector(bundle):
    with Detector.open(bundle, shortest_side=240, longest_side=None, cache_dir=None) as opened:
        yield opened


def test_final_boxes_are_the_official_ones(detector):
    arrays, meta = load_golden("glip_T_od.npz")
    prompt = detector.encode(meta["names"])
    assert prompt.prompt.caption == meta["caption"]
    np.testing.assert_array_equal(prompt.prompt.input_ids, arrays["input_ids"][0, : meta["num_tokens"]])
    found = detector.detect(arrays["image"], prompt, 0.0, color="rgb")
    same_detections(found, arrays)


def test_the_bundle_says_how_far_it_is_from_torch(detector):
    rows = {row["output"]: row for row in detector.bundle.manifest["parity"]}
    assert rows["text_embedding"]["max_abs"] <= 1e-4
    for output in ("logits", "deltas", "centerness"):
        assert 0 < rows[output]["max_abs"] <= 1e-3
