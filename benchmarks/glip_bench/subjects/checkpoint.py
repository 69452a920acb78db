"""A released checkpoint in torch: the official way (text padded, encoded in every frame, direct fusion), and ours."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from glip_export.model.bert import BertLayer
from glip_export.model.dyhead import DeformConvNorm, DyConv
from glip_export.model.fusion import VlFuse

from glip_bench.subjects.base import Options, Piece, Stopwatch, SubjectName
from glip_bench.subjects.in_torch import TorchSubject, best_device
from glip_bench.subjects.official_form import PADDED, official_form
from glip_deploy.bundle.contract import Candidates, Stage
from glip_deploy.errors import CheckpointError, OptionError
from glip_deploy.prompts.tokens import thresholds
from glip_deploy.results.postprocess import select_batch

if TYPE_CHECKING:
    import numpy as np
    from glip_export.model.glip import Glip
    from numpy.typing import NDArray

    from glip_deploy.bundle.manifest import Bundle
    from glip_deploy.frames import Canvas
    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.prompts.tokens import Prompt
    from glip_deploy.results.detections import Detections

__all__ = ["CheckpointSubject", "load_weights"]


def load_weights(options: Options, bundle: Bundle) -> Glip:
    """Read the checkpoint that a bundle was exported from, onto the GPU where torch has one.

    Raises:
        OptionError: no checkpoint is named.
        CheckpointError: it is damaged, or another one than the bundle's.
    """
    from glip_export.checkpoints import load_checkpoint

    if options.checkpoint is None:
        raise OptionError("the torch subjects run the released weights; name them with --checkpoint glip_t.pth")
    checkpoint = load_checkpoint(options.checkpoint)
    exported = bundle.manifest.checkpoint
    if checkpoint.sha256 != exported.sha256:
        raise CheckpointError(
            f"checkpoint {options.checkpoint} is not the one {bundle.path} was exported from ({exported.file},"
            f" sha256 {exported.sha256[:12]}...); give that one, or export this one"
        )
    return checkpoint.model.eval().requires_grad_(False).to(best_device())


class CheckpointSubject(TorchSubject):
    """A checkpoint in torch; `SubjectName.TORCH_OFFICIAL` in the official form. Subjects may share the weights."""

    def __init__(self, name: SubjectName, options: Options, bundle: Bundle, weights: Glip) -> None:
        self._official = name is SubjectName.TORCH_OFFICIAL
        super().__init__(name, options, bundle, official_form(weights) if self._official else weights)
        self._text: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._embedding: torch.Tensor | None = None

    def prepare(self, prompt: PromptText | Prompt) -> None:
        """See `Subject.prepare`; the official form only keeps the token ids, and encodes them in every run."""
        super().prepare(prompt)
        assert self._prompt is not None
        real = len(self._prompt.input_ids)
        tokens = max(PADDED, real) if self._official else real
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        mask, classes = torch.zeros_like(ids), torch.zeros(1, len(self._prompt), tokens)
        ids[0, :real], mask[0, :real] = torch.tensor(self._prompt.input_ids), 1
        classes[0, :, :real] = torch.tensor(self._prompt.class_map)
        self._text = ids.to(self._device), mask.to(self._device), classes.to(self._device)
        with torch.inference_mode():
            self._embedding = None if self._official else self._model.encode_text(*self._text[:2])

    def _detect(self, watch: Stopwatch, pixels: torch.Tensor, canvas: Canvas, prompt: Prompt) -> list[Detections]:
        assert self._text is not None
        batch = len(canvas)
        ids, mask, classes = (tensor.expand(batch, *tensor.shape[1:]) for tensor in self._text)
        sizes = torch.from_numpy(canvas.image_sizes).to(self._device)
        if self._embedding is None:
            with watch(Piece.TEXT):
                embedding = self._model.encode_text(ids, mask)
        else:
            embedding = self._embedding.expand(batch, *self._embedding.shape[1:])
        with watch(Piece.IMAGE):
            found = self._model(pixels, sizes, embedding, mask, classes)
        tensors = (found.boxes, found.scores, found.labels)
        if self._device.type != "cpu":
            with watch(Piece.FROM_DEVICE):
                tensors = (tensors[0].cpu(), tensors[1].cpu(), tensors[2].cpu())
        with watch(Piece.SELECT):
            return select_batch(
                Candidates(*(tensor.numpy() for tensor in tensors)),
                canvas.image_sizes,
                canvas.original_sizes,
                thresholds=thresholds(prompt, self.options.threshold),
                phrases=prompt.phrases,
                nms_threshold=self._bundle.nms_iou,
                max_detections=self._bundle.max_detections,
            )

    def profile(self, frame: NDArray[np.uint8], runs: int) -> Mapping[str, float] | None:
        """See `Subject.profile`; the device is waited for before and after each block."""
        self.run(frame)
        with self._clocked() as total:
            for _ in range(runs):
                self.run(frame)
        return {stage: total[stage] / runs for stage in Stage if stage in total}

    @contextmanager
    def _clocked(self) -> Iterator[dict[Stage, float]]:
        """Give the seconds of each block, added up while the context lasts; a block does not count those inside it."""
        head = self._model.rpn.head
        stages: dict[torch.nn.Module, Stage] = {
            self._model: Stage.INPUT,
            self._model.backbone.body: Stage.BACKBONE,
            self._model.backbone.fpn: Stage.FPN,
            head: Stage.PREDICTION,
        }
        for module in head.dyhead_tower.modules():
            if isinstance(module, DyConv):
                stages |= {module: Stage.DYHEAD, module.offset: Stage.OFFSETS}
            elif isinstance(module, DeformConvNorm):
                stages |= {module: Stage.DEFORMABLE, module.bn: Stage.GROUP_NORM}
        for module in head.dyhead_tower:
            if isinstance(module, VlFuse | BertLayer):
                stages[module] = Stage.FUSION if isinstance(module, VlFuse) else Stage.TEXT_LAYERS
        total: dict[Stage, float] = {}
        running: list[Stage] = []
        last = 0.0

        def lap() -> None:
            nonlocal last
            self._wait()
            now = time.perf_counter()
            if running:
                total[running[-1]] = total.get(running[-1], 0.0) + now - last
            last = now

        def begin(stage: Stage) -> None:
            lap()
            running.append(stage)

        def end(stage: Stage) -> None:
            lap()
            running.pop()
            if stage is Stage.PREDICTION:  # what the model does after its head is to select candidates
                running[-1] = Stage.SELECTION

        handles = []
        for module, stage in stages.items():
            handles.append(module.register_forward_pre_hook(lambda *_, stage=stage: begin(stage)))
            handles.append(module.register_forward_hook(lambda *_, stage=stage: end(stage)))
        try:
            yield total
        finally:
            for handle in handles:
                handle.remove()

    def describe(self) -> Mapping[str, Any]:
        """See `Subject.describe`."""
        return {
            "device": self._device.type,
            "precision": "fp32",
            "tokens": 0 if self._text is None else int(self._text[0].shape[1]),
        }
