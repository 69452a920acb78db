"""GLIP-nano's sizes, its first weights, its checkpoints, and a quicker deformable convolution for training."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from glip_export.model import dyhead
from glip_export.model.bert import BertLayer
from glip_export.model.config import BertConfig, GlipConfig, HeadConfig, SwinConfig
from glip_export.model.deform import KERNEL, TAPS
from glip_export.model.glip import Glip
from torch import Tensor
from torch.nn import functional as F

from glip_deploy.files import not_written, write_atomically
from nano.text import POSITIONS, cut_vocabulary, pretrained_text_encoder

__all__ = [
    "BERT_HEADS",
    "SIDE",
    "SQUEEZE",
    "build_nano",
    "nano_config",
    "sampled_deform",
    "save_checkpoint",
    "write_whole",
]

SIDE = 224
"""Shortest side of the pictures it is trained on, in pixels; a bundle is opened with it."""
BERT_HEADS = 12
SQUEEZE = 32
TEXT_LAYERS = 3
STARTING_SHARPNESS = -1.0  # of `log_scale`: 2.7 times the default's logits, which a short training reaches too late
REBUILT = ("relative_position_index", "position_ids")


def nano_config(vocabulary: int) -> GlipConfig:
    """Return GLIP-T's architecture, every size cut."""
    dim, stages = 32, 4
    return GlipConfig(
        swin=SwinConfig(
            embed_dim=dim,
            depths=(2, 2, 4, 2),
            num_heads=(1, 2, 4, 8),
            window=7,
            mlp_hidden=tuple(4 * dim * 2**i for i in range(stages)),
        ),
        bert=BertConfig(384, TEXT_LAYERS, BERT_HEADS, 1536, vocabulary, POSITIONS),
        head=HeadConfig(channels=96, blocks=2, fusion_dim=128, bert_heads=BERT_HEADS, bert_intermediate=256),
    )


def build_nano(seed: int) -> tuple[Glip, tuple[str, ...]]:
    """Return a model to train, with random weights but for the pretrained, frozen text encoder; and its vocabulary.

    Raises:
        MissingPackage: the package with the text encoder is missing.
    """
    vocabulary = cut_vocabulary()
    torch.manual_seed(seed)
    model = Glip(nano_config(len(vocabulary)), SQUEEZE, sampled_deform)
    text = pretrained_text_encoder(TEXT_LAYERS, vocabulary)
    model.language_backbone.body.model.load_state_dict(text, strict=False)
    head = model.rpn.head
    with torch.no_grad():
        head.log_scale.fill_(STARTING_SHARPNESS)
        for module in model.modules():
            if isinstance(module, dyhead.DyConv):
                # Offsets start at zero and all taps alike: a plain 3x3 convolution (as in Deformable ConvNets v2).
                for parameter in module.offset.parameters():
                    parameter.zero_()
            if isinstance(module, BertLayer) and module.clamped:
                # The head's own BERT layers start close to doing nothing, so words keep their pretrained meaning.
                module.attention.output.dense.weight.mul_(0.1)
                module.output.dense.weight.mul_(0.1)
        for layer in (head.bbox_pred, head.centerness):
            torch.nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            torch.nn.init.zeros_(layer.bias)
        for name, parameter in model.backbone.named_parameters():
            if name.endswith("relative_position_bias_table"):
                torch.nn.init.trunc_normal_(parameter, std=0.02)
    freeze_text(model)
    return model, vocabulary


def freeze_text(model: Glip) -> None:
    """Keep the text encoder as it was pretrained, so names that training never shows keep their meaning."""
    model.language_backbone.requires_grad_(False)


def checkpoint_content(state: Mapping[str, Tensor], vocabulary: tuple[str, ...]) -> dict[str, Any]:
    """Return what goes into a `.pth`: official keys, fp16, and what shapes do not tell."""
    return {
        "model": {
            key: value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype).contiguous()
            for key, value in state.items()
            if not key.endswith(REBUILT)
        },
        "glip_config": {"bert_heads": BERT_HEADS},
        "vocabulary": list(vocabulary),
    }


def save_checkpoint(path: Path, state: Mapping[str, Tensor], vocabulary: tuple[str, ...]) -> None:
    """Write a checkpoint that `glip-export --model` reads."""
    write_whole(path, checkpoint_content(state, vocabulary))


def write_whole(path: Path, content: Any) -> None:
    """Save as `torch.save` does; the file is either the whole new one or the old one.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    buffer = io.BytesIO()  # torch.save turns a full disk into a RuntimeError without a reason; a plain write does not
    torch.save(content, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue(), sync=True)
    except OSError as error:
        raise not_written(path, error) from None


def sampled_deform(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """Compute `glip_export.model.deform.deform_conv2d` by `grid_sample`: the same values, a third of the time to train.

    For training only. What is exported is a checkpoint, loaded with the model's own.
    """
    batch, channels, height, width = x.shape
    h, w = offset.shape[-2:]
    tap = torch.arange(KERNEL, device=x.device)
    rows = torch.arange(h, device=x.device)[:, None] * stride - 1 + tap.repeat_interleave(KERNEL)[:, None, None]
    columns = torch.arange(w, device=x.device)[None, :] * stride - 1 + tap.repeat(KERNEL)[:, None, None]
    moved = offset.float().view(batch, TAPS, 2, h, w)
    y, z = moved[:, :, 0] + rows, moved[:, :, 1] + columns
    # grid_sample wants the first pixel at -1 and the last at 1; on a map of one pixel that scale is undefined, so one
    # row or column of zeros, which is what lies outside anyway, is added.
    if height == 1 or width == 1:
        x = F.pad(x, (0, int(width == 1), 0, int(height == 1)))
    last_y, last_z = x.shape[2] - 1, x.shape[3] - 1
    grid = torch.stack((z * (2 / last_z) - 1, y * (2 / last_y) - 1), dim=-1).view(batch, TAPS, h * w, 2)
    taken = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    taken = taken * mask.float().view(batch, 1, TAPS, h * w)
    flat = weight.flatten(1) @ taken.view(batch, channels * TAPS, h * w)
    return (flat + bias[:, None]).view(batch, -1, h, w)
