"""Prompt tuning: teach a frozen GLIP-nano new objects from a few labeled scenes, through the prompt alone.

    python examples/nano/tune_prompt.py examples/nano/glip_nano.pth --output build/nano/glip_nano_tuned.pth

As in the GLIP paper (section 4.3), every weight stays; only an offset on the text embedding of one fixed prompt is
learned. It is saved in the official form, `rpn.tunable_linear.weight`, one row per token, so `glip-export` takes the
result like any prompt-tuned checkpoint. The image branch is unchanged: a bundle that is already deployed takes the
tuned embedding as it is (`--bundle` measures that). The prompt lists all held-out objects.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray

from glip_deploy import Detector
from glip_deploy.cli.app import run_main
from glip_deploy.cli.console import say
from glip_deploy.errors import CheckpointError
from glip_deploy.files import not_written, write_atomically
from glip_deploy.prompts.encoded import EncodedPrompt

if TYPE_CHECKING:
    import torch
    from glip_export.model.glip import Glip

    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.results.detections import Detections
    from nano.average_precision import Precision
    from nano.scenes import Scene
    from nano.subjects import Subject

SHOTS_SALT = 77
"""Part of the seed of the labeled scenes."""
ROWS = 256
"""The official size: one row for every position of the longest prompt."""


@dataclass(frozen=True)
class TuningReport:
    """AP of the held-out objects, all in one prompt, before and after."""

    labeled_scenes: int
    labeled_objects: int
    epochs: int
    seconds: float
    before_ap: float
    before_ap50: float
    after_ap: float
    after_ap50: float
    bundle_after_ap: float | None
    bundle_after_ap50: float | None


class TunedBundle:
    """A bundle exported before the tuning, given the tuned embedding: nothing is exported again."""

    def __init__(self, bundle: Path, rows: NDArray[np.float32], shortest_side: int) -> None:
        self.detector = Detector.open(bundle, shortest_side=shortest_side, cache_dir=None)
        self.rows = rows

    def detect(self, frame: NDArray[np.uint8], prompt: PromptText, threshold: float = 0.5, *, color: str) -> Detections:
        """See `nano.subjects.Subject`."""
        plain = self.detector.encode(prompt)
        tuned = EncodedPrompt(plain.prompt, plain.embedding + self.rows[: len(plain.embedding)])
        return self.detector.detect(frame, tuned, threshold, color=color)


def tune(
    model: Glip, vocabulary: Sequence[str], scenes: Sequence[Scene], names: list[str], epochs: int, rate: float
) -> torch.Tensor:
    """Return the learned rows, (256, D) float32; the model is left as it was.

    Args:
        model: frozen; quickest with `nano.model.sampled_deform`.
        vocabulary: of its checkpoint.
        scenes: labeled examples.
        names: the classes, in the order of the prompt.
        epochs: passes over the scenes.
        rate: highest learning rate.
    """
    import torch
    from glip_export.tokenizer import build_tokenizer

    from glip_deploy.prompts.tokens import parse_prompt
    from nano.batches import token_map
    from nano.losses import assign, detection_losses, make_anchors

    config = model.config
    prompt = parse_prompt(names, build_tokenizer(vocabulary))
    ids = torch.from_numpy(prompt.input_ids.copy())[None]
    mean, std = torch.tensor(config.input.pixel_mean), torch.tensor(config.input.pixel_std)
    examples = []
    with torch.no_grad():
        plain = model.encode_text(ids, torch.ones_like(ids))
        for scene in scenes:
            # The backbone is frozen, so every scene passes it once.
            image = (torch.from_numpy(scene.image[..., ::-1].astype(np.float32)) - mean) / std
            height, width = scene.image.shape[:2]
            anchors = make_anchors(height, width, config.head.strides)
            boxes = torch.tensor([thing.box for thing in scene.things], dtype=torch.float32)
            tokens = token_map(scene, prompt)
            examples.append((model.backbone(image[None]), anchors, assign(anchors, boxes)[None], boxes[None], tokens))
    rows = torch.zeros(ROWS, plain.shape[-1], requires_grad=True)
    optimizer = torch.optim.AdamW([rows], lr=rate, weight_decay=0.0)
    order = np.random.default_rng(SHOTS_SALT)
    total, step, group = epochs * len(examples), 0, 4
    for _ in range(epochs):
        for index in order.permutation(len(examples)):
            maps, anchors, matched, boxes, tokens = examples[index]
            hidden = plain + rows[: plain.shape[1]]
            outputs = model.rpn.head(maps, hidden, torch.ones(1, plain.shape[1]))
            mask = torch.ones(1, plain.shape[1])
            losses = detection_losses(outputs, anchors, matched, boxes, tokens[None], mask, config.head)
            (losses.total / group).backward()  # type: ignore[no-untyped-call]
            step += 1
            if step % group == 0:
                optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / total))
                optimizer.step()
                optimizer.zero_grad()
    return rows.detach()


def with_rows(model: Glip, rows: torch.Tensor) -> Glip:
    """Return the prompt-tuned model."""
    from glip_export.model.glip import Glip

    from nano.model import SQUEEZE

    tuned = Glip(replace(model.config, tunable_tokens=len(rows)), squeeze=SQUEEZE)
    tuned.load_state_dict({**model.state_dict(), "rpn.tunable_linear.weight": rows})
    return tuned.eval().requires_grad_(False)


def run(args: argparse.Namespace) -> TuningReport:
    """Tune, save, measure."""
    from glip_export.checkpoints import load_checkpoint

    from nano.evaluate import evaluate_objects
    from nano.model import SIDE, sampled_deform, save_checkpoint
    from nano.objects import split_catalog
    from nano.scenes import make_scene
    from nano.subjects import torch_detector

    loaded = load_checkpoint(args.checkpoint)
    if loaded.config.tunable_tokens:
        raise CheckpointError(f"{args.checkpoint} is prompt-tuned already; give the checkpoint it was tuned from")
    names = list(split_catalog().held_out)
    scenes = []
    deck = np.random.default_rng([args.seed, SHOTS_SALT])
    for i in range(args.scenes):
        things = [str(name) for name in deck.permutation(names)[:8]]
        scenes.append(make_scene((args.seed, SHOTS_SALT, i), things))
    started = time.monotonic()
    trained = load_checkpoint(args.checkpoint, deform=sampled_deform).model
    rows = tune(trained, loaded.vocabulary or (), scenes, names, args.epochs, args.rate)
    seconds = time.monotonic() - started
    tuned = with_rows(loaded.model, rows)
    save_checkpoint(args.output, tuned.state_dict(), loaded.vocabulary or ())
    say(f"{args.output}: tuned in {seconds:.0f} s")

    def measure(subject: Subject) -> Precision:
        return evaluate_objects(subject, names, args.test_scenes, salt=2, at_most=len(names))[0]

    before = measure(torch_detector(loaded.model, loaded.vocabulary, SIDE))
    after = measure(torch_detector(tuned, loaded.vocabulary, SIDE))
    deployed = measure(TunedBundle(args.bundle, rows.numpy(), SIDE)) if args.bundle else None
    return TuningReport(
        labeled_scenes=len(scenes),
        labeled_objects=sum(len(scene.things) for scene in scenes),
        epochs=args.epochs,
        seconds=round(seconds, 1),
        before_ap=round(before.ap, 2),
        before_ap50=round(before.ap50, 2),
        after_ap=round(after.ap, 2),
        after_ap50=round(after.ap50, 2),
        bundle_after_ap=None if deployed is None else round(deployed.ap, 2),
        bundle_after_ap50=None if deployed is None else round(deployed.ap50, 2),
    )


def write_and_print(args: argparse.Namespace) -> int:
    """Tune, and show what came of it."""
    report = run(args)
    print("| held-out objects, one prompt | AP | AP50 |\n|---|---|---|")
    print(f"| before | {report.before_ap:.1f} | {report.before_ap50:.1f} |")
    print(f"| after, {report.labeled_scenes} labeled scenes | {report.after_ap:.1f} | {report.after_ap50:.1f} |")
    if report.bundle_after_ap is not None:
        print(f"| after, the old bundle | {report.bundle_after_ap:.1f} | {report.bundle_after_ap50:.1f} |")
    if args.report:
        try:
            write_atomically(args.report, json.dumps(asdict(report), indent=1) + "\n")
        except OSError as error:
            raise not_written(args.report, error) from None
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    args = _parser().parse_args(argv)
    return run_main(lambda: write_and_print(args), "tune_prompt.py", extra="export,bench")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="PTH")
    parser.add_argument("--output", type=Path, default=Path("build/nano/glip_nano_tuned.pth"))
    parser.add_argument("--scenes", type=int, default=32, help="labeled scenes to learn from (default 32)")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="also measure the tuned prompt in this bundle")
    parser.add_argument("--test-scenes", type=int, default=200)
    parser.add_argument("--report", type=Path, metavar="JSON", help="also write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
