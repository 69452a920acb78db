"""The parity report: torch against every graph that was written, on a real picture.

A graph that disagrees is not delivered. Tolerances for fp32 are absolute; they are those of the reference outputs
(README of the parity set), where two correct fp32 implementations differ by about a tenth of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.bundle.contract import (
    BACKBONE_GRAPH,
    HEAD_GRAPH,
    IMAGE_GRAPH,
    RAW_OUTPUTS,
    TEXT_GRAPH,
    Candidates,
    ImageInputs,
    feature_tensors,
    text_inputs,
)
from glip_deploy.errors import ParityError
from glip_deploy.frames.canvas import make_canvas
from glip_deploy.frames.load import load_image
from glip_deploy.prompts.tokens import parse_prompt
from glip_export.candidates import BOX_TOLERANCE, SCORE_TOLERANCE, RawOutputs, compare
from glip_export.precision import round_weights, to_precision

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from glip_export.model.glip import Glip

__all__ = [
    "PICTURE",
    "ParityRow",
    "Reference",
    "check",
    "reference",
    "run_changed",
    "verify_image",
    "verify_precision",
    "verify_split",
    "verify_text",
]

PICTURE = Path(__file__).with_name("data") / "picture.jpg"
CLASSES = ("person", "flower", "traffic light", "red roof", "hair drier")
SHORTEST_SIDE, LONGEST_SIDE = 352, 512  # another size, aspect and token count than the traced example

TEXT_TOLERANCE = 1e-4
HEAD_TOLERANCE = {"swin-t": 1e-3, "swin-l": 2e-3}
LOSS = 3.0
ROUNDINGS = 4
ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True)
class ParityRow:
    """One output of one graph against torch."""

    graph: str
    output: str
    max_abs: float
    max_rel: float
    """Largest absolute error over the largest absolute value."""
    tolerance: float
    mean_abs: float | None = None
    """Mean absolute error; where it is given, the tolerance is for it."""

    @property
    def ok(self) -> bool:
        """Return whether the error is within tolerance; NaN is not."""
        return (self.max_abs if self.mean_abs is None else self.mean_abs) <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return the row as it stands in the manifest."""
        row: dict[str, Any] = {
            "graph": self.graph,
            "output": self.output,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "tolerance": self.tolerance,
        }
        return row if self.mean_abs is None else {**row, "mean_abs": self.mean_abs}


def _row(graph: str, output: str, ours: NDArray[Any], torchs: NDArray[Any], tolerance: float) -> ParityRow:
    if ours.shape != torchs.shape:
        raise ParityError(f"{graph}: {output} has shape {ours.shape}, torch gives {torchs.shape}; the export is wrong")
    error = float(np.abs(ours.astype(np.float64) - torchs).max()) if ours.size else 0.0
    largest = float(np.abs(torchs).max()) if ours.size else 1.0
    return ParityRow(graph, output, error, error / max(largest, 1e-12), tolerance)


def verify_text(model: Glip, directory: Path, tokenizer: Tokenizer) -> list[ParityRow]:
    """Compare the text branch, for one prompt and for a batch of two with padding."""
    import torch

    prompt = parse_prompt(list(CLASSES), tokenizer, max_tokens=model.config.input.max_tokens)
    tokens = len(prompt.input_ids)
    ids = np.zeros((2, tokens), np.int64)
    mask = np.zeros((2, tokens), np.int64)
    short = parse_prompt(["dog"], tokenizer).input_ids
    ids[0], mask[0] = prompt.input_ids, 1
    ids[1, : len(short)], mask[1, : len(short)] = short, 1
    session = open_session(directory / TEXT_GRAPH)
    rows = []
    for name, batch in (("text_embedding", slice(0, 1)), ("text_embedding, padded batch", slice(0, 2))):
        with torch.inference_mode():
            expected = model.encode_text(torch.from_numpy(ids[batch]), torch.from_numpy(mask[batch])).numpy()
        (found,) = session.run(["text_embedding"], {**text_inputs(ids[batch]), "attention_mask": mask[batch]})
        rows.append(_row(TEXT_GRAPH, name, found, expected, TEXT_TOLERANCE))
    return rows


@dataclass(frozen=True)
class Reference:
    """The image branch's inputs for a picture, and what torch computes of them."""

    inputs: ImageInputs
    raw: dict[str, NDArray[Any]]
    """Raw outputs of the head, by name."""
    features: dict[str, NDArray[Any]]
    """What the backbone graph gives, by name."""


def reference(model: Glip, tokenizer: Tokenizer, picture: Path = PICTURE) -> Reference:
    """Run torch on an image file, which graphs are then compared with."""
    import torch

    from glip_export.model.glip import ImageBranch

    prompt = parse_prompt(list(CLASSES), tokenizer, max_tokens=model.config.input.max_tokens)
    content = make_canvas([load_image(picture)], color="rgb", shortest_side=SHORTEST_SIDE, longest_side=LONGEST_SIDE)
    ids = torch.from_numpy(prompt.input_ids.copy())[None]
    with torch.inference_mode():
        embedding = model.encode_text(ids, torch.ones_like(ids))
        inputs = ImageInputs.of(content.frames, content.image_sizes, embedding[0].numpy(), prompt.class_map)
        branch = ImageBranch(model, features=True)
        outputs = branch(*(torch.from_numpy(array.copy()) for array in inputs.feed().values()))
    features = feature_tensors(model.config.head.channels, model.config.head.strides)
    named = zip((*RAW_OUTPUTS, *features), outputs[-len(RAW_OUTPUTS) - len(features) :], strict=True)
    arrays = {tensor.name: array.numpy() for tensor, array in named}
    raw = {tensor.name: arrays.pop(tensor.name) for tensor in RAW_OUTPUTS}
    return Reference(inputs, raw, arrays)


def verify_image(model: Glip, directory: Path, torchs: Reference) -> list[ParityRow]:
    """Compare the image branch's candidates, and its raw outputs where the graph gives them."""
    return _candidate_rows(IMAGE_GRAPH, model, torchs, _run(directory / IMAGE_GRAPH, torchs.inputs.feed()))


def verify_split(model: Glip, directory: Path, torchs: Reference) -> list[ParityRow]:
    """Compare the two parts of the image branch, the head on what the backbone graph gave it."""
    features = _run(directory / BACKBONE_GRAPH, torchs.inputs.frame_feed())
    found = _run(directory / HEAD_GRAPH, {**features, **torchs.inputs.prompt_feed()})
    rows = [_row(BACKBONE_GRAPH, name, features[name], torchs.features[name], _tolerance(model)) for name in features]
    return [*rows, *_candidate_rows(HEAD_GRAPH, model, torchs, found)]


def _tolerance(model: Glip) -> float:
    return HEAD_TOLERANCE["swin-l" if model.config.swin.embed_dim > 128 else "swin-t"]


def _run(graph: Path, feed: dict[str, Any]) -> dict[str, NDArray[Any]]:
    session = open_session(graph)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def _candidate_rows(graph: str, model: Glip, torchs: Reference, found: dict[str, NDArray[Any]]) -> list[ParityRow]:
    inputs, raw, tolerance = torchs.inputs, torchs.raw, _tolerance(model)
    rows = [_row(graph, name, found[name], raw[name], tolerance) for name in raw if name in found]
    outputs = RawOutputs(*(raw[tensor.name][0] for tensor in RAW_OUTPUTS))
    compared = compare(Candidates.of(found), outputs, inputs, model.config.head, tolerance)
    boxes, size = f"boxes ({compared.count} candidates), pixels", float(np.abs(found["boxes"]).max())
    return [
        *rows,
        ParityRow(graph, boxes, compared.box, compared.box / size, BOX_TOLERANCE),
        ParityRow(graph, "scores", compared.score, compared.score, SCORE_TOLERANCE),
    ]


def verify_precision(
    model: Glip, directory: Path, tokenizer: Tokenizer, precision: str, torchs: Reference
) -> list[ParityRow]:
    """Compare what the written fp32 graphs would compute in a lower precision with torch in fp32.

    Every half-precision value is rounded, whatever ONNX Runtime's CPU would do. The yardstick is the error that
    rounding the weights alone makes, in the same run: the mean error may be three times that (`LOSS`), or `ROUNDINGS`
    roundings of the mean value where the weights are half precision already and that error is nothing.

    Args:
        model: the checkpoint, fp32.
        directory: holds all graphs, the image and the head graph with their raw outputs.
        tokenizer: the bundle's.
        precision: "fp16" or "bf16".
        torchs: of the image branch.
    """
    import torch

    inputs, raw, features = torchs.inputs, torchs.raw, torchs.features
    ids = parse_prompt(list(CLASSES), tokenizer, max_tokens=model.config.input.max_tokens).input_ids[None]
    text_feed = text_inputs(ids)
    with torch.inference_mode():
        text = model.encode_text(torch.from_numpy(ids.copy()), torch.ones(ids.shape, dtype=torch.int64)).numpy()
    cases: list[tuple[str, list[str], dict[str, NDArray[Any]], list[NDArray[Any]]]] = [
        (TEXT_GRAPH, ["text_embedding"], text_feed, [text]),
        (IMAGE_GRAPH, list(raw), inputs.feed(), list(raw.values())),
        (BACKBONE_GRAPH, list(features), inputs.frame_feed(), list(features.values())),
        (HEAD_GRAPH, list(raw), {**features, **inputs.prompt_feed()}, list(raw.values())),
    ]
    rows = []
    for graph, outputs, feed, expected in cases:
        found = run_changed(directory / graph, outputs, feed, lambda m: to_precision(m, precision, rounded=True))
        yardstick = run_changed(directory / graph, outputs, feed, lambda m: round_weights(m, precision))
        for name, ours, rounded, truth in zip(outputs, found, yardstick, expected, strict=True):
            least = ROUNDINGS * ROUNDOFF[precision] * float(np.abs(truth).mean())
            allowed = max(LOSS * float(np.abs(rounded - truth).mean()), least)
            mean = float(np.abs(ours - truth).mean())
            worst = float(np.abs(ours - truth).max())
            relative = worst / max(float(np.abs(truth).max()), 1e-12)
            rows.append(ParityRow(graph, f"{name}, {precision}", worst, relative, allowed, mean))
    return rows


def run_changed(
    path: Path,
    outputs: list[str],
    feed: dict[str, NDArray[Any]],
    change: Callable[[onnx_ir.Model], onnx_ir.Model],
) -> list[NDArray[Any]]:
    """Run a changed copy of a graph and return its outputs."""
    import onnx_ir

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".changed-") as scratch:
        copy = Path(scratch) / path.name
        onnx_ir.save(change(onnx_ir.load(path)), copy, external_data=f"{path.name}.data")
        results: list[NDArray[Any]] = open_session(copy).run(outputs, feed)
    return results


def check(rows: Sequence[ParityRow]) -> None:
    """Raise ParityError naming the worst row if any is beyond its tolerance."""
    bad = [row for row in rows if not row.ok]
    if bad:
        worst = max(bad, key=lambda row: row.max_abs / row.tolerance if np.isfinite(row.max_abs) else np.inf)
        raise ParityError(
            f"{worst.graph}: {worst.output} differs from torch by"
            f" {worst.max_abs if worst.mean_abs is None else worst.mean_abs:.3g}, more than {worst.tolerance:g};"
            " the bundle was not written. Please report this with the versions of torch, onnx and onnxruntime"
        )
