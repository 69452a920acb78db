"""The released weights in torch: the official way (text padded, encoded every frame, direct fusion), and ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from glip_export.model.dyhead import DeformConvNorm

from glip_bench.subjects.base import Options, Piece, Stopwatch, SubjectName
from glip_bench.subjects.bundle import select_all
from glip_bench.subjects.official_form import PADDED, OfficialForm
from glip_bench.subjects.profile import Stage
from glip_deploy.bundle.contract import Candidates
from glip_deploy.errors import GlipError
from glip_deploy.frames import make_canvas
from glip_deploy.prompts.syntax import PromptText
from glip_deploy.prompts.tokens import Prompt, parse_prompt

if TYPE_CHECKING:
    import numpy as np
    from glip_export.model.glip import Glip
    from numpy.typing import NDArray

    from glip_deploy.bundle.manifest import Bundle
    from glip_deploy.results.detections import Detections

__all__ = ["TorchSubject", "load_weights"]

TOWER = (Stage.FUSION, Stage.TEXT_LAYERS, Stage.DYCONV)


def load_weights(options: Options, bundle: Bundle) -> Glip:
    """Read the checkpoint that a bundle was exported from, onto the GPU where torch has one.

    Raises:
        GlipError: no or a damaged checkpoint, or another one than the bundle's.
    """
    from glip_export.checkpoints import load_checkpoint

    if options.checkpoint is None:
        raise GlipError("the torch subjects run the released weights; name them with --checkpoint glip_t.pth")
    checkpoint = load_checkpoint(options.checkpoint)
    exported = bundle.manifest["checkpoint"]
    if checkpoint.sha256 != exported["sha256"]:
        raise GlipError(
            f"checkpoint {options.checkpoint} is not the one {bundle.path} was exported from ({exported['file']},"
            f" sha256 {exported['sha256'][:12]}...); give that one, or export this one"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = checkpoint.model.eval().requires_grad_(False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


class TorchSubject:
    """torch, eager, fp32. See `Subject`."""

    def __init__(self, name: SubjectName, options: Options, bundle: Bundle, weights: Glip) -> None:
        self.name = name
        self.options = options
        self.stages: Mapping[Piece, float] = {}
        self._bundle = bundle
        self._official = name is SubjectName.TORCH_OFFICIAL
        self._model = OfficialForm(weights).model if self._official else weights
        self._device = next(weights.parameters()).device
        self._tokenizer = bundle.tokenizer()
        self._prompt: Prompt | None = None
        self._text: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._embedding: torch.Tensor | None = None

    def prepare(self, prompt: PromptText | Prompt) -> None:
        """See `Subject`; the official form only takes note of the words, and encodes them in every run."""
        if not isinstance(prompt, Prompt):
            prompt = parse_prompt(prompt, self._tokenizer, max_tokens=self._bundle.max_tokens)
        real = len(prompt.input_ids)
        tokens = max(PADDED, real) if self._official else real
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        mask, classes = torch.zeros_like(ids), torch.zeros(1, len(prompt), tokens)
        ids[0, :real], mask[0, :real] = torch.tensor(prompt.input_ids), 1
        classes[0, :, :real] = torch.tensor(prompt.class_map)
        self._text = ids.to(self._device), mask.to(self._device), classes.to(self._device)
        self._prompt = prompt
        with torch.inference_mode():
            self._embedding = None if self._official else self._model.encode_text(*self._text[:2])

    def run(self, frame: NDArray[np.uint8]) -> Detections:
        """See `Subject`."""
        return self.run_batch([frame])[0]

    @torch.inference_mode()
    def run_batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """See `Subject`."""
        if self._text is None or self._prompt is None:
            raise GlipError(f"{self.name} has no prompt yet; call prepare first")
        watch, batch = Stopwatch(self._wait), len(frames)
        ids, mask, classes = (tensor.expand(batch, *tensor.shape[1:]) for tensor in self._text)
        with watch(Piece.RESIZE):
            canvas = make_canvas(
                frames,
                color="rgb",
                shortest_side=self.options.shortest_side,
                longest_side=self.options.longest_side,
            )
        pixels, sizes = torch.from_numpy(canvas.frames), torch.from_numpy(canvas.image_sizes)
        moves = self._device.type != "cpu"
        if moves:
            with watch(Piece.TO_DEVICE):
                pixels, sizes = pixels.to(self._device), sizes.to(self._device)
        embedding = self._embedding
        if embedding is None:
            with watch(Piece.TEXT):
                embedding = self._model.encode_text(ids, mask)
        else:
            embedding = embedding.expand(batch, *embedding.shape[1:])
        with watch(Piece.IMAGE):
            candidates = self._model(pixels, sizes, embedding, mask, classes)
        found = (candidates.boxes, candidates.scores, candidates.labels)
        if moves:
            with watch(Piece.FROM_DEVICE):
                found = (found[0].cpu(), found[1].cpu(), found[2].cpu())
        with watch(Piece.SELECT):
            arrays = Candidates(*(tensor.numpy() for tensor in found))
            detections = select_all(arrays, canvas, self._prompt, self.options.threshold, self._bundle)
        self.stages = watch.seconds
        return detections

    def profile(self, frame: NDArray[np.uint8], runs: int) -> Mapping[Stage, float] | None:
        """See `Subject`; hooks around the blocks, the device waited for at each."""
        total = dict.fromkeys(Stage, 0.0)
        self.run(frame)
        with self._hooked(total):
            for _ in range(runs):
                self.run(frame)
                total[Stage.REST] += self.stages[Piece.IMAGE]
        blocks = (Stage.SWIN, Stage.FPN, *TOWER)
        total[Stage.REST] = max(0.0, total[Stage.REST] - sum(total[stage] for stage in blocks))
        total[Stage.DYCONV] = max(0.0, total[Stage.DYCONV] - total[Stage.DEFORM])  # they lie inside it
        return {stage: seconds / runs for stage, seconds in total.items()}

    @contextmanager
    def _hooked(self, total: dict[Stage, float]) -> Iterator[None]:
        import time

        tower = self._model.rpn.head.dyhead_tower
        fusion = bool(self._model.config.head.fusion)
        blocks: list[tuple[torch.nn.Module, Stage]] = [
            (self._model.backbone.body, Stage.SWIN),
            (self._model.backbone.fpn, Stage.FPN),
            *((block, TOWER[i % 3] if fusion else Stage.DYCONV) for i, block in enumerate(tower)),
            *((module, Stage.DEFORM) for module in tower.modules() if isinstance(module, DeformConvNorm)),
        ]
        started: dict[Stage, float] = {}

        def begin(stage: Stage) -> None:
            self._wait()
            started[stage] = time.perf_counter()

        def end(stage: Stage) -> None:
            self._wait()
            total[stage] += time.perf_counter() - started[stage]

        handles = []
        for module, stage in blocks:
            handles.append(module.register_forward_pre_hook(lambda *_, stage=stage: begin(stage)))
            handles.append(module.register_forward_hook(lambda *_, stage=stage: end(stage)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def describe(self) -> Mapping[str, Any]:
        """See `Subject`."""
        return {
            "device": self._device.type,
            "precision": "fp32",
            "tokens": 0 if self._text is None else int(self._text[0].shape[1]),
        }

    def close(self) -> None:
        """See `Subject`."""
        self._embedding = self._text = None

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
