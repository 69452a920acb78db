"""Other detectors of the field at their published size: what does a frame cost them on this machine?

The architectures come from transformers, the weights are random: their boxes mean nothing, their times do. Canvas,
prompt and clock are those of every other subject.

* `detr-r50`: DETR with ResNet-50 (Carion et al., ECCV 2020); no text.
* `grounding-dino-t`: Grounding DINO with Swin-T and BERT (Liu et al., ECCV 2024), which encodes its prompt every frame.

MDETR, which the GLIP paper compares itself with, is not in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from glip_bench.subjects.base import Options, Piece, Stopwatch, SubjectName
from glip_bench.subjects.in_torch import TorchSubject, best_device
from glip_deploy.errors import BackendError, OptionError
from glip_deploy.frames.geometry import ceil_div
from glip_deploy.results.detections import Detections

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy.bundle.manifest import Bundle
    from glip_deploy.frames import Canvas
    from glip_deploy.prompts.tokens import Prompt

__all__ = ["PARAMETERS", "YardstickSubject"]

PARAMETERS = {SubjectName.DETR_R50: 41.5e6, SubjectName.GROUNDING_DINO_T: 172e6}
"""Number of weights, as published; a model of another size would not be a fair measure."""
QUERIES = 900
"""Of Grounding DINO, chosen among the locations of four levels."""
STRIDES = (8, 16, 32, 64)
"""Pixels per location of these levels."""
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class YardstickSubject(TorchSubject):
    """A detector of transformers with random weights; raises BackendError if transformers cannot build it."""

    def __init__(self, name: SubjectName, options: Options, bundle: Bundle) -> None:
        torch.manual_seed(0)
        super().__init__(name, options, bundle, _build(name).eval().requires_grad_(False).to(best_device()))
        self._size = sum(parameter.numel() for parameter in self._model.parameters())
        self._mean, self._std = (torch.tensor(values, device=self._device).view(1, 3, 1, 1) for values in (MEAN, STD))

    def _detect(self, watch: Stopwatch, pixels: torch.Tensor, canvas: Canvas, prompt: Prompt) -> list[Detections]:
        height, width = pixels.shape[1:3]
        locations = sum(ceil_div(height, stride) * ceil_div(width, stride) for stride in STRIDES)
        if self.name is SubjectName.GROUNDING_DINO_T and locations < QUERIES:
            raise OptionError(
                f"{self.name} picks {QUERIES} of {locations} locations in {width}x{height}; use a larger shortest side"
            )
        with watch(Piece.IMAGE):
            found = self._model(**self._inputs(pixels, canvas.image_sizes, prompt))
        with watch(Piece.SELECT):
            boxes, logits = found.pred_boxes.cpu().numpy(), found.logits.float().cpu().numpy()
            return [self._select(*one) for one in zip(boxes, logits, canvas.original_sizes, strict=True)]

    def _inputs(self, pixels: torch.Tensor, image_sizes: NDArray[np.int64], prompt: Prompt) -> dict[str, Any]:
        """Return what the network takes; normalization is part of the image branch, as it is in GLIP's."""
        batch = pixels.shape[0]
        mask = torch.zeros(pixels.shape[:3], dtype=torch.int64, device=self._device)
        for i, (height, width) in enumerate(image_sizes.tolist()):
            mask[i, :height, :width] = 1
        planes = pixels.flip(-1).permute(0, 3, 1, 2).float()
        inputs = {"pixel_values": (planes - self._mean) / self._std, "pixel_mask": mask}
        if self.name is SubjectName.GROUNDING_DINO_T:
            ids = torch.tensor(prompt.input_ids, device=self._device).expand(batch, -1)
            inputs |= {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "token_type_ids": torch.zeros_like(ids),
            }
        return inputs

    def _select(self, boxes: NDArray[Any], logits: NDArray[Any], frame_size: NDArray[np.int64]) -> Detections:
        """Take the best class of each query if it is above the threshold, without NMS, as both papers do."""
        if self.name is SubjectName.DETR_R50:
            odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
            scores = (odds / odds.sum(axis=-1, keepdims=True))[:, :-1]
        else:
            scores = 1 / (1 + np.exp(-np.clip(logits, -80, 80)))  # tokens beyond the prompt are minus infinity
        labels, best = scores.argmax(axis=-1), scores.max(axis=-1)
        keep = best > self.options.threshold
        center, half = boxes[keep, :2], boxes[keep, 2:] / 2
        size = np.tile(frame_size[::-1], 2)
        corners = (np.concatenate([center - half, center + half], axis=1) * size).astype(np.float32)
        return Detections(corners, best[keep], labels[keep], [str(label) for label in labels[keep]])

    def describe(self) -> Mapping[str, Any]:
        """See `Subject.describe`."""
        return {
            "device": self._device.type,
            "precision": "fp32",
            "tokens": 0 if self._prompt is None or self.name is SubjectName.DETR_R50 else len(self._prompt.input_ids),
            "weights": "random",
            "parameters": self._size,
        }


def _build(name: SubjectName) -> Any:
    import transformers

    library: Any = transformers  # its stubs do not know DETR's older keywords
    try:
        if name is SubjectName.DETR_R50:
            return library.DetrForObjectDetection(library.DetrConfig(use_timm_backbone=False))
        # Its own CUDA kernel would be downloaded.
        config = library.GroundingDinoConfig(disable_custom_kernels=True)
        return library.GroundingDinoForObjectDetection(config)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BackendError(f"transformers {transformers.__version__} cannot build {name}: {reason}") from None
