r"""Measure GLIP-nano on fresh scenes: AP of trained and of held-out objects, recall@1 of phrases in captions.

    python examples/nano/evaluate.py examples/nano/glip_nano.pth build/demo/glip_nano --rounded fp16 --scenes 60 \
        --output examples/nano/results.json

A `.pth` runs in torch, a folder is a bundle and runs in ONNX Runtime, both behind `glip_deploy.Detector`. With
`--rounded fp16` every bundle also runs with each half-precision value rounded. Scenes, photographs under them and
captions are none that training has seen. Every scene is asked twice: with a short prompt, the names that occur and as
many others; and for all names of its set, in prompts of at most 30 names. The best 100 detections count, as in COCO.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray

from glip_deploy import Detector
from glip_deploy.cli.app import run_main
from glip_deploy.cli.console import say
from glip_deploy.files import not_written, write_atomically
from glip_deploy.frames.geometry import ceil_div
from glip_deploy.results.boxes import pairwise_iou

if TYPE_CHECKING:
    from nano.average_precision import Found, Precision
    from nano.scenes import Scene
    from nano.subjects import Subject

FRESH = 1_000_000
"""First seed of the evaluation; training's seeds start with a small number."""
NAMES_A_PROMPT = 30
BEST = 100
SIZES = ((224, 224), (224, 288), (288, 224))
"""(height, width) of the scenes, in pixels, in turn."""
THINGS = (5, 11)
"""Least number of things in a scene, and one more than the largest."""


@dataclass(frozen=True)
class Report:
    """Figures of one subject, 0 to 100."""

    subject: str
    scenes: int
    trained_ap: float
    trained_ap50: float
    trained_short_ap: float
    """Under a short prompt: the names that occur, and as many others."""
    trained_short_ap50: float
    held_out_ap: float
    held_out_ap50: float
    held_out_ap50_chance: float
    """The same boxes under shuffled names: what finding things without knowing them would give."""
    held_out_short_ap: float
    held_out_short_ap50: float
    recall_at_1: float
    phrases: int


def fresh_scenes(names: Sequence[str], count: int, salt: int) -> Iterator[Scene]:
    """Yield scenes of these objects on photographs that training does not use."""
    from nano.scenes import make_scene

    for i in range(count):
        rng = np.random.default_rng([FRESH, salt, i])
        things = [str(name) for name in rng.choice(names, int(rng.integers(*THINGS)))]
        yield make_scene((FRESH, salt, i), things, SIZES[i % len(SIZES)], fresh=True)


def prompts_of(names: Sequence[str], at_most: int = NAMES_A_PROMPT) -> list[list[str]]:
    """Cut a list of names into prompts of nearly equal length."""
    parts = np.array_split(np.array(names), ceil_div(len(names), at_most))
    return [[str(name) for name in part] for part in parts]


def detect_all(subject: Subject, image: NDArray[np.uint8], prompts: Sequence[list[str]]) -> Found:
    """Return the best 100 detections over all prompts."""
    from nano.average_precision import Found

    found = [subject.detect(image, prompt, 0.0, color="rgb") for prompt in prompts]
    names = [name for one in found for name in one.phrases]
    scores = np.concatenate([one.scores for one in found]).astype(np.float64)
    boxes = np.concatenate([one.boxes for one in found]).astype(np.float64)
    best = np.argsort(-scores, kind="stable")[:BEST]
    return Found(boxes[best], tuple(names[i] for i in best), scores[best])


def short_prompt(names: Sequence[str], scene: Scene, number: int) -> list[str]:
    """Return the names that occur in a scene, and as many that do not, in alphabetical order."""
    present = {thing.name for thing in scene.things}
    others = [str(n) for n in np.random.default_rng([FRESH, number]).permutation(names) if n not in present]
    return sorted({*present, *others[: len(present)]})


def evaluate_objects(
    subject: Subject, names: Sequence[str], count: int, salt: int, at_most: int = NAMES_A_PROMPT, *, short: bool = False
) -> tuple[Precision, Precision]:
    """Return (precision, precision under shuffled names) on `count` scenes.

    Args:
        subject: what detects.
        names: what occurs in the scenes.
        count: number of scenes.
        salt: which scenes.
        at_most: every scene is asked for all names, in prompts of at most so many.
        short: ask every scene for the names that occur and as many others instead.
    """
    from nano.average_precision import Found, average_precision

    prompts = prompts_of(names, at_most)
    detected, truth = [], []
    for i, scene in enumerate(fresh_scenes(names, count, salt)):
        asked = [short_prompt(names, scene, i)] if short else prompts
        detected.append(detect_all(subject, scene.image, asked))
        boxes = np.array([thing.box for thing in scene.things], float).reshape(-1, 4)
        truth.append(Found(boxes, tuple(thing.name for thing in scene.things), np.ones(len(boxes))))
    shuffled = dict(zip(names, np.roll(np.array(names), len(names) // 2), strict=True))
    wrong = [Found(one.boxes, tuple(str(shuffled[name]) for name in one.names), one.scores) for one in detected]
    return average_precision(detected, truth), average_precision(wrong, truth)


def evaluate_captions(subject: Subject, names: Sequence[str], count: int) -> tuple[float, int]:
    """Return (recall@1, phrases): how often a phrase's best box overlaps one of its objects by half or more."""
    from nano.scenes import caption_of

    hits = total = 0
    for i, scene in enumerate(fresh_scenes(names, count, salt=3)):
        described = caption_of(scene, (FRESH, i))
        if described is None:
            continue
        caption, phrases = described
        found = subject.detect(scene.image, caption, 0.0, color="rgb")
        for label, name in enumerate(phrases):
            total += 1
            mine = np.flatnonzero(found.labels == label)
            true = np.array([thing.box for thing in scene.things if thing.name == name], float)
            if len(mine) and pairwise_iou(found.boxes[mine[:1]], true).max() >= 0.5:
                hits += 1
    return 100 * hits / max(1, total), total


def evaluate(subject: Subject, label: str, scenes: int) -> Report:
    """Measure everything on so many scenes of each kind."""
    from nano.objects import split_catalog

    split = split_catalog()
    trained, _ = evaluate_objects(subject, split.trained, scenes, salt=1)
    trained_short, _ = evaluate_objects(subject, split.trained, scenes, salt=1, short=True)
    held_out, chance = evaluate_objects(subject, split.held_out, scenes, salt=2)
    held_out_short, _ = evaluate_objects(subject, split.held_out, scenes, salt=2, short=True)
    recall, phrases = evaluate_captions(subject, split.trained, scenes)
    return Report(
        subject=label,
        scenes=scenes,
        trained_ap=round(trained.ap, 2),
        trained_ap50=round(trained.ap50, 2),
        trained_short_ap=round(trained_short.ap, 2),
        trained_short_ap50=round(trained_short.ap50, 2),
        held_out_ap=round(held_out.ap, 2),
        held_out_ap50=round(held_out.ap50, 2),
        held_out_ap50_chance=round(chance.ap50, 2),
        held_out_short_ap=round(held_out_short.ap, 2),
        held_out_short_ap50=round(held_out_short.ap50, 2),
        recall_at_1=round(recall, 2),
        phrases=phrases,
    )


def table(reports: Sequence[Report]) -> str:
    """Return the figures as a Markdown table, AP / AP50."""
    rows = [
        "| AP / AP50 | trained, short prompt | trained, all names | held out, short prompt | held out, all names "
        "| (names shuffled) | recall@1 |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {r.subject} | {r.trained_short_ap:.1f} / {r.trained_short_ap50:.1f} "
        f"| {r.trained_ap:.1f} / {r.trained_ap50:.1f} | {r.held_out_short_ap:.1f} / {r.held_out_short_ap50:.1f} "
        f"| {r.held_out_ap:.1f} / {r.held_out_ap50:.1f} | AP50 {r.held_out_ap50_chance:.1f} | {r.recall_at_1:.1f} |"
        for r in reports
    ]
    return "\n".join(rows)


def subjects_of(paths: Sequence[Path], rounded: str | None, scratch: Path) -> Iterator[tuple[str, Detector]]:
    """Yield (label, detector) for every checkpoint and bundle, and for the rounded copies of bundles."""
    from nano.model import SIDE
    from nano.subjects import checkpoint_detector, rounded_copy

    for i, path in enumerate(paths):
        if not path.is_dir():
            yield f"torch, {path.name}", checkpoint_detector(path, SIDE)
            continue
        yield f"ONNX Runtime, {path.name}", Detector.open(path, shortest_side=SIDE, cache_dir=None)
        if rounded:
            copy = rounded_copy(path, rounded, scratch / str(i))
            label = f"ONNX Runtime, {path.name}, every value rounded to {rounded}"
            yield label, Detector.open(copy, shortest_side=SIDE, cache_dir=None)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    reports = []
    with tempfile.TemporaryDirectory() as scratch:
        for label, subject in subjects_of(args.subjects, args.rounded, Path(scratch)):
            with subject:
                reports.append(evaluate(subject, label, args.scenes))
            say(f"{label}: done")
    print(table(reports))
    if args.output:
        content = {"machine": platform.processor() or platform.machine(), "reports": [asdict(r) for r in reports]}
        try:
            write_atomically(args.output, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise not_written(args.output, error) from None
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    args = _parser().parse_args(argv)
    return run_main(lambda: run(args), "evaluate.py", extra="export,bench")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", type=Path, nargs="+", metavar="PTH|BUNDLE")
    parser.add_argument("--scenes", type=int, default=200, help="of every kind (default 200)")
    parser.add_argument("--rounded", choices=("fp16", "bf16"), help="also run the bundles in this precision")
    parser.add_argument("--output", type=Path, metavar="JSON", help="also write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
