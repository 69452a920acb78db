"""Where the reference outputs lie, and full-size models with synthetic weights to hold against them."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = ROOT / "examples" / "stand_in"
OWN = ROOT / "tests" / "data" / "goldens"
SHARED = ROOT.parent / "shared" / "parity" / "goldens"
"""The full set, where a checkout has it beside itself."""

sys.path.insert(0, str(STAND_IN))


def golden_path(name: str) -> Path | None:
    for folder in (OWN, SHARED):
        if (folder / name).is_file():
            return folder / name
    return None


def load_golden(name: str):
    path = golden_path(name)
    assert path is not None, name
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    meta = json.loads(str(arrays.pop("meta"))) if "meta" in arrays else {}
    return arrays, meta


@functools.lru_cache(maxsize=1)
def stand_in_model(manifest: str, salt: str = ""):
    """One at a time: GLIP-L alone is 1.7 GB."""
    from glip_export.checkpoints import build, derive_config

    state = stand_in_state(manifest, salt)
    return build(state, derive_config(state))[0]


def stand_in_state(manifest: str, salt: str = ""):
    """The whole state dict under its official keys."""
    import torch
    from synth_weights import items

    path = str(STAND_IN / "manifests" / f"{manifest}.json")
    return {key: torch.from_numpy(value) for key, value in items(path, salt)}


@functools.lru_cache(maxsize=1)
def stand_in_weights(manifest: str, prefix: str):
    """The tensors of one module, its prefix removed."""
    import torch
    from synth_weights import load_manifest, make

    rows = load_manifest(str(STAND_IN / "manifests" / f"{manifest}.json"))["tensors"]
    return {
        row["key"].removeprefix(prefix): torch.from_numpy(make(row["key"], row["shape"], row["dtype"]))
        for row in rows
        if row["key"].startswith(prefix)
    }


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
