"""GLIP whole, under the official names of its parameters, and the two branches that are exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glip_export.model.bert import Bert
from glip_export.model.config import GlipConfig, InputConfig
from glip_export.model.deform import DeformConv, deform_conv2d
from glip_export.model.fpn import Fpn
from glip_export.model.head import Candidates, Head, HeadOutputs, select_candidates
from glip_export.model.swin import Swin

__all__ = ["Glip", "ImageBranch", "TextBranch", "normalize"]


def normalize(frames: Tensor, image_sizes: Tensor, config: InputConfig) -> Tensor:
    """Turn bytes into network input: (x - mean) / std, then zero outside each picture's true size.

    Args:
        frames: (B, H, W, 3) uint8 BGR canvas, H and W multiples of 32.
        image_sizes: (B, 2) int64 height and width of the picture inside the canvas.
        config: mean and standard deviation per BGR channel.

    Returns:
        (B, H, W, 3) float32. Padding is zero *after* normalization, as in training (official `to_image_list`).
    """
    batch, height, width, channels = frames.shape
    # Pixel and channel share one axis here: broadcasting over a last axis of 3 costs a CPU five times as much.
    mean = torch.tensor(config.pixel_mean, dtype=torch.float32, device=frames.device).repeat(width)
    std = torch.tensor(config.pixel_std, dtype=torch.float32, device=frames.device).repeat(width)
    x = (frames.reshape(batch, height, width * channels).to(torch.float32) - mean) / std
    rows = torch.arange(height, device=frames.device)[None, :] < image_sizes[:, :1]
    columns = torch.arange(width * channels, device=frames.device)[None, :] < image_sizes[:, 1:] * channels
    x = x * rows.to(x.dtype)[:, :, None] * columns.to(x.dtype)[:, None, :]
    return x.reshape(batch, height, width, channels)


class Backbone(nn.Module):
    """Swin and FPN."""

    def __init__(self, config: GlipConfig) -> None:
        super().__init__()
        self.body = Swin(config.swin)
        self.fpn = Fpn(config.swin.channels[1:], config.head.channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map a normalized (B, H, W, 3) canvas to P3..P7."""
        return self.fpn(self.body(image))


class LanguageBody(nn.Module):
    """BERT under its official name (`language_backbone.body.model`)."""

    def __init__(self, config: GlipConfig) -> None:
        super().__init__()
        self.model = Bert(config.bert)


class LanguageBackbone(nn.Module):
    """BERT's parent under its official name."""

    def __init__(self, config: GlipConfig) -> None:
        super().__init__()
        self.body = LanguageBody(config)


class Rpn(nn.Module):
    """Head, and the tuned prompt where there is one."""

    def __init__(self, config: GlipConfig, squeeze: int, deform: DeformConv) -> None:
        super().__init__()
        self.head = Head(config, squeeze, deform)
        if config.tunable_tokens:
            self.tunable_linear = nn.Linear(config.bert.hidden, config.tunable_tokens, bias=False)


class Glip(nn.Module):
    """GLIP. Parameter names are those of the official checkpoints, so a released state dict loads as it is.

    Args:
        config: sizes and switches; GLIP-T's by default.
        squeeze: hidden width of DyReLU's two linear layers.
        deform: computes the deformable convolutions; a model with another one than the default cannot be exported.
    """

    def __init__(self, config: GlipConfig | None = None, squeeze: int = 64, deform: DeformConv = deform_conv2d) -> None:
        super().__init__()
        self.config = config or GlipConfig()
        self.backbone = Backbone(self.config)
        self.language_backbone = LanguageBackbone(self.config)
        self.rpn = Rpn(self.config, squeeze, deform)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the text embedding (B, T, D) of token ids and mask, both (B, T) int64."""
        hidden: Tensor = self.language_backbone.body.model(input_ids, attention_mask)
        if self.config.tunable_tokens:
            # [tokens, D] rows, one per position: added whatever the word is (GLIP paper, prompt tuning).
            hidden = hidden + self.rpn.tunable_linear.weight[: hidden.shape[1]]
        return hidden

    def predict(self, image: Tensor, embedding: Tensor, mask: Tensor) -> HeadOutputs:
        """Return raw head outputs for a normalized (B, H, W, 3) canvas and (B, T, D) text."""
        outputs: HeadOutputs = self.rpn.head(self.backbone(image), embedding, mask)
        return outputs

    def forward(
        self, frames: Tensor, image_sizes: Tensor, embedding: Tensor, mask: Tensor, class_map: Tensor
    ) -> Candidates:
        """Turn frames and text into candidate boxes; see `ImageBranch` for shapes."""
        image = normalize(frames, image_sizes, self.config.input)
        return select_candidates(self.predict(image, embedding, mask), class_map, image_sizes, self.config.head)


class TextBranch(nn.Module):
    """What runs once per prompt: (B, T) int64 ids and mask to (B, T, D) float32."""

    def __init__(self, glip: Glip) -> None:
        super().__init__()
        self.glip = glip

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the text embedding."""
        return self.glip.encode_text(input_ids, attention_mask)


class ImageBranch(nn.Module):
    """What runs once per frame.

    Args:
        glip: the model.
        features: also return the maps of the levels as the first module that reads the text finds them, last.
    """

    def __init__(self, glip: Glip, *, features: bool = False) -> None:
        super().__init__()
        self.glip, self.features = glip, features

    def forward(
        self,
        frames: Tensor,
        image_sizes: Tensor,
        text_embedding: Tensor,
        text_mask: Tensor,
        class_map: Tensor,
    ) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            frames: (B, H, W, 3) uint8 BGR, H and W multiples of 32, picture in the upper left corner.
            image_sizes: (B, 2) int64 height, width of the picture in the canvas.
            text_embedding: (B, T, D) float32 from the text branch.
            text_mask: (B, T) int64, one for real tokens.
            class_map: (B, C, T) float32, rows averaging each class's tokens; an all-zero row never detects.

        Returns:
            boxes (B, K, 4) float32, scores (B, K) float32, labels (B, K) int64; then the raw head outputs logits
            (B, N, T), deltas (B, N, 4) and centerness (B, N), levels one after another.
        """
        glip = self.glip
        image = normalize(frames, image_sizes, glip.config.input)
        outputs = glip.predict(image, text_embedding, text_mask)
        found = select_candidates(outputs, class_map, image_sizes, glip.config.head)
        logits = torch.cat([level.logits for level in outputs.levels], dim=2).transpose(1, 2)
        deltas = torch.cat([level.deltas for level in outputs.levels], dim=2).transpose(1, 2)
        centerness = torch.cat([level.centerness[:, 0] for level in outputs.levels], dim=1)
        features = outputs.features if self.features else ()
        return found.boxes, found.scores, found.labels, logits, deltas, centerness, *features
