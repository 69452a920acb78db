"""Run whole stand-in models on the reference inputs and measure how far they are from the official outputs.

python benchmarks/parity/parity_table.py              every golden at hand, a table
python benchmarks/parity/parity_table.py glip_T_od
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from parity_data import golden_path, load_golden, stand_in_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy import Detections

# Ordered so that every model is made once.
GOLDENS = [
    "glip_T_od",
    "glip_T_odlist",
    "glip_T_caption",
    "glip_T_coco80",
    "glip_T_resize_demo",
    "glip_T_resize_eval",
    "glip_T_batch2",
    "glip_T_few",
    "glip_T_veryfew",
    "glip_B_od",
    "glip_B_caption",
    "glip_A_od",
    "glip_A_caption",
    "glip_L_od",
    "glip_L_caption",
]


@dataclass(frozen=True)
class Row:
    """One output of one golden."""

    output: str
    max_abs: float
    max_rel: float
    """Largest absolute error over the largest absolute value."""
    tolerance: float


@dataclass(frozen=True)
class Parity:
    """A model's outputs beside one golden."""

    rows: list[Row]
    detections: dict[str, Detections]
    """Detections by the suffix of the golden's `final_*` arrays."""
    arrays: dict[str, NDArray[Any]]
    """Of the golden."""


def compare_with_golden(name: str) -> Parity:
    """Run the model of a golden on its input, stage by stage."""
    import torch
    from glip_export.model.head import select_candidates

    from glip_deploy.results.postprocess import select

    arrays, meta = load_golden(f"{name}.npz")
    model = stand_in_model(meta["manifest"], meta["salt"])
    head_tolerance = 2e-3 if meta["manifest"] == "glip_L" else 1e-3
    tokens = meta["num_tokens"]
    image = torch.from_numpy(arrays["input"]).permute(0, 2, 3, 1).contiguous()
    batch = image.shape[0]
    mask = torch.from_numpy(arrays["attention_mask"][:, :tokens]).long()
    rows = []

    def hold(output: str, ours: NDArray[Any], golden: NDArray[Any], tolerance: float) -> None:
        assert ours.shape == golden.shape, output
        error = float(np.abs(ours - golden).max())
        rows.append(Row(output, error, error / float(np.abs(golden).max()), tolerance))

    with torch.inference_mode():
        text = model.encode_text(torch.from_numpy(arrays["input_ids"][:, :tokens]).long(), mask)
        if "lang_hidden" in arrays:
            hold("text", text.numpy(), arrays["lang_hidden"][:, :tokens], 1e-4)
        features = model.backbone(image)
        outputs = model.rpn.head(features, text, mask)
        for i, level in enumerate(outputs.levels):
            if f"fpn{i}" in arrays:
                hold(f"fpn{i}", features[i].numpy(), arrays[f"fpn{i}"], 1e-4)
            raw = {
                "bbox": level.deltas.numpy().reshape(batch, 4, -1),
                "ctr": level.centerness.numpy().reshape(batch, 1, -1),
                "logits": level.logits.numpy().transpose(0, 2, 1),
            }
            for part, ours in raw.items():
                if f"{part}{i}" in arrays:
                    golden = arrays[f"{part}{i}"]
                    golden = golden[:, :, :tokens] if part == "logits" else golden.reshape(ours.shape)
                    hold(f"{part}{i}", ours, golden, head_tolerance)
        sizes = image_sizes(arrays, batch)
        weights = arrays["positive_map"][:, :tokens].astype(np.float32)
        class_map = weights / weights.sum(axis=1, keepdims=True)
        found = select_candidates(
            outputs,
            torch.from_numpy(np.broadcast_to(class_map, (batch, *class_map.shape)).copy()),
            torch.from_numpy(sizes),
            model.config.head,
        )
    detections = {}
    for i in range(batch):
        picture = arrays[f"image_{i}"] if batch > 1 else arrays["image"]
        detections[f"_{i}" if batch > 1 else ""] = select(
            found.boxes[i].numpy(),
            found.scores[i].numpy(),
            found.labels[i].numpy(),
            thresholds=np.zeros(len(class_map), np.float32),
            phrases=[str(c) for c in range(len(class_map))],
            image_size=(int(sizes[i, 0]), int(sizes[i, 1])),
            original_size=picture.shape[:2],
        )
    return Parity(rows, detections, arrays)


def image_sizes(arrays: dict[str, NDArray[Any]], batch: int) -> NDArray[np.int64]:
    """Return height and width of the pictures in a golden's canvas, (batch, 2)."""
    if "image_sizes" in arrays:
        return arrays["image_sizes"].astype(np.int64)
    # The padding is exactly zero, and normalized pixels never are.
    picture = np.asarray(arrays["input"].any(axis=1))
    return np.stack([picture.any(axis=2).sum(axis=1), picture.any(axis=1).sum(axis=1)], axis=1)


def main(names: list[str]) -> None:
    """Print the table."""
    parts = ("text", "fpn", "logits", "bbox", "ctr")
    print("largest absolute error (relative to the largest value)")
    print(f"{'golden':<22}" + "".join(f"{part:>22}" for part in parts))
    for name in names:
        if golden_path(f"{name}.npz") is None:
            print(f"{name:<22}  not at hand")
            continue
        parity = compare_with_golden(name)
        cells = []
        for part in parts:
            rows = [row for row in parity.rows if row.output.rstrip("01234") == part]
            worst = f"{max(r.max_abs for r in rows):.1e} ({max(r.max_rel for r in rows):.0e})" if rows else "-"
            cells.append(f"{worst:>22}")
        print(f"{name:<22}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or GOLDENS)
