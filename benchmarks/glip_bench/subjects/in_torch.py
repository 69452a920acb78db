"""What the subjects in torch have in common: prompt, canvas, and the way to the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from glip_bench.subjects.base import Options, Piece, Stopwatch, Subject, SubjectName
from glip_deploy.frames import make_canvas
from glip_deploy.prompts.tokens import Prompt, parse_prompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.bundle.manifest import Bundle
    from glip_deploy.frames import Canvas
    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.results.detections import Detections

__all__ = ["TorchSubject", "best_device"]


def best_device() -> torch.device:
    """Return the GPU where torch has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TorchSubject(Subject):
    """A model in torch, eager, fp32.

    Args:
        name: see `Subject`.
        options: see `Subject`.
        bundle: gives the tokenizer, and the limits of NMS.
        model: on its device.
    """

    def __init__(self, name: SubjectName, options: Options, bundle: Bundle, model: Any) -> None:
        super().__init__(name, options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._bundle, self._tokenizer, self._model = bundle, bundle.tokenizer(), model
        self._device: torch.device = next(model.parameters()).device
        self._prompt: Prompt | None = None

    def prepare(self, prompt: PromptText | Prompt) -> None:
        """See `Subject.prepare`."""
        if not isinstance(prompt, Prompt):
            prompt = parse_prompt(prompt, self._tokenizer, max_tokens=self._bundle.max_tokens)
        self._prompt = prompt

    @torch.inference_mode()
    def run_batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """See `Subject.run_batch`."""
        if self._prompt is None:
            raise self._no_prompt()
        watch, options = Stopwatch(self._wait), self.options
        with watch(Piece.RESIZE):
            canvas = make_canvas(
                frames, color="rgb", shortest_side=options.shortest_side, longest_side=options.longest_side
            )
        pixels = torch.from_numpy(canvas.frames)
        if self._device.type != "cpu":
            with watch(Piece.TO_DEVICE):
                pixels = pixels.to(self._device)
        found = self._detect(watch, pixels, canvas, self._prompt)
        self.pieces = watch.seconds
        return found

    @abstractmethod
    def _detect(self, watch: Stopwatch, pixels: torch.Tensor, canvas: Canvas, prompt: Prompt) -> list[Detections]:
        """Detect in a (B, H, W, 3) uint8 canvas on the device; time the pieces from the image branch on."""

    def close(self) -> None:
        """See `Subject.close`."""
        self._model = None

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
