"""What C++ finds in the picture of a whole model's golden, beside what Python and the official code find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from parity_data import load_golden, same_detections
from runtime_build import Library

from glip_deploy import Detections, Detector


def same(found: list[tuple[tuple[float, ...], float, int, str]], wanted: Detections) -> None:
    """Assert that C++ found what Python found: labels and phrases, scores to 1e-4, boxes to 0.01 pixel."""
    assert [label for _, _, label, _ in found] == wanted.labels.tolist()
    assert [phrase for *_, phrase in found] == wanted.phrases
    np.testing.assert_allclose([score for _, score, _, _ in found], wanted.scores, rtol=0, atol=1e-4)
    np.testing.assert_allclose([box for box, *_ in found], wanted.boxes, rtol=0, atol=0.01)


def compare_with_python(runtime: Path, bundle: Path, name: str, cache: Path) -> None:
    """Detect in a golden's picture on OpenVINO in both languages."""
    arrays, meta = load_golden(name)
    sides = {"shortest_side": min(arrays["image"].shape[:2]), "longest_side": 1333}
    with Detector.open(bundle, backend="openvino", precision="f32", cache_dir=cache, **sides) as python:
        wanted = python.detect(arrays["image"], meta["names"], 0.0, color="rgb")
    same_detections(wanted, arrays)
    library = Library(runtime)
    # The compiled graphs are Python's; the prompt is encoded here.
    for file in cache.glob("*/*.embedding"):
        file.unlink()
    detector = library.open(bundle, cache_dir=str(cache).encode(), precision=b"f32", **sides)
    prompt = library.encode(detector, meta["names"])
    assert len(wanted) > 30
    same(library.detect(detector, prompt, np.ascontiguousarray(arrays["image"]), 0.0), wanted)
    library.c.glip_prompt_free(prompt)
    library.c.glip_close(detector)
