"""DyConv: scale-, space- and task-aware convolution of the Dynamic Head (official `rpn/vldyhead.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glip_export.model.config import HeadConfig
from glip_export.model.deform import KERNEL, TAPS, DeformConv, deform_conv2d, flat_read
from glip_export.model.fpn import LevelSizes

__all__ = ["DyConv", "DyReLU"]


def hard_sigmoid(x: Tensor) -> Tensor:
    """Return relu6(x + 3) / 6 (official `h_sigmoid`)."""
    return F.relu6(x + 3) / 6


class DyReLU(nn.Module):
    """Dynamic ReLU (Chen et al., ECCV 2020): the larger of two lines whose slopes depend on the whole map."""

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.channels = channels
        self.fc = nn.Sequential(nn.Linear(channels, squeeze), nn.ReLU(), nn.Linear(squeeze, 4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        y = hard_sigmoid(self.fc(x.mean(dim=(2, 3)))).view(-1, 4 * self.channels, 1, 1) - 0.5
        a1, b1, a2, b2 = torch.split(y, self.channels, dim=1)
        return torch.maximum(x * (a1 * 2 + 1) + b1, x * (a2 * 2) + b2)


class DeformConvNorm(nn.Module):
    """Modulated deformable convolution, computed by `deform`, then GroupNorm (its key in checkpoints is `bn`)."""

    def __init__(self, channels: int, groups: int, stride: int, deform: DeformConv = deform_conv2d) -> None:
        super().__init__()
        self.stride, self.deform = stride, deform
        self.conv = nn.Conv2d(channels, channels, KERNEL, stride, 1)
        self.bn = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Map (B, C, H, W) with offsets and masks of the output's size to (B, C, h, w)."""
        assert self.conv.bias is not None
        return self.bn(self.deform(x, offset, mask, self.conv.weight, self.conv.bias, self.stride))


class DyConv(nn.Module):
    """One DyConv over all pyramid levels. Every level reads the *previous* block's maps.

    Args:
        config: channels and groups.
        squeeze: hidden width of DyReLU's two linear layers.
        deform: computes the deformable convolutions.
    """

    def __init__(self, config: HeadConfig, squeeze: int, deform: DeformConv = deform_conv2d) -> None:
        super().__init__()
        channels, groups = config.channels, config.group_norm_groups
        # Official order: index 0 reads the level above (smaller map), 1 its own, 2 the level below (stride 2).
        self.DyConv = nn.ModuleList(DeformConvNorm(channels, groups, stride, deform) for stride in (1, 1, 2))
        self.AttnConv = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 1, 1), nn.ReLU())
        self.relu = DyReLU(channels, squeeze)
        self.offset = nn.Conv2d(channels, 3 * TAPS, KERNEL, 1, 1)

    def forward(self, features: Sequence[Tensor], sizes: LevelSizes) -> list[Tensor]:
        """Map P3..P7, each (B, C, H, W) of these sizes, to maps of the same shapes."""
        above, own, below = self.DyConv
        outputs = []
        for level, x in enumerate(features):
            offset_mask = self.offset(x)
            offset, mask = offset_mask[:, : 2 * TAPS], offset_mask[:, 2 * TAPS :].sigmoid()
            branches = [own(x, offset, mask)]
            if level > 0:
                branches.append(below(features[level - 1], offset, mask))
            if level + 1 < len(features):
                small = sizes[level + 1]
                y = above(features[level + 1], flat_read(offset, *small), flat_read(mask, *small))
                branches.append(F.interpolate(y, size=sizes[level], mode="bilinear", align_corners=True))
            outputs.append(self.relu(self.combine(branches)))
        return outputs

    def combine(self, branches: Sequence[Tensor]) -> Tensor:
        """Return the mean of the branches, each scaled by its level attention (one number per image)."""
        projection = self.AttnConv[1]
        total: Tensor | None = None
        for branch in branches:
            pooled = branch.mean(dim=(2, 3), keepdim=True)
            attention = hard_sigmoid(F.relu(projection(pooled))) / len(branches)
            total = branch * attention if total is None else total + branch * attention
        assert total is not None
        return total
