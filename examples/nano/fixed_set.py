"""Make the small labeled set that the tests run GLIP-nano on (the result is in tests/data/nano).

    python examples/nano/fixed_set.py

Fresh scenes, as in evaluate.py, of trained and of held-out objects; every one with the prompt it is asked for: what is
in it, and as many other names. And, in caption.json, one scene with a sentence that is true of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from glip_deploy.cli.app import run_main
from glip_deploy.files import write_atomically

if TYPE_CHECKING:
    from nano.scenes import Scene

FIXED_SET = Path(__file__).resolve().parents[2] / "tests" / "data" / "nano"
SEED = 2_000_000  # neither training nor evaluate.py uses it
SIZES = ((224, 224), (224, 288), (288, 224))
CAPTION, CAPTION_NAMES, CAPTION_SEED = "a red apple left of two dogs", ("red apple", "dog", "dog"), (SEED, 2, 5)


def make(output: Path, count: int) -> int:
    """Write `count` scenes of each kind and their labels to a folder."""
    from PIL import Image

    from nano.objects import split_catalog
    from nano.scenes import make_scene

    split = split_catalog()
    output.mkdir(parents=True, exist_ok=True)
    entries = []
    for kind, names in (("trained", split.trained), ("held_out", split.held_out)):
        for i in range(count):
            seed = (SEED, int(kind == "trained"), i)
            rng = np.random.default_rng(seed)
            shuffled = [str(name) for name in rng.permutation(names)]
            scene = make_scene(seed, shuffled[: int(rng.integers(5, 9))], SIZES[i % len(SIZES)], fresh=True)
            present = [thing.name for thing in scene.things]
            others = [name for name in reversed(shuffled) if name not in present][: len(present)]
            file = f"{kind}_{i:02}.jpg"
            Image.fromarray(scene.image).save(output / file, quality=92)
            prompt = sorted({*present, *others})
            entries.append({"file": file, "kind": kind, "prompt": prompt, "things": _things_of(scene)})
    write_atomically(output / "scenes.json", json.dumps(entries, indent=1) + "\n")
    scene = make_scene(CAPTION_SEED, CAPTION_NAMES, fresh=True)
    Image.fromarray(scene.image).save(output / "caption.jpg", quality=92)
    caption = {"file": "caption.jpg", "prompt": CAPTION, "things": _things_of(scene)}
    write_atomically(output / "caption.json", json.dumps(caption, indent=1) + "\n")
    print(output)
    return 0


def _things_of(scene: Scene) -> list[dict[str, Any]]:
    return [{"name": thing.name, "box": list(thing.box)} for thing in scene.things]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FIXED_SET)
    parser.add_argument("--scenes", type=int, default=16, help="of each kind")
    args = parser.parse_args(argv)
    return run_main(lambda: make(args.output, args.scenes), "fixed_set.py", extra="export")


if __name__ == "__main__":
    sys.exit(main())
