"""GLIP in fp16 torch: the nearest stand-in for an engine on a machine without TensorRT.

LayerNorm, GroupNorm and softmax take half precision in and out and compute in fp32 inside, as torch's CUDA kernels do;
sampling positions, normalization, scores and box decoding are fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from glip_export.model.bert import attention_bias
from glip_export.model.fpn import level_sizes
from glip_export.model.fusion import VlFuse
from glip_export.model.glip import Glip, normalize
from glip_export.model.head import Candidates, HeadOutputs, LevelOutputs, select_candidates
from torch import Tensor

__all__ = ["HalfImageBranch", "Inputs", "network_input", "relative_error", "stages"]


@dataclass(frozen=True)
class Inputs:
    """What an image branch reads."""

    frames: Tensor
    image_sizes: Tensor
    embedding: Tensor
    mask: Tensor
    class_map: Tensor

    @classmethod
    def random(cls, glip: Glip, height: int, width: int, tokens: int, device: str, seed: int = 0) -> Inputs:
        """Return noise on a canvas of (height, width), and a prompt of so many tokens in five classes or fewer."""
        generator = torch.Generator().manual_seed(seed)
        frames = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8, generator=generator)
        ids = torch.randint(5, glip.config.bert.vocabulary, (1, tokens), generator=generator)
        mask = torch.ones_like(ids)
        classes = torch.zeros(1, min(5, tokens), tokens)
        for token in range(tokens):
            classes[0, token % classes.shape[1], token] = 1
        classes /= classes.sum(dim=2, keepdim=True)
        parameter = next(glip.parameters())
        with torch.inference_mode():
            embedding = glip.encode_text(ids.to(parameter.device), mask.to(parameter.device))
        sizes = torch.tensor([[height, width]])
        return cls(*(tensor.to(device) for tensor in (frames, sizes, embedding, mask, classes)))


def network_input(glip: Glip, inputs: Inputs) -> Tensor:
    """Return the normalized canvas, (B, H, W, 3) fp32."""
    return normalize(inputs.frames, inputs.image_sizes, glip.config.input)


class HalfImageBranch:
    """A model's image branch in half precision. The model's own parameters become fp16.

    Args:
        glip: in fp32; it is changed.
    """

    def __init__(self, glip: Glip) -> None:
        self.glip = glip.half()
        config, device = glip.config.input, next(glip.parameters()).device
        # Made here and not in every frame: copying numbers from the host may not be captured in a CUDA graph.
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device) for values in (config.pixel_mean, config.pixel_std)
        )

    def image(self, inputs: Inputs) -> Tensor:
        """Return the normalized canvas, (B, H, W, 3) fp16."""
        _, height, width, _ = inputs.frames.shape
        rows = torch.arange(height, device=inputs.frames.device)[None, :] < inputs.image_sizes[:, :1]
        columns = torch.arange(width, device=inputs.frames.device)[None, :] < inputs.image_sizes[:, 1:]
        inside = (rows[:, :, None] & columns[:, None, :])[..., None]
        return (((inputs.frames.float() - self._mean) / self._std) * inside).half()

    def select(self, outputs: HeadOutputs, inputs: Inputs) -> Candidates:
        """Return boxes and scores of the best 1000 of each level, in fp32."""
        levels = [
            LevelOutputs(level.logits.float(), level.deltas.float(), level.centerness.float(), level.width)
            for level in outputs.levels
        ]
        raw = HeadOutputs(levels, outputs.hidden)
        return select_candidates(raw, inputs.class_map, inputs.image_sizes, self.glip.config.head)

    def __call__(self, inputs: Inputs) -> Candidates:
        """Return the candidates of one frame."""
        outputs = self.glip.predict(self.image(inputs), inputs.embedding.half(), inputs.mask)
        return self.select(outputs, inputs)


def stages(branch: HalfImageBranch, inputs: Inputs) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return the blocks of a frame, each as a call on inputs it has already, and how often a frame runs it."""
    glip = branch.glip
    head = glip.rpn.head
    image = branch.image(inputs)
    maps = glip.backbone.body(image)
    features = glip.backbone.fpn(maps)
    sizes, hidden = level_sizes(features), inputs.embedding.half()
    outputs = head(features, hidden, inputs.mask)
    blocks = head.config.blocks
    found: dict[str, tuple[Callable[[], Any], int]] = {
        "normalize": (lambda: branch.image(inputs), 1),
        "Swin": (lambda: glip.backbone.body(image), 1),
        "FPN": (lambda: glip.backbone.fpn(maps), 1),
    }
    convolve = head.dyhead_tower[0]
    if isinstance(convolve, VlFuse):
        fuse, layer, convolve = head.dyhead_tower[:3]
        bias = attention_bias(inputs.mask, hidden.dtype)
        found["fusion"] = (lambda: fuse(features, sizes, hidden, inputs.mask), blocks)
        found["BERT layers of the head"] = (lambda: layer(hidden, bias), blocks)
    found["DyConv"] = (lambda: convolve(features, sizes), blocks)
    found["decode, top 1000"] = (lambda: branch.select(outputs, inputs), 1)
    return found


def relative_error(ours: HeadOutputs, reference: HeadOutputs) -> dict[str, float]:
    """Return the mean absolute error of each head output over the mean absolute value of the reference."""
    errors = {}
    for name in ("logits", "deltas", "centerness"):
        pairs = [
            (getattr(a, name).float(), getattr(b, name).float())
            for a, b in zip(ours.levels, reference.levels, strict=True)
        ]
        difference = sum(float((a - b).abs().sum()) for a, b in pairs)
        errors[name] = difference / sum(float(b.abs().sum()) for _, b in pairs)
    return errors
