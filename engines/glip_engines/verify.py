"""Engines run on a real picture and compared with the bundle's graphs in ONNX Runtime, before they are delivered.

An engine may be wrong although its network is right: the builder chooses kernels, and only running them can tell. The
graphs were compared with torch when the bundle was exported; the tolerances are those of that parity report.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from glip_export.candidates import BOX_TOLERANCE, SCORE_TOLERANCE
from glip_export.precision import round_weights
from glip_export.verify import CLASSES, LOSS, PICTURE, ROUNDINGS, ROUNDOFF, TEXT_TOLERANCE, run_changed

from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.bundle.contract import CANDIDATES, PARTS, Candidates, ImageInputs, text_inputs
from glip_deploy.bundle.engines import EngineRecord
from glip_deploy.errors import EngineError
from glip_deploy.frames.canvas import resize
from glip_deploy.frames.load import load_image
from glip_deploy.prompts.tokens import parse_prompt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from glip_deploy.backends.base import Backend
    from glip_deploy.bundle.manifest import Bundle

__all__ = ["Checked", "verify_engines"]

_TOP = 100
"""Candidates that are compared: the best by score, which are far from the limits of the selection."""
_SPARED = 50
"""One in so many of them, those that differ most, may be any: scores beside the threshold, or equal ones."""
_APART = {"boxes (pixels)": 64.0, "scores": 1.0}
"""What a candidate that is missing counts as."""


@dataclass(frozen=True)
class Checked:
    """One quantity of an engine: how far it is from the bundle's graph, and how far it may be."""

    graph: str
    output: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether it is near enough; NaN is not."""
        return self.error <= self.tolerance


def verify_engines(bundle: Bundle, folder: Path, backend: Backend) -> list[Checked]:
    """Run engines on the exporter's picture, once for each optimization profile.

    In fp32 the largest error counts, against the tolerance of the parity report. In half precision the mean error
    counts, as there: it may be three times that of rounding the weights alone.

    Args:
        bundle: what the engines were built from.
        folder: the engines; only their record is read.
        backend: the engines, opened.

    Returns:
        Every quantity, all within tolerance.

    Raises:
        EngineError: one is not; the message names it.
    """
    record = EngineRecord.read(folder)
    rows = []
    for profile in record.engines["text.plan"].profiles:
        ids = _token_ids(bundle, profile["input_ids"][1][1])
        rows += _compare_text(bundle, record.precision, backend, ids)
    parts = all(f"{graph}.plan" in record.engines for graph in PARTS)
    for profile in record.engines["image.plan"].profiles:
        rows += _compare_image(bundle, record.precision, backend, profile, parts)
    for row in rows:
        if not row.ok:
            raise EngineError(
                f"the {row.graph} engine computes something else than the bundle's graph: {row.output} differ by"
                f" {row.error:.3g}, more than {row.tolerance:.3g}; nothing was delivered. Try another --form, another"
                f" --precision, or another version than {record.flavour} {record.version}, and report this"
            )
    return rows


def _token_ids(bundle: Bundle, count: int) -> NDArray[np.int64]:
    """Return `count` token ids: [CLS], words, [SEP]."""
    ids = parse_prompt(list(CLASSES), bundle.tokenizer(), max_tokens=bundle.max_tokens).input_ids
    return np.concatenate([ids[:1], np.resize(ids[1:-1], max(count - 2, 0)), ids[-1:]])[:count]


def _both(bundle: Bundle, graph: str, names: list[str], feed: Mapping[str, Any], precision: str) -> list[Any]:
    """Return what ONNX Runtime makes of a graph, and of the graph with its weights rounded, if they are not yet."""
    path = bundle.path / bundle.manifest.io[graph].file
    results = [open_session(path).run(names, dict(feed)), None]
    if precision != bundle.manifest.precision:
        results[1] = run_changed(path, names, dict(feed), lambda model: round_weights(model, precision))
    return results


def _compare_text(bundle: Bundle, precision: str, backend: Backend, ids: NDArray[np.int64]) -> list[Checked]:
    exact, rounded = _both(bundle, "text", ["text_embedding"], text_inputs(ids), precision)
    wanted = exact[0][0]
    error = np.abs(backend.encode_text(ids) - wanted)
    yardstick = None if rounded is None else np.abs(rounded[0][0] - wanted)
    return [_checked("text", f"embeddings of {len(ids)} tokens", error, yardstick, wanted, precision, TEXT_TOLERANCE)]


def _checked(
    graph: str,
    output: str,
    errors: NDArray[Any],
    yardstick: NDArray[Any] | None,
    values: NDArray[Any],
    precision: str,
    tolerance: float,
) -> Checked:
    """Judge errors: in fp32 the largest by the tolerance, else their mean by that of rounded weights."""
    if precision == "fp32":
        return Checked(graph, output, float(errors.max(initial=0)), tolerance)
    roundings = ROUNDINGS * ROUNDOFF[precision] * float(np.abs(values).mean())
    allowed = LOSS * roundings if yardstick is None else max(LOSS * float(yardstick.mean()), roundings)
    return Checked(graph, output, float(errors.mean()), allowed)


def _compare_image(
    bundle: Bundle, precision: str, backend: Backend, profile: Mapping[str, tuple[tuple[int, ...], ...]], parts: bool
) -> list[Checked]:
    """Compare on the profile's best canvas, with as many tokens and classes as it is best for; `parts`: those too."""
    _, height, width, _ = profile["frames"][1]
    picture = load_image(PICTURE)
    scale = min(height / picture.shape[0], width / picture.shape[1])
    rows, columns = (max(1, int(side * scale)) for side in picture.shape[:2])
    frames = np.zeros((1, height, width, 3), np.uint8)
    frames[0, :rows, :columns] = resize(picture, (rows, columns))[..., ::-1]
    tokens = profile["text_mask"][1][1]
    classes = max(1, min(profile["class_map"][1][1], tokens))
    embedding = open_session(bundle.path / bundle.manifest.io["text"].file).run(
        ["text_embedding"], text_inputs(_token_ids(bundle, tokens))
    )[0][0]
    class_map = np.zeros((classes, tokens), np.float32)
    class_map[np.arange(tokens) % classes, np.arange(tokens)] = 1
    class_map /= class_map.sum(axis=1, keepdims=True)
    inputs = ImageInputs.of(frames, np.array([[rows, columns]]), embedding, class_map)
    exact, rounded = (
        None if found is None else Candidates.of(dict(zip(CANDIDATES, found, strict=True)))
        for found in _both(bundle, "image", [*CANDIDATES], inputs.feed(), precision)
    )
    assert exact is not None
    yardstick = None if rounded is None else _distances(rounded, exact)
    judged = _judged("image", backend.detect(inputs), exact, yardstick, precision)
    if parts:  # twice, as for two prompts: the second must find the features as the backbone left them
        for found in backend.detect_prompts([inputs, inputs]):
            judged += _judged(" and ".join(PARTS), found, exact, yardstick, precision)
    return judged


def _judged(
    graph: str, found: Candidates, exact: Candidates, yardstick: Mapping[str, NDArray[Any]] | None, precision: str
) -> list[Checked]:
    """Judge the boxes and scores of candidates."""
    errors = _distances(found, exact)
    if not errors["scores"].size:
        raise EngineError(
            "the bundle's graph finds nothing on the picture that engines are checked with; use --no-verify"
        )
    real = exact.scores > 0
    return [
        _checked(
            *(graph, output, errors[output], None if yardstick is None else yardstick[output]),
            *(values[real], precision, tolerance),
        )
        for output, values, tolerance in (
            ("boxes (pixels)", exact.boxes, BOX_TOLERANCE),
            ("scores", exact.scores, SCORE_TOLERANCE),
        )
    ]


def _distances(found: Candidates, wanted: Candidates) -> dict[str, NDArray[np.float64]]:
    """Return how far the best candidates are from the nearest one found with the same label, the worst few left out."""
    best = np.argsort(-wanted.scores[0], kind="stable")[:_TOP]
    best = best[wanted.scores[0][best] > 0]
    boxes, scores = np.full(len(best), _APART["boxes (pixels)"]), np.full(len(best), _APART["scores"])
    for i, slot in enumerate(best):
        same = (found.labels[0] == wanted.labels[0, slot]) & (found.scores[0] > 0)
        if same.any():
            away = np.abs(found.boxes[0, same].astype(np.float64) - wanted.boxes[0, slot]).max(axis=1)
            less = np.abs(found.scores[0, same].astype(np.float64) - wanted.scores[0, slot])
            nearest = int(np.argmin(away / BOX_TOLERANCE + less / SCORE_TOLERANCE))
            boxes[i], scores[i] = min(boxes[i], away[nearest]), less[nearest]
    order = np.argsort(boxes / BOX_TOLERANCE + scores / SCORE_TOLERANCE)
    kept = order[: len(order) - -(-len(order) // _SPARED)] if len(order) > 1 else order
    return {"boxes (pixels)": boxes[kept], "scores": scores[kept]}
