"""GLIP as it was released: every frame encodes the text again, padded to 256 tokens, and fuses at full width.

The same weights and, on real tokens, the same numbers as our form; only the work differs. It is what the other
subjects are compared with. Sources: `generalized_vl_rcnn.py` (text per forward, `PAD_MAX`), `fuse_helper.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from glip_export.model.fusion import BiMultiHeadAttention, VlFuse
from torch import Tensor

from glip_bench.subjects.profile import Stage

if TYPE_CHECKING:
    from glip_export.model.config import GlipConfig
    from glip_export.model.glip import Glip
    from glip_export.model.head import Candidates

__all__ = ["OfficialForm", "official_macs"]

PADDED = 256
MASKED = -9e15  # the official value


class DirectAttention(BiMultiHeadAttention):
    """Two-way cross attention as published: every visual token is projected to the joint width, three times."""

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


class OfficialForm:
    """A model run the official way; shares the weights of the one it is made from."""

    def __init__(self, model: Glip) -> None:
        memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, memo)
        for module in self.model.modules():
            if isinstance(module, VlFuse):
                module.b_attn.attn.__class__ = DirectAttention

    def detect(self, frames: Tensor, image_sizes: Tensor, input_ids: Tensor, class_map: Tensor) -> Candidates:
        """Everything of one frame, the text branch included.

        Args:
            frames: (B, H, W, 3) uint8 BGR canvas.
            image_sizes: (B, 2) int64.
            input_ids: (T,) int64, T at most 256.
            class_map: (C, T) float32.

        Returns:
            Candidates, as `Glip.forward` gives them.
        """
        batch, tokens = frames.shape[0], input_ids.shape[0]
        ids = torch.zeros(batch, PADDED, dtype=torch.int64, device=input_ids.device)
        mask = torch.zeros_like(ids)
        ids[:, :tokens], mask[:, :tokens] = input_ids, 1
        classes = torch.zeros(batch, class_map.shape[0], PADDED, device=class_map.device)
        classes[:, :, :tokens] = class_map
        embedding = self.model.encode_text(ids, mask)
        found: Candidates = self.model(frames, image_sizes, embedding, mask, classes)
        return found


def official_macs(config: GlipConfig, height: int = 800, width: int = 1344) -> Mapping[Stage | str, int]:
    """Count the multiply-adds of one frame in the official form, per block; nothing is computed.

    Args:
        config: the variant.
        height: of the network's input, a multiple of 32.
        width: likewise.

    Returns:
        Multiply-adds of Swin, FPN, "BERT", fusion, the head's BERT layers and DyConv (offsets included).
    """
    from glip_export.model.glip import Glip
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = OfficialForm(Glip(config)).model.eval()
        image = torch.empty(1, height, width, 3)
        ids = torch.zeros(1, PADDED, dtype=torch.int64)
    total: dict[Stage | str, int] = {}

    def counted(stage: Stage | str, run: object, *arguments: object) -> object:
        with FlopCounterMode(display=False) as counter:
            result = run(*arguments)  # type: ignore[operator]
        total[stage] = total.get(stage, 0) + counter.get_total_flops() // 2
        return result

    with torch.inference_mode():
        hidden = counted("BERT", model.encode_text, ids, ids)
        maps = counted(Stage.SWIN, model.backbone.body, image)
        maps = counted(Stage.FPN, model.backbone.fpn, maps)
        bias = torch.zeros(1, 1, 1, PADDED, device="meta")
        tower = model.rpn.head.dyhead_tower
        fuse, layer, convolve = tower[:3] if config.head.fusion else (None, None, tower[0])
        if fuse is not None:
            maps, hidden = counted(Stage.FUSION, fuse, maps, hidden, ids)  # type: ignore[misc]
            counted(Stage.TEXT_LAYERS, layer, hidden, bias)
        counted(Stage.DYCONV, convolve, maps)
    for stage in (Stage.FUSION, Stage.TEXT_LAYERS, Stage.DYCONV):  # the blocks of the tower are all of one size
        if stage in total:
            total[stage] *= config.head.blocks
    return total
