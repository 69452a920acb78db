"""Run a detector for many thousands of frames, and see whether memory, descriptors or threads grow.

python benchmarks/robustness/soak.py build/demo/glip_nano --frames 20000 --json soak.json

Prompts, frame sizes, network sizes, clones and backends change all the time, from a fixed seed. Every clone and every
detector is closed again. The first fifth of the frames is the warm-up, in which libraries grow to what the largest
shapes need; after it, the trend of the resident memory may be at most `--limit` MB per 1,000 frames, and descriptors
and threads may not be more than at its end. Exit status 1 if something grows. Linux only, since it reads /proc.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy import Detector, GlipError
from glip_deploy.backends import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

CLASSES = [
    *("dog", "cat", "owl", "penguin", "horse", "cow", "sheep", "bird", "bicycle", "car", "bus", "train", "boat"),
    *("guitar", "piano", "violin", "apple", "banana", "pear", "cup", "bottle", "chair", "table", "lamp", "clock"),
    *("book", "key", "scissors", "umbrella", "tree", "flower", "house", "bridge", "tent", "kite", "ball", "drum"),
]
COLORS = ("red", "green", "blue", "yellow", "purple", "black")
FRAME_SIZES = ((90, 120), (120, 90), (160, 160), (96, 224), (240, 135))
SIDES = (96, 128, 160)
WARM_UP = 0.2
"""Of all frames."""


@dataclass(frozen=True)
class Sample:
    """The process after so many frames."""

    frames: int
    seconds: float
    resident_mb: float
    descriptors: int
    threads: int


def usable_backends(bundle: Path) -> list[str]:
    """Return the backends that open this bundle here."""
    usable = []
    for name in BACKENDS:
        try:
            Detector.open(bundle, backend=name, threads=1, cache_dir=None).close()
        except GlipError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
        else:
            usable.append(name)
    return usable


def prompts(draw: random.Random) -> Iterator[Sequence[str]]:
    """Give prompts without end: a few return again and again, most are new."""
    known = [["dog", "red apple"], "owl. penguin. guitar", "a [red ball] beside a [dog]"]
    while True:
        kind = draw.random()
        if kind < 0.3:
            yield draw.choice(known)
            continue
        names = [
            f"{draw.choice(COLORS)} {name}" if draw.random() < 0.4 else name
            for name in draw.sample(CLASSES, draw.randint(1, 16))
        ]
        yield names if kind < 0.65 else " . ".join(names) + " ."


def measure(frames: int, started: float) -> Sample:
    """Read the process's state from /proc."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Sample(
        frames,
        round(time.monotonic() - started, 1),
        round(int(status["VmRSS"].split()[0]) / 1024, 2),
        sum(1 for _ in Path("/proc/self/fd").iterdir()),
        int(status["Threads"]),
    )


def soak(bundle: Path, frames: int, seed: int, every: int) -> Iterator[Sample]:
    """Detect in `frames` frames; give a sample each `every` of them."""
    draw = random.Random(seed)
    pixels: NDArray[np.uint8] = np.random.default_rng(seed).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    backends, texts, started = usable_backends(bundle), prompts(draw), time.monotonic()
    done = 0
    with tempfile.TemporaryDirectory() as cache:
        while done < frames:
            # A detector lives for up to 500 frames, a clone of it for a part of them.
            options: dict[str, Any] = {"cache_dir": cache if draw.random() < 0.7 else None, "threads": 1}
            with Detector.open(bundle, backend=draw.choice(backends), **options) as detector:
                for _ in range(draw.randint(1, 5)):
                    clone = detector.clone()
                    for worker in (detector, clone):
                        prompt, threshold = worker.encode(next(texts)), draw.random()
                        worker.shortest_side = draw.choice(SIDES)
                        for _ in range(draw.randint(1, 50)):
                            if draw.random() < 0.1:
                                prompt = worker.encode(next(texts))
                            height, width = draw.choice(FRAME_SIZES)
                            batch = [pixels[:height, :width]] * draw.choice((1, 1, 1, 2))
                            worker.detect_batch(batch, prompt, threshold, color="rgb")
                            for _ in batch:
                                done += 1
                                if done % every == 0:
                                    yield measure(done, started)
                            if done >= frames:
                                break
                    clone.close()
                    if done >= frames:
                        return


def verdict(samples: list[Sample], limit: float) -> dict[str, Any]:
    """Return what grew after the warm-up, and whether that is within the limits."""
    kept = [sample for sample in samples if sample.frames >= WARM_UP * samples[-1].frames]
    slope = statistics.linear_regression(
        [sample.frames / 1000 for sample in kept], [sample.resident_mb for sample in kept]
    ).slope
    half = len(kept) // 2

    def more(name: str) -> int:
        """Return how far the second half exceeds the first."""
        first, second = (max(getattr(sample, name) for sample in part) for part in (kept[:half], kept[half:]))
        return int(second - first)

    descriptors, threads = more("descriptors"), more("threads")
    return {
        "resident_mb_per_1000_frames": round(slope, 3),
        "limit_mb_per_1000_frames": limit,
        "resident_mb": [min(sample.resident_mb for sample in kept), max(sample.resident_mb for sample in kept)],
        "more_descriptors": descriptors,
        "more_threads": threads,
        "flat": slope <= limit and descriptors <= 0 and threads <= 0,
    }


def main() -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1.0, help="MB per 1,000 frames")
    parser.add_argument("--json", type=Path, help="write samples and verdict")
    args = parser.parse_args()
    every = max(1, args.frames // 80)
    samples: list[Sample] = []
    for sample in soak(args.bundle, args.frames, args.seed, every):
        samples.append(sample)
        print(
            f"{sample.frames:>6} frames {sample.seconds:>8.1f} s {sample.resident_mb:>8.1f} MB resident"
            f" {sample.descriptors:>4} descriptors {sample.threads:>3} threads",
            flush=True,
        )
    found = verdict(samples, args.limit)
    print(json.dumps(found))
    if args.json is not None:
        import onnxruntime

        facts = {
            "what": "soak",
            "command": f"python benchmarks/robustness/soak.py glip_nano --frames {args.frames} --seed {args.seed}",
            "machine": {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()},
            "onnxruntime": onnxruntime.__version__,
            "backends": usable_backends(args.bundle),
            "verdict": found,
            "samples": [asdict(sample) for sample in samples],
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0 if found["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
