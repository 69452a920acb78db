"""The training loop: two stages, one schedule, resumable after any step.

Stage 1 teaches the backbone what things look like, ten times cheaper than detection does: features at the centers of
the objects are classified against the (frozen) text embeddings of all names, as ImageNet does it for the real GLIP.
Stage 2 is GLIP's own training, token focal, GIoU and centerness losses, with two helpers that tell names apart sooner:
stage 1's task, and a choice among the prompt's classes (`phrase_contrast`).
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from glip_export.model.glip import Glip
from glip_export.tokenizer import build_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from glip_deploy.errors import CheckpointError, OptionError
from glip_deploy.files import write_atomically
from glip_deploy.prompts.tokens import parse_prompt
from nano.batches import Batch, Batches
from nano.losses import Anchors, detection_losses, make_anchors, phrase_contrast
from nano.model import build_nano, write_whole
from nano.objects import split_catalog

__all__ = ["Plan", "Trainer"]

WARMUP = 150
WEIGHT_DECAY = 0.03
CLIP = 5.0
EMA = 0.998
CONTRAST_WEIGHT = 0.5
NAMES_WEIGHT = 0.15  # of stage 1's task while stage 2 runs: every name is an alternative there, not only the prompt's
TEMPERATURE = 0.07
SOFTNESS = 0.3  # share of the target that goes to names of similar meaning
SIMILARITY_TEMPERATURE = 0.1
TEXT_NOISE = 0.3  # of a token's own standard deviation: near meanings must give near answers
NAMES_A_PROMPT = 24
PYRAMID_LEVELS = 3  # P3 to P5 are taught in stage 1; P6 and P7 see hardly any of these objects


@dataclass(frozen=True)
class Plan:
    """Everything that decides the weights, apart from machine and number of threads."""

    seed: int = 0
    backbone_steps: int = 2000
    steps: int = 2800
    """Of stage 2."""
    batch: int = 8
    backbone_rate: float = 1.5e-3
    rate: float = 1e-3
    bf16: bool = True

    @property
    def total(self) -> int:
        """Steps of both stages."""
        return self.backbone_steps + self.steps

    def learning_rate(self, step: int) -> float:
        """Warm-up and cosine, once per stage."""
        if step < self.backbone_steps:
            peak, at, end = self.backbone_rate, step, self.backbone_steps
        else:
            peak, at, end = self.rate, step - self.backbone_steps, self.steps
        warm = min(WARMUP, max(1, end // 10))
        if at < warm:
            return peak * (at + 1) / warm
        return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (at - warm) / max(1, end - warm)))))


def semantic_axes(texts: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return (weight (channels, D), bias) of the linear map of normalized text onto its main directions.

    Principal components, half whitened: the first text classifier thus already tells apart what the pretrained
    encoder tells apart, and treats alike what it holds alike.
    """
    unit = F.normalize(texts.float(), dim=-1)
    center = unit.mean(0)
    _, spread, directions = torch.linalg.svd(unit - center, full_matrices=False)
    weight = directions[:channels] * (spread[:1] / spread[:channels]).sqrt()[:, None]
    return weight, -weight @ center


class NameClassifier(nn.Module):
    """The task of stage 1: to name the object whose center a location is. Not part of the model.

    Part of every target goes to names of similar meaning, so that what is alike in words comes to lie close in the
    features, which is all that can help with a name never seen.
    """

    def __init__(self, channels: int, names: Tensor) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.text = nn.Linear(names.shape[1], channels)
        weight, bias = semantic_axes(names, channels)
        with torch.no_grad():
            self.text.weight.copy_(weight)
            self.text.bias.copy_(bias)
        unit = F.normalize(names, dim=-1)
        unit = F.normalize(unit - unit.mean(0), dim=-1)
        alike = (unit @ unit.T / SIMILARITY_TEMPERATURE).fill_diagonal_(-math.inf).softmax(dim=-1)
        self.targets = (1 - SOFTNESS) * torch.eye(len(names), device=names.device) + SOFTNESS * alike

    def forward(self, maps: list[Tensor], batch: Batch, names: Tensor) -> Tensor:
        """Return the mean cross-entropy over its least value.

        Args:
            maps: P3..P7 of the batch.
            batch: where the objects are.
            names: (C, D) text embedding of every name.
        """
        height, width = batch.size
        real = batch.names >= 0
        scale = torch.tensor([2 / width, 2 / height], device=batch.boxes.device)
        centers = ((batch.boxes[..., :2] + batch.boxes[..., 2:] + 1) / 2 * scale - 1)[:, :, None]
        weights = F.normalize(self.text(F.normalize(names, dim=-1)), dim=-1)
        targets = self.targets[batch.names[real]]
        loss = names.new_zeros(())
        for level in maps[:PYRAMID_LEVELS]:
            seen = F.grid_sample(level.float(), centers, align_corners=False)[..., 0].transpose(1, 2)[real]
            scores = F.normalize(self.norm(seen), dim=-1) @ weights.T / TEMPERATURE
            loss = loss + F.cross_entropy(scores, targets)
        least: Tensor = torch.special.entr(targets).sum(-1).mean()
        return loss / PYRAMID_LEVELS - least


class Trainer:
    """A training run with its state; `run` may be stopped and called again, in another process too."""

    def __init__(self, plan: Plan, device: torch.device, batches: Batches | None = None) -> None:
        self.plan, self.device = plan, device
        self.model, self.vocabulary = build_nano(plan.seed)
        self.model.to(device)
        split = split_catalog()
        self.names = split.trained + split.extra
        self.text = self._encode_names()
        self.batches = batches or Batches(
            self.names, self.vocabulary, plan.seed, plan.batch, crowded_until=plan.backbone_steps
        )
        config = self.model.config
        self.classifier = NameClassifier(config.head.channels, self.text).to(device)
        self.optimizers = self._optimizers()
        self.average = {key: value.detach().clone() for key, value in self._trained().items()}
        self.step = 0
        self.seconds = 0.0
        self._anchors: dict[tuple[int, int], Anchors] = {}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {key: value for key, value in self.model.named_parameters() if value.requires_grad}

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Muon (Jordan et al., 2024) for the matrices inside, and AdamW for the rest.

        Muon learns as much from half the scenes here, for a sixth more time a step.
        """
        named = [*self._trained().items(), *self.classifier.named_parameters(prefix="classifier")]
        matrices = [p for key, p in named if p.ndim == 2 and "bias_table" not in key]
        chosen = {id(p) for p in matrices}
        others = [(key, p) for key, p in named if id(p) not in chosen]
        # Norms, biases, gains and the position tables are not pulled to zero.
        decayed = [p for _, p in others if p.ndim > 2]
        free = [p for _, p in others if p.ndim <= 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
        return [
            torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY),
        ]

    def _encode_names(self) -> Tensor:
        """Return (C, D), the mean over the tokens of every name; and let the head's text classifier start from them."""
        tokenizer = build_tokenizer(self.vocabulary)
        rows, tokens = [], []
        with torch.no_grad():
            for start in range(0, len(self.names), NAMES_A_PROMPT):
                prompt = parse_prompt(self.names[start : start + NAMES_A_PROMPT], tokenizer)
                ids = torch.from_numpy(prompt.input_ids.copy())[None].to(self.device)
                hidden = self.model.encode_text(ids, torch.ones_like(ids))[0]
                rows += [hidden[list(span)].mean(0) for span in prompt.token_spans]
                tokens += [hidden[list(span)] for span in prompt.token_spans]
            projection = self.model.rpn.head.dot_product_projection_text
            weight, bias = semantic_axes(torch.cat(tokens), projection.out_features)
            unit = F.normalize(torch.cat(tokens), dim=-1)
            # The head feeds it e / 2. Its outputs get the size they have at an ordinary initialization.
            size = projection(unit / 2).norm(dim=-1).mean() / (unit @ weight.T + bias).norm(dim=-1).mean()
            projection.weight.copy_(2 * size * weight)
            projection.bias.copy_(size * bias)
        return torch.stack(rows)

    def _noisy(self, text: Tensor) -> Tensor:
        """Add a little noise to the meaning of tokens; it is a function of the step."""
        noise = torch.randn(text.shape, generator=torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.step))
        return text + TEXT_NOISE * text.std(dim=-1, keepdim=True) * noise.to(text.device)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return what the current stage minimizes, and its parts for the log."""
        config = self.model.config
        mean = torch.tensor(config.input.pixel_mean, device=self.device)
        std = torch.tensor(config.input.pixel_std, device=self.device)
        images = (batch.images.float() - mean) / std
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.bf16):
            if self.step < self.plan.backbone_steps:
                maps = self.model.backbone(images)
            else:
                with torch.no_grad():
                    hidden = self.model.encode_text(batch.ids, batch.mask)
                count = len(images)
                hidden = self._noisy(hidden.expand(count, -1, -1).float())
                mask = batch.mask.expand(count, -1)
                maps = self.model.backbone(images)
                outputs = self.model.rpn.head(maps, hidden, mask)
        if self.step < self.plan.backbone_steps:
            loss = self.classifier(maps, batch, self._noisy(self.text))
            return loss, {"name": loss.item()}
        if batch.size not in self._anchors:
            self._anchors[batch.size] = make_anchors(*batch.size, config.head.strides)
        parts = detection_losses(
            outputs, self._anchors[batch.size], batch.matched, batch.boxes, batch.tokens, mask, config.head
        )
        contrast = phrase_contrast(
            outputs, batch.matched, batch.labels, batch.classes.expand(len(batch.images), -1, -1)
        )
        names = self.classifier(maps, batch, self._noisy(self.text))
        shown = {
            "name": names.item(),
            "choice": contrast.item(),
            "token": parts.token.item(),
            "box": parts.box.item(),
            "center": parts.centerness.item(),
        }
        return parts.total + CONTRAST_WEIGHT * contrast + NAMES_WEIGHT * names, shown

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Update the weights and their moving average once; return the parts of the loss."""
        loss, shown = self.loss(batch)
        if not math.isfinite(loss.item()):
            raise OptionError(f"the loss became {loss.item()} at step {self.step}; resume with a lower --rate")
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = self.plan.learning_rate(self.step)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in self._trained().values() if p.grad is not None], CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        # Starts afresh with each stage; young averages forget faster.
        age = self.step - (self.plan.backbone_steps if self.step > self.plan.backbone_steps else 0)
        keep = min(EMA, (1 + age) / (10 + age))
        with torch.no_grad():
            for key, value in self._trained().items():
                self.average[key].lerp_(value, 1 - keep)
        return shown

    def averaged_state(self) -> dict[str, Tensor]:
        """The state dict to save as a checkpoint: averaged weights, frozen ones as they are."""
        return {**self.model.state_dict(), **self.average}

    def save(self, path: Path) -> None:
        """Write everything needed to go on, whole or not at all."""
        write_whole(
            path,
            {
                "plan": asdict(self.plan),
                "step": self.step,
                "seconds": self.seconds,
                "weights": self._trained(),
                "average": self.average,
                "classifier": self.classifier.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
        )

    def load(self, path: Path) -> None:
        """Continue where `save` was called.

        Raises:
            CheckpointError: it is damaged.
            OptionError: it is of another seed or batch size.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            for key in ("seed", "batch"):
                if state["plan"][key] != getattr(self.plan, key):
                    raise OptionError(
                        f"{path} was trained with {key} {state['plan'][key]}, not {getattr(self.plan, key)}; "
                        "use the same, or another --work folder"
                    )
            self.model.load_state_dict(state["weights"], strict=False)
            self.average = state["average"]
            self.classifier.load_state_dict(state["classifier"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]
        except (RuntimeError, KeyError, EOFError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} is damaged ({reason[:100]}); delete it to start again") from None

    def run(
        self,
        *,
        until: int | None = None,
        seconds: float = math.inf,
        workers: int = 1,
        state: Path | None = None,
        save_every: float = 300.0,
        log: Callable[[str], None] = lambda _: None,
    ) -> str:
        """Train until a step, the plan's end, the time is up or a signal (INT, TERM) comes.

        Args:
            until: step to stop before, None for the plan's end.
            seconds: limit of this leg.
            workers: processes that make scenes.
            state: where to save every `save_every` seconds and at the end.
            save_every: seconds.
            log: called with a line of progress every 50 steps.

        Returns:
            "finished", "time is up" or "interrupted".
        """
        end = min(self.plan.total, self.plan.total if until is None else until)
        started = last_save = time.monotonic()
        outcome = "finished"
        sums: dict[str, float] = {}
        since, since_step = started, self.step
        with _Interruptible() as interrupted:
            self.model.train()
            for batch in self._batches(end, workers):
                tick = time.monotonic()
                for key, value in self.train_step(batch).items():
                    sums[key] = sums.get(key, 0.0) + value
                now = time.monotonic()
                self.seconds += min(now - tick, 30.0)  # a stopped process has not been training
                if self.step % 50 == 0 or self.step == end:
                    done = max(1, self.step - since_step)
                    shown = " ".join(f"{key} {value / done:.3f}" for key, value in sums.items())
                    rate = self.plan.learning_rate(self.step)
                    log(f"step {self.step}/{self.plan.total} {shown} rate {rate:.1e} {(now - since) / done:.2f} s/step")
                    sums, since, since_step = {}, now, self.step
                if self.step == self.plan.backbone_steps:
                    self._start_average_again()
                if state is not None and now - last_save > save_every:
                    self.save(state)
                    last_save = now
                if interrupted():
                    outcome = "interrupted"
                    break
                if now - started > seconds:
                    outcome = "time is up"
                    break
        if state is not None:
            self.save(state)
        return outcome

    def _start_average_again(self) -> None:
        self.average = {key: value.detach().clone() for key, value in self._trained().items()}

    def _batches(self, end: int, workers: int) -> Iterator[Batch]:
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=range(self.step, end),
            num_workers=workers,
            prefetch_factor=6 if workers else None,
            worker_init_fn=_ignore_interrupts,
        )
        for batch in loader:
            yield Batch(**{key: value.to(self.device) for key, value in vars(batch).items()})


def _ignore_interrupts(_: int) -> None:
    """Leave Ctrl-C, which reaches all processes of the group, to the training loop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Interruptible:
    """Turns INT and TERM into a flag, so that a step is never cut in half."""

    def __enter__(self) -> Callable[[], bool]:
        self.hit = False
        self.old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return lambda: self.hit

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.hit = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def load_for_start(model: Glip, path: Path) -> None:
    """Start from the weights of a finished checkpoint of the same architecture.

    Raises:
        CheckpointError: not such a checkpoint.
    """
    from glip_export.checkpoints import load_checkpoint

    loaded = load_checkpoint(path)
    if loaded.config != model.config:
        raise CheckpointError(f"{path} has another architecture than GLIP-nano; --init takes a glip_nano.pth")
    model.load_state_dict(loaded.model.state_dict())


def write_record(path: Path, trainer: Trainer, device: str) -> None:
    """Write the plan and what was done of it, as JSON."""
    record = {
        "plan": asdict(trainer.plan),
        "steps_done": trainer.step,
        "training_seconds": round(trainer.seconds),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trained_objects": len(trainer.names),
        "vocabulary": len(trainer.vocabulary),
    }
    write_atomically(path, json.dumps(record, indent=1) + "\n")
