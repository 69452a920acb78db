"""The tower, the prediction layers and candidate selection (official `rpn/vldyhead.py`, `rpn/inference.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glip_export.model.bert import BertLayer, attention_bias
from glip_export.model.config import GlipConfig, HeadConfig
from glip_export.model.deform import DeformConv, deform_conv2d
from glip_export.model.dyhead import DyConv
from glip_export.model.fpn import level_sizes
from glip_export.model.fusion import VlFuse

__all__ = ["Candidates", "Head", "HeadOutputs", "LevelOutputs", "decode", "select_candidates"]

BOX_CLIP = math.log(1000.0 / 16)
ANCHOR_CELLS = 8  # an anchor is 8 strides wide (ANCHOR_SIZES / ANCHOR_STRIDE)


@dataclass(frozen=True)
class LevelOutputs:
    """Raw predictions of one pyramid level of size (H, W), before any sigmoid."""

    logits: Tensor
    """(B, T, H*W) alignment of every token with every location."""
    deltas: Tensor
    """(B, 4, H*W) box regression (dx, dy, dw, dh), scaled by the level's learned scale."""
    centerness: Tensor
    """(B, 1, H*W)."""
    width: int
    """W, to turn a flat location back into (x, y)."""


@dataclass(frozen=True)
class HeadOutputs:
    """Raw predictions of all levels."""

    levels: list[LevelOutputs]
    hidden: Tensor
    """(B, T, D) text after the tower."""
    features: list[Tensor] = field(default_factory=list)
    """Maps (B, C, H, W) of the levels, as the first module that reads the text finds them."""


@dataclass(frozen=True)
class Candidates:
    """What leaves the network: up to 1000 slots per level; an empty slot has score 0."""

    boxes: Tensor
    """(B, K, 4) float32 xyxy in pixels of the resized picture, clipped to it."""
    scores: Tensor
    """(B, K) float32 sqrt(class score * centerness), 0 where the slot is empty."""
    labels: Tensor
    """(B, K) int64 rows of the class map (0-based)."""


class Scale(nn.Module):
    """One learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times the factor."""
        return x * self.scale


class Head(nn.Module):
    """Tower of (fusion, BERT layer, DyConv) blocks, then box, centerness and token-alignment predictions.

    Args:
        config: of the whole model.
        squeeze: hidden width of DyReLU's two linear layers.
        deform: computes the deformable convolutions.
    """

    def __init__(self, config: GlipConfig, squeeze: int = 64, deform: DeformConv = deform_conv2d) -> None:
        super().__init__()
        head, text = config.head, config.bert.hidden
        self.config = head
        tower: list[nn.Module] = []
        for _ in range(head.blocks):
            if head.fusion:
                tower += [
                    VlFuse(head, text),
                    BertLayer(text, head.bert_heads, head.bert_intermediate, clamped=True),
                ]
            tower.append(DyConv(head, squeeze, deform))
        self.dyhead_tower = nn.ModuleList(tower)
        self.bbox_pred = nn.Conv2d(head.channels, 4, 1)
        self.centerness = nn.Conv2d(head.channels, 1, 1)
        self.dot_product_projection_text = nn.Linear(text, head.channels)
        self.scales = nn.ModuleList(Scale() for _ in head.strides)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.bias_lang = nn.Parameter(torch.zeros(text))
        self.bias0 = nn.Parameter(torch.full((1,), -math.log(99.0)))

    def forward(self, features: Sequence[Tensor], hidden: Tensor, mask: Tensor) -> HeadOutputs:
        """Predict from P3..P7.

        Args:
            features: five maps (B, C, H, W).
            hidden: (B, T, D) text encoder output.
            mask: (B, T), one for real tokens.
        """
        maps, sizes = list(features), level_sizes(features)
        bias = attention_bias(mask, hidden.dtype)
        tokens = hidden * mask.to(hidden.dtype)[:, :, None]  # GLIP-T (A) scores with the unfused, masked text
        before_text: list[Tensor] = []
        for module in self.dyhead_tower:
            if isinstance(module, VlFuse):
                before_text = before_text or maps
                maps, hidden = module(maps, sizes, hidden, mask)
            elif isinstance(module, BertLayer):
                hidden = module(hidden, bias)
            else:
                maps = module(maps, sizes)
        if self.config.fusion:
            tokens = hidden
        else:
            sizes = level_sizes(maps)  # what reads the text begins here: an exported head has these maps alone
        weight, offset = self.token_classifier(tokens)
        levels = []
        for scale, x, (height, width) in zip(self.scales, maps, sizes, strict=True):
            area = height * width
            levels.append(
                LevelOutputs(
                    logits=weight @ x.reshape(-1, self.config.channels, area) + offset,
                    deltas=scale(self.bbox_pred(x)).reshape(-1, 4, area),
                    centerness=self.centerness(x).reshape(-1, 1, area),
                    width=width,
                )
            )
        return HeadOutputs(levels, hidden, before_text or maps)

    def token_classifier(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Turn text into the weight (B, T, C) and bias (B, T, 1) of a linear classifier over locations.

        Official `vldyhead.py`, "dot product": only the projection sees e/2; `bias_lang` sees e.
        """
        e = F.normalize(tokens, dim=-1)
        weight = self.dot_product_projection_text(e / 2) / self.log_scale.exp()
        return weight, (e @ self.bias_lang + self.bias0)[:, :, None]


def decode(deltas: Tensor, x: Tensor, y: Tensor, stride: int) -> Tensor:
    """Turn box deltas at given locations into corners (official `box_coder.py`, with its "+1" widths).

    Args:
        deltas: (..., 4) dx, dy, dw, dh.
        x: (...) location column, as floating point.
        y: (...) location row.
        stride: pixels per location; the anchor there is 8 strides wide, centered (stride - 1) / 2 past the corner.

    Returns:
        (..., 4) xyxy in pixels of the network's input, unclipped.
    """
    size = float(ANCHOR_CELLS * stride)
    center = (stride - 1) / 2
    middle = deltas[..., :2] / 10 * size + (torch.stack((x, y), dim=-1) * stride + center)
    half = ((deltas[..., 2:] / 5).clamp(max=BOX_CLIP).exp() * size - 1) * 0.5
    return torch.cat((middle - half, middle + half), dim=-1)


def _at_most(limit: int, size: int) -> int:
    """Return `min(limit, size)`, also while tracing, where a size is a tensor that must stay in the graph."""
    if torch.onnx.is_in_onnx_export():
        return cast(int, torch.minimum(torch.tensor(limit), torch.as_tensor(size)))
    return min(limit, size)


def select_candidates(outputs: HeadOutputs, class_map: Tensor, image_sizes: Tensor, config: HeadConfig) -> Candidates:
    """Score classes, keep the best of every level, decode and clip their boxes.

    A class's score is the mean of its tokens' sigmoids. A candidate must exceed the threshold *before* centerness;
    ranking and the final score (a square root) include it. Official: `rpn/inference.py`, per feature map.

    Args:
        outputs: raw predictions.
        class_map: (B, C, T), rows averaging the tokens of each class.
        image_sizes: (B, 2) int64 height, width of the resized pictures without canvas padding.
        config: thresholds and strides.
    """
    boxes, scores, labels = [], [], []
    limit = (image_sizes.to(class_map.dtype) - 1).flip(1).repeat(1, 2)[:, None, :]  # (B, 1, 4): x, y, x, y maxima
    none = class_map.new_zeros(())
    for level, stride in zip(outputs.levels, config.strides, strict=True):
        locations = level.logits.shape[2]
        class_scores = class_map @ level.logits.sigmoid()  # (B, C, locations)
        ranked = class_scores * level.centerness.sigmoid()
        ranked = torch.where(class_scores > config.score_threshold, ranked, none).flatten(1)
        best, index = ranked.topk(
            _at_most(config.candidates_per_level, ranked.shape[1]),
            dim=1,
        )
        label = index // locations
        location = index - label * locations
        row = location // level.width
        column = location - row * level.width
        deltas = level.deltas.gather(2, location[:, None, :].expand(-1, 4, -1)).transpose(1, 2)
        box = decode(deltas, column.to(deltas.dtype), row.to(deltas.dtype), stride)
        boxes.append(torch.minimum(box.clamp(min=0), limit))
        scores.append(best.sqrt())
        labels.append(label)
    return Candidates(torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(labels, 1))
