"""Official GLIP state dicts in the form of mmdetection's files, for tests of the way back."""

from __future__ import annotations

import re
from typing import Any

NECK = {
    **{f"backbone.fpn.fpn_inner{i + 2}": f"neck.lateral_convs.{i}.conv" for i in range(3)},
    **{f"backbone.fpn.fpn_layer{i + 2}": f"neck.fpn_convs.{i}.conv" for i in range(3)},
    "backbone.fpn.top_blocks.p6": "neck.fpn_convs.3.conv",
    "backbone.fpn.top_blocks.p7": "neck.fpn_convs.4.conv",
}


def mmdetection_state(state: dict[str, Any], *, newer: bool = True) -> dict[str, Any]:
    """Translate an official state dict, as `tools/model_converters/glip_to_mmdet.py` of mmdetection does.

    Args:
        state: tensors by official key.
        newer: with the names that the head's modules have today (`dyconvs`, `attnconv`); files converted before have
            the official ones there.
    """
    translated: dict[str, Any] = {}
    for key, value in state.items():
        name = key
        if ".pooler." in key:
            continue
        if key.startswith("backbone.body."):
            name = "backbone." + key.removeprefix("backbone.body.").replace("layers.", "stages.")
            name = name.replace("patch_embed.proj.", "patch_embed.projection.").replace(".attn.", ".attn.w_msa.")
            name = name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        elif key.startswith("backbone.fpn."):
            module, _, leaf = key.rpartition(".")
            name = f"{NECK[module]}.{leaf}"
        elif key.startswith("language_backbone."):
            name = f"language_model.{key}"
        elif key.startswith("rpn."):
            name = "bbox_head." + key.removeprefix("rpn.")
            if newer:
                name = re.sub(r"(tower\.\d+)\.DyConv\.", r"\1.dyconvs.", name).replace(".AttnConv.", ".attnconv.")
        translated[name] = unfold_order(value) if ".downsample." in key else value.clone()
    return translated


def unfold_order(value: Any) -> Any:
    """Move the last axis of a patch merging's weight from the official order of neighbors to that of `nn.Unfold`.

    Official code puts the pixels at (row, column) (0, 0), (1, 0), (0, 1), (1, 1) side by side, `nn.Unfold` gives every
    channel its four pixels in reading order.
    """
    channels = value.shape[-1] // 4
    neighbors = [value[..., i * channels : (i + 1) * channels] for i in range(4)]
    reading_order = [neighbors[0], neighbors[2], neighbors[1], neighbors[3]]
    result = value.new_empty(value.shape)
    for i, neighbor in enumerate(reading_order):
        result[..., i::4] = neighbor
    return result
