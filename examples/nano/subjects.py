"""What is evaluated: a detector on a checkpoint in torch, or on an exported bundle; and bundles that round."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from glip_deploy import Bundle, Detector
from glip_deploy.bundle.contract import (
    IMAGE_GRAPH,
    TEXT_GRAPH,
    Candidates,
    ImageInputs,
    image_contract,
    text_contract,
)
from glip_deploy.bundle.manifest import FORMAT_VERSION, MANIFEST, TOKENIZER, CheckpointRecord, Manifest, ModelRecord
from glip_deploy.files import sha256_of

if TYPE_CHECKING:
    from glip_export.model.glip import Glip
    from glip_export.precision import Island

    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.results.detections import Detections

__all__ = ["Subject", "TorchBackend", "checkpoint_detector", "rounded_copy", "torch_detector"]


class Subject(Protocol):
    """Detects what a prompt names, as a `Detector` does."""

    def detect(self, frame: NDArray[np.uint8], prompt: PromptText, threshold: float = 0.5, *, color: str) -> Detections:
        """Return the detections of a picture; see `Detector.detect`."""
        ...


class TorchBackend:
    """A `glip_deploy.backends.base.Backend` on a model in torch, on the CPU."""

    def __init__(self, model: Glip) -> None:
        self.model = model.eval()

    @property
    def text_key(self) -> str:
        """See `Backend.text_key`."""
        return ""

    def encode_text(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Backend.encode_text`."""
        import torch

        ids = torch.tensor(input_ids)[None]
        with torch.inference_mode():
            embedding: NDArray[np.float32] = self.model.encode_text(ids, torch.ones_like(ids))[0].numpy()
        return embedding

    def detect(self, inputs: ImageInputs) -> Candidates:
        """See `Backend.detect`."""
        import torch

        with torch.inference_mode():
            found = self.model(*(torch.tensor(array) for array in inputs.feed().values()))
        return Candidates(found.boxes.numpy(), found.scores.numpy(), found.labels.numpy())

    def detect_prompts(self, inputs: Iterable[ImageInputs]) -> list[Candidates]:
        """See `Backend.detect_prompts`. Everything runs for every prompt."""
        return [self.detect(of_prompt) for of_prompt in inputs]

    def prepare_resize(self) -> bool:
        """Return that frames are resized on the processor."""
        return False

    def clone(self) -> TorchBackend:
        """See `Backend.clone`."""
        return self

    def close(self) -> None:
        """See `Backend.close`."""


def torch_detector(model: Glip, vocabulary: Sequence[str] | None, shortest_side: int) -> Detector:
    """Return a detector that runs a model in torch; all else is as with a bundle.

    Args:
        model: on the CPU.
        vocabulary: of its checkpoint; None for that of bert-base-uncased.
        shortest_side: pixels; pictures are resized to it.
    """
    from glip_export.tokenizer import build_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer(vocabulary).save(str(Path(folder) / TOKENIZER))
        hidden = model.config.bert.hidden
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            variant=model.config.variant,
            checkpoint=CheckpointRecord("in memory", "0" * 64),
            config=msgspec.convert(model.config.to_dict(), ModelRecord),
            io={"text": text_contract(hidden), "image": image_contract(hidden)},
            files={},
        )
        bundle = Bundle(Path(folder), manifest)
        return Detector(bundle, TorchBackend(model), shortest_side=shortest_side)


def checkpoint_detector(checkpoint: Path, shortest_side: int) -> Detector:
    """Return a detector that runs a `.pth` in torch."""
    from glip_export.checkpoints import load_checkpoint

    loaded = load_checkpoint(checkpoint)
    return torch_detector(loaded.model, loaded.vocabulary, shortest_side)


def rounded_copy(bundle: Path, precision: str, target: Path, islands: Sequence[Island] | None = None) -> Path:
    """Copy an fp32 bundle and let its graphs round every half-precision value.

    ONNX Runtime's CPU provider keeps more than half precision where it can; this shows what an engine would give at
    worst. The copy is for measuring only: it runs no faster.

    Args:
        bundle: the bundle.
        precision: "fp16" or "bf16".
        target: folder to make.
        islands: parts that stay in fp32; None for `glip_export.precision.ISLANDS`.
    """
    import onnx_ir
    from glip_export.precision import ISLANDS, to_precision

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
