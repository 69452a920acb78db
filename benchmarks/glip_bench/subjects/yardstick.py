"""Other detectors of the field at their real size, to have a measure beside GLIP: what does a frame cost them here?

The architectures come from transformers, the weights are random: their boxes mean nothing, their times do. Canvas,
prompt and clock are those of every other subject.

* `detr-r50`: DETR with ResNet-50 (Carion et al., ECCV 2020); no text.
* `grounding-dino-t`: Grounding DINO with Swin-T and BERT (Liu et al., ECCV 2024), which encodes its prompt every frame.

MDETR, which the GLIP paper compares itself with, is not in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glip_bench.subjects.base import Options, Piece, Stopwatch, SubjectName
from glip_deploy.errors import GlipError
from glip_deploy.frames import make_canvas
from glip_deploy.prompts.syntax import PromptText
from glip_deploy.prompts.tokens import Prompt, parse_prompt
from glip_deploy.results.detections import Detections

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_bench.subjects.profile import Stage
    from glip_deploy.bundle.manifest import Bundle

__all__ = ["PARAMETERS", "YardstickSubject", "yardstick_absence"]

PARAMETERS = {SubjectName.DETR_R50: 41.5e6, SubjectName.GROUNDING_DINO_T: 172e6}
"""As published; a model that is built with another size is none."""
QUERIES = 900  # of Grounding DINO, chosen among the places of four levels
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def yardstick_absence() -> str | None:
    """Say why there are no yardsticks here; None where there are. Nothing is loaded."""
    from importlib.util import find_spec

    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            return f"{package} is not installed; pip install 'glip-deploy[yardsticks]'"
    return None


class YardstickSubject:
    """A detector of transformers with random weights, in torch, fp32. See `Subject`."""

    def __init__(self, name: SubjectName, options: Options, bundle: Bundle) -> None:
        import torch

        self.name = name
        self.options = options
        self.stages: Mapping[Piece, float] = {}
        self._bundle = bundle
        self._torch = torch
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self._model: Any = _build(name).eval().requires_grad_(False).to(self._device)
        self._size = sum(parameter.numel() for parameter in self._model.parameters())
        self._prompt: Prompt | None = None
        self._mean, self._std = (torch.tensor(values, device=self._device).view(1, 3, 1, 1) for values in (MEAN, STD))

    def prepare(self, prompt: PromptText | Prompt) -> None:
        """See `Subject`."""
        if not isinstance(prompt, Prompt):
            prompt = parse_prompt(prompt, self._bundle.tokenizer(), max_tokens=self._bundle.max_tokens)
        self._prompt = prompt

    def run(self, frame: NDArray[np.uint8]) -> Detections:
        """See `Subject`."""
        return self.run_batch([frame])[0]

    def run_batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """See `Subject`."""
        if self._prompt is None:
            raise GlipError(f"{self.name} has no prompt yet; call prepare first")
        torch, watch = self._torch, Stopwatch(self._wait)
        with watch(Piece.RESIZE):
            canvas = make_canvas(
                frames, color="rgb", shortest_side=self.options.shortest_side, longest_side=self.options.longest_side
            )
        height, width = canvas.frames.shape[1:3]
        places = sum(-(-height // stride) * -(-width // stride) for stride in (8, 16, 32, 64))
        if self.name is SubjectName.GROUNDING_DINO_T and places < QUERIES:
            raise GlipError(f"{self.name} picks {QUERIES} of {places} places in {width}x{height}; use a larger side")
        with torch.inference_mode():
            pixels = torch.from_numpy(canvas.frames)
            if self._device.type != "cpu":
                with watch(Piece.TO_DEVICE):
                    pixels = pixels.to(self._device)
            with watch(Piece.IMAGE):
                found = self._model(**self._inputs(pixels, canvas.image_sizes))
            with watch(Piece.SELECT):
                boxes, logits = found.pred_boxes.cpu().numpy(), found.logits.float().cpu().numpy()
                detections = [self._select(*pair) for pair in zip(boxes, logits, frames, strict=True)]
        self.stages = watch.seconds
        return detections

    def _inputs(self, pixels: Any, image_sizes: NDArray[np.int64]) -> dict[str, Any]:
        """What the network takes, normalising included, as GLIP's image branch includes it."""
        torch, batch = self._torch, pixels.shape[0]
        mask = torch.zeros(pixels.shape[:3], dtype=torch.int64, device=self._device)
        for i, (height, width) in enumerate(image_sizes.tolist()):
            mask[i, :height, :width] = 1
        planes = pixels.flip(-1).permute(0, 3, 1, 2).float()
        inputs = {"pixel_values": (planes - self._mean) / self._std, "pixel_mask": mask}
        if self.name is SubjectName.GROUNDING_DINO_T and self._prompt is not None:
            ids = torch.tensor(self._prompt.input_ids, device=self._device).expand(batch, -1)
            inputs |= {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "token_type_ids": torch.zeros_like(ids),
            }
        return inputs

    def _select(self, boxes: NDArray[Any], logits: NDArray[Any], frame: NDArray[np.uint8]) -> Detections:
        """Best class of each query, above the threshold; the paper's own last step, without any NMS."""
        import numpy as np

        if self.name is SubjectName.DETR_R50:
            odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
            scores = (odds / odds.sum(axis=-1, keepdims=True))[:, :-1]
        else:
            scores = 1 / (1 + np.exp(-np.clip(logits, -80, 80)))  # tokens beyond the prompt are minus infinity
        labels, best = scores.argmax(axis=-1), scores.max(axis=-1)
        keep = best > self.options.threshold
        center, half = boxes[keep, :2], boxes[keep, 2:] / 2
        size = np.tile([frame.shape[1], frame.shape[0]], 2)
        corners = np.concatenate([center - half, center + half], axis=1) * size
        return Detections(corners, best[keep], labels[keep], [str(label) for label in labels[keep]])

    def profile(self, frame: NDArray[np.uint8], runs: int) -> Mapping[Stage, float] | None:
        """See `Subject`; its blocks are not GLIP's."""
        return None

    def describe(self) -> Mapping[str, Any]:
        """See `Subject`."""
        return {
            "device": self._device.type,
            "precision": "fp32",
            "tokens": 0 if self._prompt is None or self.name is SubjectName.DETR_R50 else len(self._prompt.input_ids),
            "weights": "random",
            "parameters": self._size,
        }

    def close(self) -> None:
        """See `Subject`."""
        self._model = None

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)


def _build(name: SubjectName) -> Any:
    import transformers

    library: Any = transformers  # its stubs do not know DETR's older keywords
    try:
        if name is SubjectName.DETR_R50:
            return library.DetrForObjectDetection(library.DetrConfig(use_timm_backbone=False))
        # Its CUDA kernel is fetched from a hub, which nothing here does.
        config = library.GroundingDinoConfig(disable_custom_kernels=True)
        return library.GroundingDinoForObjectDetection(config)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise GlipError(f"transformers {transformers.__version__} cannot build {name}: {reason}") from None
