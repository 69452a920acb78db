"""Whole models against the official code's outputs: features, head outputs, candidates and final boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glip_export.model.head import select_candidates
from parity_data import SHARED, golden_path, load_golden, stand_in_model

from glip_deploy.detections import select

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


@pytest.mark.parametrize("name", GOLDENS)
def test_model_agrees_with_the_official_one(name):
    if golden_path(f"{name}.npz") is None:
        pytest.skip(f"{name}.npz is not in tests/data and there is no {SHARED}")
    arrays, meta = load_golden(f"{name}.npz")
    model = stand_in_model(meta["manifest"], meta["salt"])
    head_tolerance = 2e-3 if meta["manifest"] == "glip_L" else 1e-3
    tokens = meta["num_tokens"]
    image = torch.from_numpy(arrays["input"]).permute(0, 2, 3, 1).contiguous()
    batch = image.shape[0]
    mask = torch.from_numpy(arrays["attention_mask"][:, :tokens]).long()
    errors = {}

    def hold(output, ours, golden, tolerance):
        assert ours.shape == golden.shape, output
        errors[output] = (float(np.abs(ours - golden).max()), tolerance)

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
        rows = arrays["positive_map"][:, :tokens].astype(np.float32)
        class_map = rows / rows.sum(axis=1, keepdims=True)
        found = select_candidates(
            outputs,
            torch.from_numpy(np.broadcast_to(class_map, (batch, *class_map.shape)).copy()),
            torch.from_numpy(sizes),
            model.config.head,
        )
    bad = {output: value for output, value in errors.items() if not value[0] <= value[1]}
    assert not bad, bad
    for i in range(batch):
        suffix = f"_{i}" if batch > 1 else ""
        picture = arrays[f"image_{i}"] if batch > 1 else arrays["image"]
        detections = select(
            found.boxes[i].numpy(),
            found.scores[i].numpy(),
            found.labels[i].numpy(),
            thresholds=np.zeros(len(class_map), np.float32),
            phrases=[str(c) for c in range(len(class_map))],
            image_size=tuple(int(v) for v in sizes[i]),
            original_size=picture.shape[:2],
        )
        same_detections(detections, arrays, suffix)


def image_sizes(arrays, batch):
    if "image_sizes" in arrays:
        return arrays["image_sizes"].astype(np.int64)
    # The padding is exactly zero, and normalised pixels never are.
    picture = arrays["input"].any(axis=1)
    return np.array([[p.any(axis=1).sum(), p.any(axis=0).sum()] for p in picture], np.int64).reshape(batch, 2)


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
