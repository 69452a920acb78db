"""Where the reference outputs lie, and full-size models with synthetic weights to compare with them."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from glip_export.model.glip import Glip
    from numpy.typing import NDArray

    from glip_deploy import Detections

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "examples" / "stand_in"
OWN = ROOT / "tests" / "data" / "goldens"
SHARED = ROOT.parent / "shared" / "parity" / "goldens"
"""The full set, which some checkouts have beside them."""

sys.path[:0] = [str(STAND_IN), str(ROOT / "examples")]


def golden_path(name: str) -> Path | None:
    """Return the file of a reference output ("golden"), or None where this checkout has none of that name."""
    for folder in (OWN, SHARED):
        if (folder / name).is_file():
            return folder / name
    return None


def load_golden(name: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the arrays of a golden, and what it says about itself."""
    path = golden_path(name)
    assert path is not None, name
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    meta = json.loads(str(arrays.pop("meta"))) if "meta" in arrays else {}
    return arrays, meta


@functools.lru_cache(maxsize=1)
def stand_in_model(manifest: str, salt: str = "") -> Glip:
    """Return the model of a manifest of examples/stand_in; only the last is kept, since GLIP-L alone is 1.7 GB."""
    from glip_export.checkpoints import build, derive_config

    state = stand_in_state(manifest, salt)
    return build(state, derive_config(state))[0]


def stand_in_state(manifest: str, salt: str = "") -> dict[str, torch.Tensor]:
    """Return the whole state dict under its official keys."""
    import torch
    from synth_weights import items

    path = str(STAND_IN / "manifests" / f"{manifest}.json")
    return {key: torch.from_numpy(value) for key, value in items(path, salt)}


@functools.lru_cache(maxsize=1)
def stand_in_weights(manifest: str, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one module, its prefix removed."""
    import torch
    from synth_weights import load_manifest, make

    rows = load_manifest(str(STAND_IN / "manifests" / f"{manifest}.json"))["tensors"]
    return {
        row["key"].removeprefix(prefix): torch.from_numpy(make(row["key"], row["shape"], row["dtype"]))
        for row in rows
        if row["key"].startswith(prefix)
    }


def same_detections(detections: Detections, arrays: dict[str, NDArray[Any]], suffix: str = "") -> None:
    """Assert that every stable golden detection is found (same label, 0.1 px, 1e-3 in score) and none is extra."""
    boxes, scores = arrays[f"final_boxes{suffix}"], arrays[f"final_scores{suffix}"]
    labels, stable = arrays[f"final_labels{suffix}"] - 1, arrays[f"final_stable{suffix}"]
    assert stable.sum() > 0.5 * len(stable)
    used: set[int] = set()
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
