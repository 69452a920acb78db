"""What can be evaluated: a checkpoint in torch, or an exported bundle. Both answer the same question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from glip_deploy.frames.canvas import make_canvas
from glip_deploy.prompts.syntax import PromptText
from glip_deploy.prompts.tokens import Prompt, parse_prompt
from glip_deploy.results.detections import Detections
from glip_deploy.results.postprocess import select

if TYPE_CHECKING:
    import torch
    from glip_export.model.glip import Glip
    from glip_export.precision import Island

__all__ = ["BundleSubject", "Subject", "TorchSubject", "rounded_copy"]

LONGEST_SIDE = 1333


class Subject(Protocol):
    """Detects what a prompt names."""

    def detect(self, image: NDArray[np.uint8], prompt: PromptText) -> Detections:
        """Return every detection, at most 100, of an RGB picture."""
        ...


class TorchSubject:
    """A checkpoint run by torch, with the pre- and postprocessing of the runtime."""

    def __init__(self, model: Glip, vocabulary: tuple[str, ...] | None, shortest_side: int) -> None:
        from glip_export.tokenizer import build_tokenizer

        self.model, self.shortest_side = model.eval(), shortest_side
        self.tokenizer = build_tokenizer(vocabulary)
        self._encoded: dict[str, tuple[Prompt, torch.Tensor]] = {}

    @classmethod
    def open(cls, checkpoint: Path, shortest_side: int) -> TorchSubject:
        """Read a `.pth`."""
        from glip_export.checkpoints import load_checkpoint

        loaded = load_checkpoint(checkpoint)
        return cls(loaded.model, loaded.vocabulary, shortest_side)

    def detect(self, image: NDArray[np.uint8], prompt: PromptText) -> Detections:
        """See `Subject`."""
        import torch

        config = self.model.config
        with torch.inference_mode():
            parsed, embedding = self._encode(prompt)
            frame = make_canvas([image], color="rgb", shortest_side=self.shortest_side, longest_side=LONGEST_SIDE)
            found = self.model(
                torch.from_numpy(frame.frames),
                torch.from_numpy(frame.image_sizes),
                embedding,
                torch.ones(embedding.shape[:2], dtype=torch.int64),
                torch.from_numpy(parsed.class_map.copy())[None],
            )
        return select(
            found.boxes[0].numpy(),
            found.scores[0].numpy(),
            found.labels[0].numpy(),
            thresholds=np.zeros(len(parsed), np.float32),
            phrases=parsed.phrases,
            image_size=(int(frame.image_sizes[0, 0]), int(frame.image_sizes[0, 1])),
            original_size=image.shape[:2],
            nms_threshold=config.head.nms_iou,
            max_detections=config.head.max_detections,
        )

    def _encode(self, text: PromptText) -> tuple[Prompt, torch.Tensor]:
        import torch

        parsed = parse_prompt(text, self.tokenizer)
        if parsed.key not in self._encoded:
            ids = torch.from_numpy(parsed.input_ids.copy())[None]
            self._encoded[parsed.key] = parsed, self.model.encode_text(ids, torch.ones_like(ids))
        return self._encoded[parsed.key]


class BundleSubject:
    """An exported bundle run by `glip_deploy.Detector`."""

    def __init__(self, bundle: Path, shortest_side: int) -> None:
        from glip_deploy import Detector

        self.detector = Detector.open(bundle, shortest_side=shortest_side, longest_side=LONGEST_SIDE, cache_dir=None)

    def detect(self, image: NDArray[np.uint8], prompt: PromptText) -> Detections:
        """See `Subject`."""
        return self.detector.detect(image, prompt, threshold=0.0, color="rgb")


def rounded_copy(bundle: Path, precision: str, target: Path, islands: Sequence[Island] | None = None) -> Path:
    """Copy an fp32 bundle and let its graphs round every half-precision value.

    ONNX Runtime's CPU keeps more than half precision where it can; this shows what an engine would give at worst. The
    copy is for measuring only: it runs no faster. `islands` are all of `glip_export.precision.ISLANDS` unless told.
    """
    import json
    import shutil

    import onnx_ir
    from glip_export.precision import ISLANDS, to_precision

    from glip_deploy.bundle.contract import IMAGE_GRAPH, TEXT_GRAPH
    from glip_deploy.bundle.manifest import MANIFEST, TOKENIZER
    from glip_deploy.files import sha256_of

    target.mkdir(parents=True)
    shutil.copy(bundle / TOKENIZER, target)
    for graph in (TEXT_GRAPH, IMAGE_GRAPH):
        kept = ISLANDS if islands is None else islands
        model = to_precision(onnx_ir.load(bundle / graph), precision, rounded=True, islands=kept)
        onnx_ir.save(model, target / graph, external_data=f"{graph}.data")
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"] = {
        file.name: {"sha256": sha256_of(file), "bytes": file.stat().st_size} for file in target.iterdir()
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return target
