"""BERT: the text encoder, and the same layer as used between fusion and DyConv in the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glip_export.model.config import BertConfig

__all__ = ["Bert", "BertLayer", "attention_bias"]

LAYER_NORM_EPS = 1e-12
MASKED = -10000.0  # exp() of it is exactly zero, and unlike finfo.min or -9e15 it survives fp16
CLAMP = 50000.0


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a (B, T) mask of ones and zeros into an additive (B, 1, 1, T) bias."""
    return (1.0 - mask.to(dtype))[:, None, None, :] * MASKED


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.hidden, self.heads = hidden, heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map (B, T, hidden) with an additive (B, 1, 1, T) bias to (B, T, hidden)."""
        # Of the bias, which all layers share: a graph asks for its sizes once, where it would for every layer's `x`.
        batch, tokens = bias.shape[0], bias.shape[3]
        hidden = self.hidden

        def split(y: Tensor) -> Tensor:
            return y.view(batch, tokens, self.heads, hidden // self.heads).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = query @ key.transpose(-1, -2) / (hidden // self.heads) ** 0.5
        out = (scores + bias).softmax(dim=-1) @ value
        return out.transpose(1, 2).reshape(batch, tokens, hidden)


class DenseNorm(nn.Module):
    """Linear, residual, LayerNorm."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return LayerNorm(dense(x) + residual)."""
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.self = SelfAttention(hidden, heads)
        self.output = DenseNorm(hidden, hidden)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map (B, T, hidden) to the same shape."""
        return self.output(self.self(x, bias), x)


class Intermediate(nn.Module):
    """The first linear of the feed-forward part, with exact GELU."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, intermediate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, hidden) to (B, T, intermediate)."""
        return F.gelu(self.dense(x))


class BertLayer(nn.Module):
    """One post-norm transformer layer.

    The official head clamps its layers to +-50000 at five places; those guard fp16 against infinities and change
    nothing in fp32, where no finite weights of interest reach them. `clamped` keeps the one that matters (the input
    of the last LayerNorm, where fp16 sums overflow first).
    """

    def __init__(self, hidden: int, heads: int, intermediate: int, clamped: bool = False) -> None:
        super().__init__()
        self.clamped = clamped
        self.attention = Attention(hidden, heads)
        self.intermediate = Intermediate(hidden, intermediate)
        self.output = DenseNorm(intermediate, hidden)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map (B, T, hidden) with an additive (B, 1, 1, T) bias to (B, T, hidden)."""
        x = self.attention(x, bias)
        y = self.intermediate(x)
        if self.clamped:
            y = self.output.dense(y.clamp(-CLAMP, CLAMP)) + x
            return self.output.LayerNorm(y.clamp(-CLAMP, CLAMP))
        return self.output(y, x)


class Embeddings(nn.Module):
    """Word, position and (all-zero) token-type embeddings, normalized."""

    position_ids: Tensor

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.register_buffer("position_ids", torch.arange(config.positions, device="cpu")[None])
        self.word_embeddings = nn.Embedding(config.vocabulary, config.hidden)
        self.position_embeddings = nn.Embedding(config.positions, config.hidden)
        self.token_type_embeddings = nn.Embedding(2, config.hidden)
        self.LayerNorm = nn.LayerNorm(config.hidden, eps=LAYER_NORM_EPS)

    def forward(self, ids: Tensor) -> Tensor:
        """Map (B, T) int64 token ids to (B, T, hidden)."""
        positions = self.position_embeddings.weight[: ids.shape[1]]
        return self.LayerNorm(self.word_embeddings(ids) + self.token_type_embeddings.weight[0] + positions)


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            BertLayer(config.hidden, config.heads, config.intermediate) for _ in range(config.layers)
        )


class Bert(nn.Module):
    """The text encoder; no pooler."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the last layer's hidden state (B, T, hidden), padding rows included and unmasked."""
        x = self.embeddings(ids)
        bias = attention_bias(mask, x.dtype)
        for layer in self.encoder.layer:
            x = layer(x, bias)
        return x
