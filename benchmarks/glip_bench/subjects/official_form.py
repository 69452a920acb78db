"""GLIP as it was released: every frame encodes the text again, padded to 256 tokens, and fuses at full width.

The weights are the same and, on real tokens, so are the numbers; only the amount of work differs. Official sources:
`modeling/detector/generalized_vl_rcnn.py` (text in every forward pass), `utils/fuse_helper.py` (fusion).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from glip_export.model.fpn import level_sizes
from glip_export.model.fusion import BiMultiHeadAttention, VlFuse
from torch import Tensor

if TYPE_CHECKING:
    from glip_export.model.config import GlipConfig
    from glip_export.model.glip import Glip

__all__ = ["PADDED", "official_form", "official_macs"]

PADDED = 256
"""Tokens of every prompt (official `MODEL.LANGUAGE_BACKBONE.MAX_QUERY_LEN`)."""
MASKED = -9e15  # the official value


class DirectAttention(BiMultiHeadAttention):
    """Two-way cross attention as published: every visual token is projected to the joint width, three times."""

    @classmethod
    def sharing(cls, other: BiMultiHeadAttention) -> DirectAttention:
        """Return one with the very weights of another attention."""
        with torch.device("meta"):
            widths = other.v_proj.in_features, other.l_proj.in_features, other.v_proj.out_features
            direct = cls(*widths, other.heads).eval().requires_grad_(False)
        direct.load_state_dict(other.state_dict(), assign=True)
        return direct

    def forward(self, v: Tensor, l: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        """See `BiMultiHeadAttention.forward`."""
        query, key = self._split(self.v_proj(v)) * self.head_dim**-0.5, self._split(self.l_proj(l))
        value_v, value_l = self._split(self.values_v_proj(v)), self._split(self.values_l_proj(l))
        scores = query @ key.transpose(-1, -2)  # (B, h, N, T)
        seen = scores.masked_fill(mask[:, None, None, :] == 0, MASKED).softmax(dim=-1)
        looked = scores.transpose(-1, -2).softmax(dim=-1)
        dv = (seen @ value_l).transpose(1, 2).flatten(2)
        dl = (looked @ value_v).transpose(1, 2).flatten(2)
        return self.out_v_proj(dv), self.out_l_proj(dl)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.heads, self.head_dim).transpose(1, 2)


def official_form(model: Glip) -> Glip:
    """Return a model that fuses the official way; it shares the weights of the one given, which stays as it is."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    form = copy.deepcopy(model, memo)
    for module in form.modules():
        if isinstance(module, VlFuse):
            module.b_attn.attn = DirectAttention.sharing(module.b_attn.attn)
    return form


def official_macs(config: GlipConfig, height: int = 800, width: int = 1344) -> Mapping[str, int]:
    """Count the multiply-adds of one frame in the official form; nothing is computed.

    Args:
        config: the variant.
        height: of the network's input in pixels, a multiple of 32.
        width: likewise.

    Returns:
        Multiply-adds by block of the paper: "Swin", "FPN", "BERT", "fusion" and "text layers" (where there is fusion),
        "DyConv" (offsets included).
    """
    from glip_export.model.glip import Glip
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = official_form(Glip(config)).eval()
        image = torch.empty(1, height, width, 3)
        ids = torch.zeros(1, PADDED, dtype=torch.int64)
        bias = torch.zeros(1, 1, 1, PADDED)
    total: dict[str, int] = {}

    def counted(block: str, times: int, run: Callable[..., Any], *arguments: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = run(*arguments)
        total[block] = times * (counter.get_total_flops() // 2)
        return result

    tower, blocks = model.rpn.head.dyhead_tower, config.head.blocks  # the blocks of the tower are all of one size
    with torch.inference_mode():
        hidden = counted("BERT", 1, model.encode_text, ids, ids)
        maps = counted("Swin", 1, model.backbone.body, image)
        maps = counted("FPN", 1, model.backbone.fpn, maps)
        sizes = level_sizes(maps)
        if config.head.fusion:
            maps, hidden = counted("fusion", blocks, tower[0], maps, sizes, hidden, ids)
            counted("text layers", blocks, tower[1], hidden, bias)
        counted("DyConv", blocks, tower[2 if config.head.fusion else 0], maps, sizes)
    return total
