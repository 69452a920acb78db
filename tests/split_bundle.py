"""Helpers for the image graph in two parts: inputs of it, and bundles that lack the parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tiny_glip import HIDDEN

from glip_deploy.bundle.contract import PARTS


def feed_of(seed: int, batch: int, height: int, width: int, tokens: int, classes: int) -> dict[str, Any]:
    """Return inputs of the tiny image graph."""
    rng = np.random.default_rng(seed)
    rows = rng.random((batch, classes, tokens)).astype(np.float32) + 1e-3
    return {
        "frames": rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8),
        "image_sizes": np.array([[height, width]] * batch),
        "text_embedding": rng.normal(size=(batch, tokens, HIDDEN)).astype(np.float32),
        "text_mask": np.ones((batch, tokens), np.int64),
        "class_map": rows / rows.sum(-1, keepdims=True),
    }


def unsplit(bundle: Path, target: Path) -> Path:
    """Copy a bundle as it was before the parts existed."""
    shutil.copytree(bundle, target)
    manifest = json.loads((target / "manifest.json").read_text())
    for part in PARTS:
        del manifest["io"][part], manifest["files"][f"{part}.onnx"]
        (target / f"{part}.onnx").unlink()
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target
