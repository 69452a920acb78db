"""Result files of glip-bench, made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glip_bench.measuring.timing import Timing
from glip_bench.subjects.base import Piece


def timing(samples: Sequence[float]) -> dict[str, Any]:
    return {**Timing.of([ms / 1e3 for ms in samples]).to_dict(), "samples": list(samples)}


def result(image: float = 100.0, spread: float = 0.2, **subject: Any) -> dict[str, Any]:
    samples = [image + spread * (i % 5 - 2) for i in range(10)]
    facts = {
        "pieces_ms": {Piece.IMAGE: timing(samples), Piece.WHOLE: timing([ms + 5 for ms in samples])},
        "peak_resident_bytes": 10**9,
        **subject,
    }
    return {
        "schema": 2,
        "kind": "detection",
        "complete": True,
        "machine": {"cpu": "Some CPU, 2.60 GHz", "cores": 2},
        "gpus": [],
        "versions": {"onnxruntime": "1.25"},
        "model": {"variant": "GLIP-T", "fusion": True, "precision": "fp32"},
        "threads": None,
        "shape": {"batch": 1, "frame": [960, 1600], "network": [800, 1344], "tokens": 14, "classes": 5},
        "subjects": {"onnxruntime-cpu": facts},
    }
