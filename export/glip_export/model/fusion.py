"""Deep fusion of image and text (GLIP paper, X-MHA; official `utils/fuse_helper.py`), in its absorbed form.

The official code projects every visual token (22,400 of them at 800x1344) between 256 and 2048 channels three times.
Since tokens T << N, the projections are multiplied into the text side instead, once per frame and head:

    scores = V K' + kb      K'_h = Wq_h k_h^T / sqrt(d)     kb_h = bq_h . k_h / sqrt(d)
    dV     = softmax_T(scores) stack_h(v_h Wov_h) + bov
    dL_h   = (softmax_N(scores)^T V) Wv_h + bv_h            (rows of a softmax sum to one)

The same function, exactly; every product over N has width heads * T. The official clamps at +-50000 and the "+1" on
valid tokens have no effect on a softmax that subtracts its maximum, and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from glip_export.model.bert import MASKED
from glip_export.model.config import HeadConfig
from glip_export.model.fpn import LevelSizes

__all__ = ["VlFuse"]


class BiMultiHeadAttention(nn.Module):
    """Parameters and arithmetic of the two-way cross attention; dimensions: V visual width, L text width, E joint."""

    def __init__(self, visual: int, text: int, embed: int, heads: int) -> None:
        super().__init__()
        self.visual, self.heads, self.head_dim = visual, heads, embed // heads
        self.v_proj = nn.Linear(visual, embed)
        self.l_proj = nn.Linear(text, embed)
        self.values_v_proj = nn.Linear(visual, embed)
        self.values_l_proj = nn.Linear(text, embed)
        self.out_v_proj = nn.Linear(embed, visual)
        self.out_l_proj = nn.Linear(embed, text)

    def forward(self, v: Tensor, l: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        """Return the updates (dV, dL).

        Args:
            v: (B, N, V) normalized visual tokens of all levels.
            l: (B, T, L) normalized text tokens.
            mask: (B, T), one for real tokens; padded tokens are invisible to the image.
        """
        batch, tokens = mask.shape  # all layers share it: a graph asks for its sizes once
        heads, dim = self.heads, self.head_dim
        visual = self.visual

        # Text side first: everything here is tiny.
        key = self.l_proj(l).view(batch, tokens, heads, dim).transpose(1, 2) * dim**-0.5  # (B, h, T, d)
        query_weight = self.v_proj.weight.view(heads, dim, visual)
        folded_key = (key @ query_weight).reshape(batch, heads * tokens, visual)  # (B, hT, V)
        key_bias = (key @ self.v_proj.bias.view(heads, dim, 1)).reshape(batch, 1, heads * tokens)
        value = self.values_l_proj(l).view(batch, tokens, heads, dim).transpose(1, 2)
        out_weight = self.out_v_proj.weight.view(visual, heads, dim).permute(1, 2, 0)
        folded_value = (value @ out_weight).reshape(batch, heads * tokens, visual)  # (B, hT, V)

        scores = v @ folded_key.transpose(1, 2) + key_bias  # (B, N, hT)

        # Image side: softmax over the tokens of each head, padded tokens out.
        padding = ((1.0 - mask.to(v.dtype)) * MASKED)[:, None, None, :]
        seen = (scores.view(batch, -1, heads, tokens) + padding).softmax(dim=-1)
        dv = seen.reshape(batch, -1, heads * tokens) @ folded_value + self.out_v_proj.bias

        # Text side: softmax over all visual tokens; canvas padding takes part, as it did in training.
        looked = scores.transpose(1, 2).softmax(dim=-1) @ v  # (B, hT, V)
        looked = looked.view(batch, heads, tokens, visual)
        value_weight = self.values_v_proj.weight.view(heads, dim, visual).transpose(1, 2)
        summary = looked @ value_weight + self.values_v_proj.bias.view(heads, 1, dim)
        dl = self.out_l_proj(summary.transpose(1, 2).reshape(batch, tokens, heads * dim))
        return dv, dl


class BiAttentionBlock(nn.Module):
    """Norms, two-way attention, scaled residuals; the residual is added to the *normalized* features."""

    def __init__(self, config: HeadConfig, text: int) -> None:
        super().__init__()
        import torch

        self.layer_norm_v = nn.LayerNorm(config.channels)
        self.layer_norm_l = nn.LayerNorm(text)
        self.attn = BiMultiHeadAttention(config.channels, text, config.fusion_dim, config.fusion_heads)
        self.gamma_v = nn.Parameter(torch.full((config.channels,), 1 / config.blocks))
        self.gamma_l = nn.Parameter(torch.full((text,), 1 / config.blocks))

    def forward(self, v: Tensor, l: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        """Fuse (B, N, V) visual and (B, T, L) text tokens; both keep their shape."""
        v, l = self.layer_norm_v(v), self.layer_norm_l(l)  # noqa: E741
        dv, dl = self.attn(v, l, mask)
        return v + self.gamma_v * dv, l + self.gamma_l * dl


class VlFuse(nn.Module):
    """One fusion module of the tower."""

    def __init__(self, config: HeadConfig, text: int) -> None:
        super().__init__()
        self.channels = config.channels
        self.b_attn = BiAttentionBlock(config, text)

    def forward(
        self, features: Sequence[Tensor], sizes: LevelSizes, hidden: Tensor, mask: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Fuse pyramid maps (B, C, H, W) of these sizes with text (B, T, L)."""
        import torch

        areas = [height * width for height, width in sizes]
        flat = [f.reshape(-1, self.channels, area) for f, area in zip(features, areas, strict=True)]
        visual, hidden = self.b_attn(torch.cat(flat, dim=2).transpose(1, 2), hidden, mask)
        levels = visual.transpose(1, 2).split(areas, dim=2)
        fused = [level.reshape(-1, self.channels, *size) for level, size in zip(levels, sizes, strict=True)]
        return fused, hidden
