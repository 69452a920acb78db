"""Full size: an official-format GLIP-T through glip-export and `Detector`, to the official code's final boxes."""

from __future__ import annotations

import contextlib
import shutil
import sys

import numpy as np
import pytest
import torch
from glip_export.bundle_writer import export_bundle
from parity_data import OWN, ROOT, SHARED, load_golden, same_detections, stand_in_state
from selection import slowly

from glip_deploy import Detector

TUNED = sorted({path.name for folder in (OWN, SHARED) for path in folder.glob("glip_T_prompt*.npz")})


@contextlib.contextmanager
def exported(directory, manifest, variant):
    checkpoint = directory / "glip_t.pth"
    try:
        torch.save({"model": {f"module.{key}": value for key, value in stand_in_state(manifest).items()}}, checkpoint)
        result = export_bundle(checkpoint, directory / "glip_t")
        checkpoint.unlink()
        assert result.manifest["variant"] == variant
        yield result.path
    finally:
        shutil.rmtree(directory)  # a gigabyte


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    with exported(tmp_path_factory.mktemp("full"), "glip_T", "GLIP-T") as path:
        yield path


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


@slowly
def test_the_cpp_runtime_finds_them_too(bundle, tmp_path):
    """Here, because the bundle is; tests/runtime has the rest."""
    sys.path.insert(0, str(ROOT / "tests" / "runtime"))
    from golden_frames import compare_with_python
    from runtime_build import absence, build

    reason = absence()
    if reason is not None:
        pytest.skip(reason)
    pytest.importorskip("openvino", reason="openvino is not installed")
    compare_with_python(build(), bundle, "glip_T_od.npz", tmp_path)


def test_the_bundle_says_how_far_it_is_from_torch(detector):
    rows = {row.output: row for row in detector.bundle.manifest.parity}
    assert rows["text_embedding"].max_abs <= 1e-4
    for output in ("logits", "deltas", "centerness"):
        assert 0 < rows[output].max_abs <= 1e-3


def test_a_tuned_prompt_end_to_end(tmp_path):
    if not TUNED:
        pytest.skip(f"no glip_T_prompt*.npz in tests/data/goldens, nor in {SHARED.parent.name}/{SHARED.name} beside it")
    with exported(tmp_path, "glip_T_prompt", "GLIP-T, prompt-tuned") as path:
        for name in TUNED:
            arrays, meta = load_golden(name)
            with Detector.open(path, shortest_side=240, longest_side=None, cache_dir=None) as opened:
                prompt = opened.encode(meta["names"])
                assert prompt.prompt.caption == meta["caption"]
                same_detections(opened.detect(arrays["image"], prompt, 0.0, color="rgb"), arrays)
