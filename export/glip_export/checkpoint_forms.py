"""Forms of GLIP checkpoints other than the official one: mmdetection's names, and families that cannot be exported.

mmdetection publishes GLIP with the official weights under its own names, and fine-tuned files in the same form. Names
and order differ, values do not, so the translation is exact. Sources: mmdetection's
`tools/model_converters/glip_to_mmdet.py`, `models/backbones/swin.py`, `dense_heads/atss_vlfusion_head.py` and
`utils/vlfuse_helper.py`. Swin's tables of relative positions are the same there: mmdetection computes the index in
another way, to the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    StateDict = Mapping[str, torch.Tensor]

__all__ = ["irregularity", "to_official", "unsupported_family"]

_MMDETECTION = ("backbone.patch_embed.projection.weight", "bbox_head.head.bbox_pred.weight")
"""Keys of which mmdetection's form has one at least, and the official form none."""

_BLOCK = r"^(backbone\.body\.layers\.\d+\.blocks\.\d+\.)"
_TOWER = r"^(rpn\.head\.dyhead_tower\.\d+\.)"
_RENAMED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^backbone\.", "backbone.body."),
        (r"^backbone\.body\.patch_embed\.projection\.", "backbone.body.patch_embed.proj."),
        (r"^backbone\.body\.stages\.", "backbone.body.layers."),
        (_BLOCK + r"attn\.w_msa\.", r"\1attn."),
        (_BLOCK + r"ffn\.layers\.0\.0\.", r"\1mlp.fc1."),
        (_BLOCK + r"ffn\.layers\.1\.", r"\1mlp.fc2."),
        *((rf"^neck\.lateral_convs\.{i}\.conv\.", f"backbone.fpn.fpn_inner{i + 2}.") for i in range(3)),
        *((rf"^neck\.fpn_convs\.{i}\.conv\.", f"backbone.fpn.fpn_layer{i + 2}.") for i in range(3)),
        *((rf"^neck\.fpn_convs\.{i}\.conv\.", f"backbone.fpn.top_blocks.p{i + 3}.") for i in (3, 4)),
        (r"^language_model\.", ""),
        (r"^bbox_head\.", "rpn."),
        (_TOWER + r"dyconvs\.", r"\1DyConv."),  # files made before the class was renamed keep the official names
        (_TOWER + r"attnconv\.", r"\1AttnConv."),
    )
)
"""Applied in order, each to what the ones before have made of a key."""

_MERGING = re.compile(r"^backbone\.body\.layers\.\d+\.downsample\.(reduction\.weight|norm\.(weight|bias))$")
_TUNED_PROMPT = re.compile(r"^tunable_linear\.")

_FAMILIES = (
    (
        re.compile(r"^fusion_backbone\.|\.qkv_text_i2t\."),
        "is FIBER or DesCo-FIBER, which fuses text into the image backbone: text could not be encoded once for many"
        " frames, which is what a bundle does",
    ),
    (
        re.compile(r"^(feat_map|text_feat_map|model\.text_projection)\.weight$"),
        "is Grounding DINO, which finds boxes with a transformer decoder where GLIP has a dynamic head",
    ),
)
_BACKBONE_ALONE = (
    re.compile(r"^backbone\.|^(patch_embed|layers|stages|norm\d?|head)\."),
    "is a Swin backbone alone, as mmpretrain's swin-*_glip-pre: it has no text encoder and no detection head",
)


def to_official(state: StateDict) -> dict[str, torch.Tensor]:
    """Return a state dict under the official names, in the order of the file.

    mmdetection's patch merging orders the channels of its four neighbors otherwise, so the columns of
    `downsample.reduction` and the entries of `downsample.norm` move. A tuned prompt may stand outside the head, where
    the code of DesCo and FIBER has it.

    Args:
        state: tensors by key, without the `module.` prefix; in the official form they are returned as they are.

    Raises:
        ValueError: two keys are names of the same tensor.
    """
    rename = any(key in state for key in _MMDETECTION)
    official: dict[str, torch.Tensor] = {}
    source: dict[str, str] = {}
    for key, value in state.items():
        name = _TUNED_PROMPT.sub("rpn.tunable_linear.", key)
        if rename:
            for pattern, replacement in _RENAMED:
                name = pattern.sub(replacement, name)
        if name in official:
            raise ValueError(f"{source[name][:100]} and {key[:100]} are both {name[:100]}; keep one of them")
        official[name] = _official_merging(value) if rename and _MERGING.match(name) else value
        source[name] = key
    return official


def _official_merging(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a patch merging with its last axis in the official order: neighbor by neighbor.

    mmdetection goes channel by channel, and through the neighbors row by row; official code goes column by column.
    """
    if irregularity(value) is not None or not 1 <= value.dim() <= 2 or not value.numel() or value.shape[-1] % 4:
        return value  # the wrong kind or shape, which is reported where all of them are checked
    rows = value.reshape(-1, value.shape[-1] // 4, 4)
    return rows.transpose(1, 2)[:, [0, 2, 1, 3]].reshape(value.shape)


def irregularity(value: torch.Tensor) -> str | None:
    """Say in what way a tensor's values are not all in the file as floating-point numbers; None where they are."""
    import torch

    if value.is_nested:
        return "nested"
    if value.layout != torch.strided:
        return str(value.layout).removeprefix("torch.")
    if not value.is_floating_point():
        return str(value.dtype).removeprefix("torch.")
    if value.is_meta:
        return "without values (meta)"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return f"{tuple(value.shape)} made of fewer values (expanded)"
    return None


def unsupported_family(state: StateDict) -> str | None:
    """Return what a checkpoint is, and why it cannot be exported, as the rest of a sentence; None if it may be a GLIP.

    Args:
        state: tensors by official key.
    """
    for pattern, reason in _FAMILIES:
        if any(pattern.search(key) for key in state):
            return reason
    alone, reason = _BACKBONE_ALONE
    if any("patch_embed." in key for key in state) and all(alone.match(key) for key in state):
        return reason
    return None
