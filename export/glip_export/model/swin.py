"""Swin Transformer v1 backbone (official `backbone/swint.py`), channels last, any input size.

Quirks the released weights were trained with: maps are zero-padded to a multiple of the window *after* norm1 and
the padded pixels attend; odd blocks always shift, even where one window covers the map; the shift mask is -100 and is
computed on the padded size; the query is scaled before the product.

Sizes are asked for once and handed on: every `x.shape` becomes nodes of an exported graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glip_export.model.config import SwinConfig

__all__ = ["PATCH", "Swin"]

PATCH = 4
MASKED = -100.0


def relative_position_index(window: int) -> Tensor:
    """Return the (window**2, window**2) int64 rows of the bias table for every pair of positions."""
    axis = torch.arange(window, device="cpu")
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
    delta = grid[:, :, None] - grid[:, None, :] + window - 1
    return delta[0] * (2 * window - 1) + delta[1]


def shift_mask(height: int, width: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (windows, window**2, window**2) of shifted blocks; height and width are padded sizes.

    After the cyclic shift a window may hold pixels from opposite borders; those must not see each other. A pixel's
    region is found per axis (0: untouched rows, 1: last whole window's head, 2: wrapped rows).
    """
    shift = window // 2

    def region(size: int) -> Tensor:
        position = torch.arange(size, device=device)
        return (position >= size - window).to(torch.int64) + (position >= size - shift).to(torch.int64)

    regions = region(height)[:, None] * 3 + region(width)[None, :]
    windows = regions.view(height // window, window, width // window, window).transpose(1, 2)
    windows = windows.reshape(-1, window * window)
    return (windows[:, :, None] != windows[:, None, :]).to(dtype) * MASKED


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned relative position bias."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.dim, self.window, self.heads = dim, window, heads
        self.scale = (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def position_bias(self) -> Tensor:
        """Return the bias (heads, window**2, window**2) that is added to the scores."""
        length = self.window * self.window
        bias = self.relative_position_bias_table[self.relative_position_index.reshape(-1)]
        return bias.view(length, length, self.heads).permute(2, 0, 1)

    def forward(self, x: Tensor, windows: int, mask: Tensor | None) -> Tensor:
        """Attend within windows.

        Args:
            x: (batch * windows * window**2, dim), rows ordered by batch, window, position.
            windows: how many a map has.
            mask: (windows, window**2, window**2) from `shift_mask`, or None for an unshifted block.
        """
        length, head_dim = self.window * self.window, self.dim // self.heads
        qkv = self.qkv(x).view(-1, length, 3, self.heads, head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0] * self.scale, qkv[1], qkv[2]
        bias = self.position_bias().unsqueeze(0)
        scores = query @ key.transpose(-2, -1) + bias
        if mask is not None:
            scores = scores.view(-1, windows, self.heads, length, length) + mask[None, :, None]
            scores = scores.view(-1, self.heads, length, length)
        out = scores.softmax(dim=-1) @ value
        return self.proj(out.transpose(1, 2).reshape(-1, self.dim))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, dim) to (rows, dim)."""
        return self.fc2(F.gelu(self.fc1(x)))


@dataclass(frozen=True)
class Grid:
    """The size of a map, and of what windows it is padded to; the same for all blocks of a stage."""

    batch: int
    height: int
    width: int
    rows: int
    """Of windows."""
    columns: int

    @classmethod
    def of(cls, batch: int, height: int, width: int, window: int) -> Grid:
        """Lay windows over maps of a size."""
        rows, columns = ((size + window - 1) // window for size in (height, width))
        return cls(batch, height, width, rows, columns)


class SwinBlock(nn.Module):
    """Window attention and MLP, pre-norm, both with a residual."""

    def __init__(self, dim: int, window: int, heads: int, hidden: int, shifted: bool) -> None:
        super().__init__()
        self.dim, self.window, self.shift = dim, window, window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, grid: Grid, mask: Tensor) -> Tensor:
        """Map (B, H, W, C) of the grid's size to the same shape; `mask` is used by shifted blocks only."""
        dim, window, shift = self.dim, self.window, self.shift
        height, width = grid.rows * window, grid.columns * window
        y = F.pad(self.norm1(x), (0, 0, 0, width - grid.width, 0, height - grid.height))
        if shift:
            y = torch.roll(y, (-shift, -shift), (1, 2))
        y = y.reshape(grid.batch, grid.rows, window, grid.columns, window, dim).transpose(2, 3).reshape(-1, dim)
        y = self.attn(y, grid.rows * grid.columns, mask if shift else None)
        y = y.view(grid.batch, grid.rows, grid.columns, window, window, dim).transpose(2, 3)
        y = y.reshape(grid.batch, height, width, dim)
        if shift:
            y = torch.roll(y, (shift, shift), (1, 2))
        x = x + y[:, : grid.height, : grid.width]
        flat = self.norm2(x).view(-1, dim)
        return x + self.mlp(flat).view(grid.batch, grid.height, grid.width, dim)


class PatchMerging(nn.Module):
    """Halve the map: four neighbors side by side, in the order (0,0), (1,0), (0,1), (1,1), then norm and linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, batch: int, height: int, width: int) -> Tensor:
        """Map (B, 2H, 2W, C) to (B, H, W, 2C)."""
        dim = self.dim
        x = x.view(batch, height, 2, width, 2, dim).permute(0, 1, 3, 4, 2, 5)
        x = self.norm(x.reshape(batch, height, width, 4 * dim))
        return self.reduction(x.view(-1, 4 * dim)).view(batch, height, width, 2 * dim)


class PatchEmbed(nn.Module):
    """4x4 patches to `dim` channels; the convolution's weight is used as a matrix, since patches do not overlap."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor, batch: int, height: int, width: int) -> Tensor:
        """Map a normalized (B, 4H, 4W, 3) picture to (B, H, W, dim)."""
        patches = image.reshape(batch, height, PATCH, width, PATCH, 3).transpose(2, 3)
        matrix = self.proj.weight.permute(0, 2, 3, 1).reshape(-1, PATCH * PATCH * 3)
        tokens = F.linear(patches.reshape(-1, PATCH * PATCH * 3), matrix, self.proj.bias)
        return self.norm(tokens.view(batch, height, width, self.proj.out_channels))


class Stage(nn.Module):
    """Blocks at one resolution, then (but for the last stage) patch merging."""

    def __init__(self, config: SwinConfig, index: int) -> None:
        super().__init__()
        dim = config.channels[index]
        self.window = config.window
        self.blocks = nn.ModuleList(
            SwinBlock(dim, config.window, config.num_heads[index], config.mlp_hidden[index], i % 2 == 1)
            for i in range(config.depths[index])
        )
        self.downsample: PatchMerging | None = PatchMerging(dim) if index + 1 < len(config.depths) else None

    def forward(self, x: Tensor, batch: int, height: int, width: int) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        grid = Grid.of(batch, height, width, self.window)
        mask = shift_mask(grid.rows * self.window, grid.columns * self.window, self.window, x.device, x.dtype)
        for block in self.blocks:
            x = block(x, grid, mask)
        return x


class Swin(nn.Module):
    """The backbone's body. Output norms apply to the outputs only, never to what the next stage reads."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config.embed_dim)
        self.layers = nn.ModuleList(Stage(config, i) for i in range(len(config.depths)))
        for i, channels in enumerate(config.channels[1:], start=1):
            self.add_module(f"norm{i}", nn.LayerNorm(channels))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the maps at strides 8, 16, 32 as (B, C, H, W) from a normalized (B, H, W, 3) picture.

        The first stage's map (stride 4) has no norm and is not used by the FPN, so it is not returned.
        """
        batch, height, width = image.shape[0], image.shape[1] // PATCH, image.shape[2] // PATCH
        x = self.patch_embed(image, batch, height, width)
        outputs = []
        for i, stage in enumerate(self.layers):
            assert isinstance(stage, Stage)
            x = stage(x, batch, height, width)
            if i:
                outputs.append(getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                # Even, because the canvas is a multiple of 32.
                height, width = height // 2, width // 2
                x = stage.downsample(x, batch, height, width)
        return outputs
