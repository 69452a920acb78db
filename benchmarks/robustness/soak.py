"""Run a detector for many thousands of frames, and see whether memory, descriptors or threads grow.

python benchmarks/robustness/soak.py build/demo/glip_nano --frames 20000 --json soak.json

Prompts, frame sizes, network sizes, clones and backends change all the time, from a fixed seed. Every clone and every
detector is closed again. The process is looked at while a detector is open, every few frames, and when it was closed.
Libraries of backends differ in what they need, so samples with each backend open, and those with none, are judged by
themselves. The first fifth of the frames is the warm-up, in which libraries grow to what the largest shapes need.

After it, while a detector is open the resident memory may not grow by more than `--limit` MB per 1,000 frames. It goes
up and down by tens of MB with the shapes that happen to be asked for, so the trend counts as growth where it is above
that by more than twice its standard error. While none is open, what malloc has given out, and would have back by then,
may not grow by more than `--leak` MB: that hardly goes up and down. (What is resident then is what malloc keeps for the
next detector, anything between a little and all that the last one needed.) Descriptors and threads may not be more in
the second half than in the first. Exit status 1 if something grows. Linux with glibc only, which it asks.
"""

from __future__ import annotations

import argparse
import ctypes
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
    allocated_mb: float | None = None
    """What malloc has given out and not got back, without Python's small objects; None where it was not asked."""
    backend: str | None = None
    """Of the open detector; None where none is open, or where it is not said."""


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


def measure(frames: int, started: float, backend: str | None) -> Sample:
    """Read the process's state from /proc."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Sample(
        frames=frames,
        seconds=round(time.monotonic() - started, 1),
        resident_mb=round(int(status["VmRSS"].split()[0]) / 1024, 2),
        descriptors=sum(1 for _ in Path("/proc/self/fd").iterdir()),
        threads=int(status["Threads"]),
        allocated_mb=round(allocated() / 2**20, 2),
        backend=backend,
    )


class MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h, ten numbers, with names for those that are read."""

    _fields_ = (
        ("before", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),
        ("between", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t),
        ("after", ctypes.c_size_t * 2),
    )


def allocated() -> int:
    """Return the bytes that malloc has given out: of its arenas, and those mapped one by one."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = MallInfo
    info = ask()
    return int(info.uordblks + info.hblkhd)


def soak(bundle: Path, frames: int, seed: int, every: int) -> Iterator[Sample]:
    """Detect in `frames` frames; give a sample each `every` of them, and one after each detector."""
    draw = random.Random(seed)
    pixels: NDArray[np.uint8] = np.random.default_rng(seed).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    backends, texts, started = usable_backends(bundle), prompts(draw), time.monotonic()
    done = 0
    with tempfile.TemporaryDirectory() as cache:
        while done < frames:
            # A detector lives for up to 500 frames, a clone of it for a part of them.
            options: dict[str, Any] = {"cache_dir": cache if draw.random() < 0.7 else None, "threads": 1}
            backend = draw.choice(backends)
            with Detector.open(bundle, backend=backend, **options) as detector:
                for _ in range(draw.randint(1, 5)):
                    with detector.clone() as clone:
                        for worker in (detector, clone):
                            for count in detect(worker, frames - done, pixels, texts, draw):
                                if (done + count) // every > done // every:
                                    yield measure(done + count, started, backend)
                                done += count
            yield measure(done, started, None)


def detect(
    worker: Detector, limit: int, pixels: NDArray[np.uint8], texts: Iterator[Sequence[str]], draw: random.Random
) -> Iterator[int]:
    """Detect in up to 50 batches, until there were `limit` frames; give the number of frames of each batch."""
    prompt, threshold = worker.encode(next(texts)), draw.random()
    worker.shortest_side = draw.choice(SIDES)
    for _ in range(draw.randint(1, 50)):
        if limit <= 0:
            return
        if draw.random() < 0.1:
            prompt = worker.encode(next(texts))
        height, width = draw.choice(FRAME_SIZES)
        batch = [pixels[:height, :width]] * draw.choice((1, 1, 1, 2))
        worker.detect_batch(batch, prompt, threshold, color="rgb")
        limit -= len(batch)
        yield len(batch)


def verdict(samples: list[Sample], limit: float, memory: str = "resident_mb") -> dict[str, Any]:
    """Return what grew after the warm-up, and whether that is within the limits, of samples that can be compared.

    Args:
        samples: in order.
        limit: of the trend, MB per 1,000 frames.
        memory: the field whose trend is judged.
    """
    kept = [sample for sample in samples if sample.frames >= WARM_UP * samples[-1].frames]
    if len(kept) < 3:
        raise SystemExit(f"soak: error: {len(kept)} samples after the warm-up say nothing; use more --frames")
    values = [getattr(sample, memory) for sample in kept]
    slope, error = trend([sample.frames / 1000 for sample in kept], values)
    half = len(kept) // 2

    def more(name: str) -> int:
        """Return how far the second half exceeds the first."""
        first, second = (max(getattr(sample, name) for sample in part) for part in (kept[:half], kept[half:]))
        return int(second - first)

    descriptors, threads = more("descriptors"), more("threads")
    return {
        f"{memory}_per_1000_frames": round(slope, 3),
        "standard_error": round(error, 3),
        "limit_mb_per_1000_frames": limit,
        memory: [min(values), max(values)],
        "more_descriptors": descriptors,
        "more_threads": threads,
        "flat": slope - 2 * error <= limit and descriptors <= 0 and threads <= 0,
    }


def trend(at: list[float], values: list[float]) -> tuple[float, float]:
    """Return the slope of the line through at least three points, by least squares, and its standard error."""
    slope, intercept = statistics.linear_regression(at, values)
    middle = statistics.fmean(at)
    rest = sum((value - intercept - slope * x) ** 2 for x, value in zip(at, values, strict=True))
    return slope, (rest / (len(at) - 2) / sum((x - middle) ** 2 for x in at)) ** 0.5


def verdicts(samples: list[Sample], limit: float, leak: float) -> dict[str, dict[str, Any]]:
    """Return the verdict on samples with each backend open, and on those with none."""
    groups: dict[str | None, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.backend, []).append(sample)
    found = {name: verdict(groups[name], limit) for name in sorted(name for name in groups if name)}
    return {**found, "none open": verdict(groups[None], leak, "allocated_mb")}


def main() -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1.0, help="MB per 1,000 frames")
    parser.add_argument("--leak", type=float, default=0.2, help="MB per 1,000 frames that may never be freed")
    parser.add_argument("--json", type=Path, help="write samples and verdict")
    args = parser.parse_args()
    every = max(1, args.frames // 400)
    samples: list[Sample] = []
    for sample in soak(args.bundle, args.frames, args.seed, every):
        samples.append(sample)
        print(
            f"{sample.frames:>6} frames {sample.seconds:>8.1f} s {sample.resident_mb:>8.1f} MB resident"
            f" {sample.allocated_mb:>8.1f} MB allocated"
            f" {sample.descriptors:>4} descriptors {sample.threads:>3} threads, {sample.backend or 'none'} open",
            flush=True,
        )
    found = verdicts(samples, args.limit, args.leak)
    print(json.dumps(found, indent=1))
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
    return 0 if all(one["flat"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
