"""What half precision costs at full size, on stand-in models and the reference inputs.

    python benchmarks/parity/precision_table.py                        every golden at hand, fp16: a table
    python benchmarks/parity/precision_table.py --precision bf16 glip_T_od
    python benchmarks/parity/precision_table.py --islands glip_T_od    and what every island is worth

Every half-precision value is rounded (`glip_export.precision`, rounded=True). The yardstick is rounding the weights
alone, in the same run; the figures are mean absolute errors of the raw head outputs against the fp32 graph.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from parity_data import golden_path, load_golden, stand_in_model
from parity_table import GOLDENS, image_sizes

if TYPE_CHECKING:
    import onnx_ir
    import onnxruntime
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]

OUTPUTS = ("logits", "deltas", "centerness")
LOUD = 8.0
"""How much text embeddings and fusion gains are scaled in the search for overflow."""


@dataclass(frozen=True)
class Loss:
    """Mean absolute errors of one golden, by output."""

    lowered: dict[str, float]
    weights: dict[str, float]
    """Yardstick: weights rounded, nothing else."""
    largest: float
    """Largest half-precision value met, with everything scaled by LOUD; infinity if one overflowed."""

    @property
    def ratio(self) -> float:
        """Worst of the outputs."""
        return max(self.lowered[name] / self.weights[name] for name in OUTPUTS)


def session(model: onnx_ir.Model, folder: Path, name: str) -> onnxruntime.InferenceSession:
    """Save a graph and load it in ONNX Runtime."""
    import onnx_ir

    from glip_deploy.backends.onnxruntime import open_session

    onnx_ir.save(model, folder / f"{name}.onnx", external_data=f"{name}.data")
    return open_session(folder / f"{name}.onnx")


def exported(manifest: str, salt: str, folder: Path) -> Path:
    """Write the image graph of a stand-in model, raw outputs included."""
    import torch
    from glip_export.onnx_export import export_image

    if not (folder / "image.onnx").is_file():
        with torch.inference_mode():
            export_image(stand_in_model(manifest, salt), folder)
    return folder / "image.onnx"


def feed_of(arrays: Arrays, meta: dict[str, Any]) -> Arrays:
    """Return the golden's network input as bytes again, and its text as fp32 torch encodes it."""
    import torch

    model = stand_in_model(meta["manifest"], meta["salt"])
    config, tokens = model.config.input, meta["num_tokens"]
    pixels = arrays["input"].transpose(0, 2, 3, 1) * np.array(config.pixel_std) + np.array(config.pixel_mean)
    mask = np.ascontiguousarray(arrays["attention_mask"][:, :tokens]).astype(np.int64)
    ids = np.ascontiguousarray(arrays["input_ids"][:, :tokens]).astype(np.int64)
    with torch.inference_mode():
        text = model.encode_text(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    batch = len(pixels)
    weights = arrays["positive_map"][:, :tokens].astype(np.float32)
    class_map = weights / weights.sum(axis=1, keepdims=True)
    return {
        "frames": np.clip(np.round(pixels), 0, 255).astype(np.uint8),
        "image_sizes": image_sizes(arrays, batch),
        "text_embedding": np.broadcast_to(text, (batch, *text.shape[1:])).copy(),
        "text_mask": np.broadcast_to(mask, (batch, tokens)).copy(),
        "class_map": np.broadcast_to(class_map, (batch, *class_map.shape)).copy(),
    }


def mean_errors(found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> dict[str, float]:
    """Return the mean absolute error of each of OUTPUTS."""
    return {name: float(np.abs(a - b).mean()) for name, a, b in zip(OUTPUTS, found, expected, strict=True)}


def largest_half(graph: Path, feed: Arrays, precision: str, folder: Path) -> float:
    """Run with text and fusion scaled by LOUD; return the largest rounded value, infinity for an inf or NaN."""
    import onnx_ir as ir
    from glip_export.precision import to_precision

    model = ir.load(graph)
    for value in model.graph.initializers.values():
        if any(gain in (value.name or "") for gain in ("gamma_v", "gamma_l")):
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(LOUD), name=value.name)
    model = to_precision(model, precision, rounded=True)
    for node in list(model.graph):
        if node.op_type == "Cast" and (node.outputs[0].name or "").endswith("_rounded"):
            absolute = ir.node("Abs", [node.outputs[0]])
            peak = ir.node("ReduceMax", [absolute.outputs[0]], attributes={"keepdims": 0})
            peak.outputs[0].name, peak.outputs[0].dtype = f"{node.outputs[0].name}_peak", ir.DataType.FLOAT
            model.graph.extend([absolute, peak])
            model.graph.outputs.append(peak.outputs[0])
    runner = session(model, folder, "loud")
    names = [o.name for o in runner.get_outputs() if o.name.endswith("_peak")]
    peaks = np.array(runner.run(names, {**feed, "text_embedding": feed["text_embedding"] * np.float32(LOUD)}))
    assert len(peaks) > 100
    return float(peaks.max()) if np.isfinite(peaks).all() else float("inf")


def loss_on_golden(name: str, precision: str, folder: Path, loud: bool = True) -> Loss:
    """Measure one golden; without `loud`, overflow is not searched for."""
    import onnx_ir as ir
    from glip_export.precision import round_weights, to_precision

    arrays, meta = load_golden(f"{name}.npz")
    graph = exported(meta["manifest"], meta["salt"], folder)
    feed = feed_of(arrays, meta)
    expected = session(ir.load(graph), folder, "fp32").run(list(OUTPUTS), feed)
    lowered = session(to_precision(ir.load(graph), precision, rounded=True), folder, "low").run(list(OUTPUTS), feed)
    weights = session(round_weights(ir.load(graph), precision), folder, "weights").run(list(OUTPUTS), feed)
    return Loss(
        mean_errors(lowered, expected),
        mean_errors(weights, expected),
        largest_half(graph, feed, precision, folder) if loud else float("nan"),
    )


def islands_on_golden(name: str, precision: str, folder: Path) -> dict[str, dict[str, float]]:
    """Return the mean errors with one island at a time given up."""
    import onnx_ir as ir
    from glip_export.precision import ISLANDS, to_precision

    arrays, meta = load_golden(f"{name}.npz")
    graph = exported(meta["manifest"], meta["salt"], folder)
    feed = feed_of(arrays, meta)
    expected = session(ir.load(graph), folder, "fp32").run(list(OUTPUTS), feed)
    found = {}
    for given_up in (None, *ISLANDS):
        islands = tuple(island for island in ISLANDS if island is not given_up)
        model = to_precision(ir.load(graph), precision, rounded=True, islands=islands)
        label = "with all islands" if given_up is None else f"without {given_up.name}"
        found[label] = mean_errors(session(model, folder, "islands").run(list(OUTPUTS), feed), expected)
    return found


def show(label: str, errors: dict[str, float], rest: str = "") -> None:
    """Print a row."""
    print(f"{label:<34}" + "".join(f"{errors[name]:>12.1e}" for name in OUTPUTS) + rest, flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("goldens", nargs="*", default=GOLDENS)
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="fp16")
    parser.add_argument("--islands", action="store_true", help="also give up each island in turn")
    args = parser.parse_args()
    print(f"{'mean absolute error':<34}" + "".join(f"{name:>12}" for name in OUTPUTS))
    made = None
    folder = tempfile.TemporaryDirectory()
    for name in args.goldens:
        if golden_path(f"{name}.npz") is None:
            print(f"{name:<34}  not at hand")
            continue
        manifest = load_golden(f"{name}.npz")[1]["manifest"]
        if manifest != made:
            folder, made = tempfile.TemporaryDirectory(), manifest
        loss = loss_on_golden(name, args.precision, Path(folder.name))
        show(f"{name}, weights only", loss.weights)
        show(f"{name}, {args.precision}", loss.lowered, f"   ratio {loss.ratio:.2f}, largest value {loss.largest:.0f}")
        if args.islands:
            for label, errors in islands_on_golden(name, args.precision, Path(folder.name)).items():
                show(f"  {label}", errors)


if __name__ == "__main__":
    main()
