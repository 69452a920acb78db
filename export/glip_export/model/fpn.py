"""Feature pyramid P3..P7 (official `backbone/fpn.py`, "SWINT-FPN-RETINANET")."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Fpn", "LevelSizes", "level_sizes"]

LevelSizes = Sequence[tuple[int, int]]
"""Height and width of the map of each level."""


def level_sizes(features: Sequence[Tensor]) -> LevelSizes:
    """Return the sizes of maps (B, C, H, W).

    To be called once, and its result handed on: every `x.shape` becomes nodes of an exported graph.
    """
    return [(x.shape[2], x.shape[3]) for x in features]


class TopBlocks(nn.Module):
    """P6 from P5's output, P7 from relu(P6): 3x3 convolutions with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels, channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, p5: Tensor) -> tuple[Tensor, Tensor]:
        """Return (P6, P7)."""
        p6 = self.p6(p5)
        return p6, self.p7(F.relu(p6))


class Fpn(nn.Module):
    """Lateral 1x1, nearest top-down, 3x3 output; no norm and no ReLU."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        for i, width in enumerate(in_channels, start=2):
            self.add_module(f"fpn_inner{i}", nn.Conv2d(width, channels, 1))
            self.add_module(f"fpn_layer{i}", nn.Conv2d(channels, channels, 3, 1, 1))
        self.top_blocks = TopBlocks(channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map backbone maps (strides 8, 16, 32) to P3..P7, each (B, channels, H, W)."""
        last = len(features) + 1
        top = getattr(self, f"fpn_inner{last}")(features[-1])
        outputs = [getattr(self, f"fpn_layer{last}")(top)]
        for i in range(last - 1, 1, -1):
            lateral = getattr(self, f"fpn_inner{i}")(features[i - 2])
            # Backbone maps halve exactly on a canvas of multiples of 32, so nearest is a plain doubling.
            top = lateral + F.interpolate(top, scale_factor=2.0, mode="nearest")
            outputs.insert(0, getattr(self, f"fpn_layer{i}")(top))
        return [*outputs, *self.top_blocks(outputs[-1])]
