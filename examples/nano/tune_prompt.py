"""Prompt tuning: teach a frozen GLIP-nano new objects from a few labelled scenes, through the prompt alone.

    python examples/nano/tune_prompt.py examples/nano/glip_nano.pth --output build/nano/glip_nano_tuned.pth

As in the GLIP paper (section 4.3): every weight stays, only an offset on the text embedding of one fixed prompt is
learnt. It is saved in the official form, `rpn.tunable_linear.weight`, one row per token, so `glip-export` takes the
result like any prompt-tuned checkpoint. The image branch is unchanged: a bundle that is already deployed takes the
tuned embedding as it is (`--bundle` measures that). The prompt lists all held-out objects.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    import torch
    from glip_export.model.glip import Glip

    from glip_deploy.prompts.syntax import PromptText
    from glip_deploy.results.detections import Detections
    from nano.average_precision import Precision
    from nano.scenes import Scene

SHOTS_SALT = 77
ROWS = 256
"""The official size: one row for every position of the longest prompt."""


@dataclass(frozen=True)
class TuningReport:
    """AP of the held-out objects, all in one prompt, before and after."""

    labelled_scenes: int
    labelled_objects: int
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

    def __init__(self, bundle: Path, rows: np.ndarray, shortest_side: int) -> None:
        from nano.subjects import BundleSubject

        self.detector, self.rows = BundleSubject(bundle, shortest_side).detector, rows

    def detect(self, image: np.ndarray, prompt: PromptText) -> Detections:
        """See `nano.subjects.Subject`."""
        from glip_deploy.detector import EncodedPrompt

        plain = self.detector.encode(prompt)
        tuned = EncodedPrompt(plain.prompt, plain.embedding + self.rows[: len(plain.embedding)])
        return self.detector.detect(image, tuned, threshold=0.0, color="rgb")


def tune(model: Glip, vocabulary: tuple[str, ...], scenes: list[Scene], names: list[str], epochs: int, rate: float):  # noqa: ANN201
    """Return the learnt rows, (256, D); the model is left as it was.

    Args:
        model: frozen; quickest with `nano.model.sampled_deform`.
        vocabulary: of its checkpoint.
        scenes: labelled examples.
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
            anchors = make_anchors(*scene.image.shape[:2], config.head.strides)
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
            (losses.total / group).backward()
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
    from nano.objects import split_catalogue
    from nano.scenes import make_scene
    from nano.subjects import TorchSubject

    loaded = load_checkpoint(args.checkpoint)
    if loaded.config.tunable_tokens:
        raise GlipError(f"{args.checkpoint} is prompt-tuned already; give the checkpoint it was tuned from")
    names = list(split_catalogue().held_out)
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
    print(f"{args.output}: tuned in {seconds:.0f} s", file=sys.stderr)

    def measure(subject) -> Precision:  # noqa: ANN001
        return evaluate_objects(subject, names, args.test_scenes, salt=2, at_most=len(names))[0]

    before = measure(TorchSubject(loaded.model, loaded.vocabulary, SIDE))
    after = measure(TorchSubject(tuned, loaded.vocabulary, SIDE))
    deployed = measure(TunedBundle(args.bundle, rows.numpy(), SIDE)) if args.bundle else None
    return TuningReport(
        labelled_scenes=len(scenes),
        labelled_objects=sum(len(scene.things) for scene in scenes),
        epochs=args.epochs,
        seconds=round(seconds, 1),
        before_ap=round(before.ap, 2),
        before_ap50=round(before.ap50, 2),
        after_ap=round(after.ap, 2),
        after_ap50=round(after.ap50, 2),
        bundle_after_ap=None if deployed is None else round(deployed.ap, 2),
        bundle_after_ap50=None if deployed is None else round(deployed.ap50, 2),
    )


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        report = run(args)
    except GlipError as error:
        print(f"tune_prompt.py: error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(
            f"tune_prompt.py: error: {error.name or error} is not installed; pip install -e '.[export]'",
            file=sys.stderr,
        )
        return 1
    print("| held-out objects, one prompt | AP | AP50 |\n|---|---|---|")
    print(f"| before | {report.before_ap:.1f} | {report.before_ap50:.1f} |")
    print(f"| after, {report.labelled_scenes} labelled scenes | {report.after_ap:.1f} | {report.after_ap50:.1f} |")
    if report.bundle_after_ap is not None:
        print(f"| after, the old bundle | {report.bundle_after_ap:.1f} | {report.bundle_after_ap50:.1f} |")
    if args.report:
        args.report.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="PTH")
    parser.add_argument("--output", type=Path, default=Path("build/nano/glip_nano_tuned.pth"))
    parser.add_argument("--scenes", type=int, default=32, help="labelled scenes to learn from (default 32)")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="also measure the tuned prompt in this bundle")
    parser.add_argument("--test-scenes", type=int, default=200)
    parser.add_argument("--report", type=Path, metavar="JSON", help="also write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
