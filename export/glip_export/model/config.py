"""Sizes and switches of a GLIP, derived from the shapes in a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["BertConfig", "GlipConfig", "HeadConfig", "InputConfig", "SwinConfig"]


@dataclass(frozen=True)
class SwinConfig:
    """Swin Transformer v1 (Liu et al., ICCV 2021), without absolute position embedding."""

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_hidden: tuple[int, ...] = (384, 768, 1536, 3072)

    @property
    def channels(self) -> tuple[int, ...]:
        """Feature width of every stage; stage k works at stride 4 * 2**k."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))


@dataclass(frozen=True)
class BertConfig:
    """Text encoder: BERT (Devlin et al., 2019), post-norm, exact GELU, LayerNorm eps 1e-12."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    vocabulary: int = 30522
    positions: int = 512


@dataclass(frozen=True)
class HeadConfig:
    """DyHead tower with deep fusion, and the prediction layers (official `rpn/vldyhead.py`)."""

    channels: int = 256
    blocks: int = 6
    fusion: bool = True
    fusion_dim: int = 2048
    fusion_heads: int = 8
    bert_heads: int = 12
    bert_intermediate: int = 3072
    group_norm_groups: int = 16
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    score_threshold: float = 0.05
    candidates_per_level: int = 1000
    nms_iou: float = 0.6
    max_detections: int = 100


@dataclass(frozen=True)
class InputConfig:
    """Preprocessing: BGR 0..255, (x - mean) / std, sizes in pixels."""

    pixel_mean: tuple[float, float, float] = (103.530, 116.280, 123.675)
    pixel_std: tuple[float, float, float] = (57.375, 57.120, 58.395)
    shortest_side: int = 800
    longest_side: int = 1333
    size_divisibility: int = 32
    max_tokens: int = 256


@dataclass(frozen=True)
class GlipConfig:
    """A whole GLIP. `GlipConfig()` is GLIP-T (B), (C) and the released GLIP-T."""

    swin: SwinConfig = field(default_factory=SwinConfig)
    bert: BertConfig = field(default_factory=BertConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    input: InputConfig = field(default_factory=InputConfig)
    tunable_tokens: int = 0
    """Rows of `rpn.tunable_linear.weight`, 0 where the checkpoint is not prompt-tuned."""

    @property
    def variant(self) -> str:
        """The usual name: "GLIP-T (A)", "GLIP-T", "GLIP-L", "GLIP-L without fusion", or "GLIP (custom)"."""
        tuned = ", prompt-tuned" if self.tunable_tokens else ""
        shape = (self.swin.embed_dim, self.swin.depths, self.swin.window, self.head.blocks, self.bert.hidden)
        if shape == (96, (2, 2, 6, 2), 7, 6, 768):
            return ("GLIP-T" if self.head.fusion else "GLIP-T (A)") + tuned
        if shape == (192, (2, 2, 18, 2), 12, 8, 768):
            return ("GLIP-L" if self.head.fusion else "GLIP-L without fusion") + tuned
        return "GLIP (custom)" + tuned

    @property
    def longest_text(self) -> int:
        """Tokens that the text branch has positions for, and tuned rows where there are any."""
        return min(self.bert.positions, self.tunable_tokens or self.bert.positions)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and numbers, for the manifest."""
        return {"variant": self.variant, **asdict(self)}
