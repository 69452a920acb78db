"""Measure the C++ runtime and Python on OpenVINO, and Python on ONNX Runtime, in turn on the same picture.

python benchmarks/runtime/compare.py build/demo/glip_nano --side 224 --json compare.json

`make cpp` builds what it drives, `build/runtime/glip_pace`. Each subject is a process of its own, and only one computes
at a time: every round measures some frames of each, from pixels to boxes, in fp32, and the first frames are left out.
Nothing is cached, so opening includes preparing the image graph, and encoding the first prompt that of the text graph.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "dog. red apple. bicycle. guitar. penguin. sunflower. bus. traffic light. backpack"
PICTURE = ROOT / "examples" / "nano" / "media" / "scene.jpg"
THRESHOLD = 0.3
WARM_UP = 2
"""Frames of each."""


class Subject:
    """A process that measures as many frames as it is told, in the protocol of tests/pace.cpp."""

    def __init__(self, command: list[str]) -> None:
        self._program = command[0]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.opened = self._answer()
        self.times: list[float] = []
        self.last: dict[str, Any] = {}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._program} ended with status {self._process.wait()}")  # it has said why
        return dict(json.loads(line))

    def measure(self, frames: int) -> None:
        """Measure some frames, which are added to `times`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{frames}\n")
        self._process.stdin.flush()
        self.last = self._answer()
        self.times += self.last["ms"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def facts(self) -> dict[str, Any]:
        """Return medians and quartiles in ms, and the largest resident memory in MB."""
        quartiles = statistics.quantiles(self.times)
        numbers = {
            **self.opened,
            "frame_ms": statistics.median(self.times),
            "least_ms": min(self.times),
            "peak_mb": self.last["peak_mb"],
        }
        rounded: dict[str, Any] = {name: round(value, 2) for name, value in numbers.items()}
        return {**rounded, "frame_ms_quartiles": [round(quartiles[0], 2), round(quartiles[2], 2)]}


def answer_in_python(bundle: Path, backend: str, picture: Path, side: int, threads: int) -> None:
    """Do in Python what tests/pace.cpp does in C++."""
    from glip_deploy import Detector, load_image

    pixels = load_image(picture)
    start = time.perf_counter()
    detector = Detector.open(bundle, backend=backend, shortest_side=side, threads=threads, cache_dir=None)
    opened = 1000 * (time.perf_counter() - start)
    start = time.perf_counter()
    prompt = detector.encode(PROMPT)
    encoded = 1000 * (time.perf_counter() - start)
    print(json.dumps({"open_ms": opened, "encode_ms": encoded}), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            found = detector.detect(pixels, prompt, THRESHOLD, color="rgb")
            times.append(1000 * (time.perf_counter() - start))
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(row.split()[1]) / 1024 for row in status if row.startswith("VmHWM"))
        print(json.dumps({"ms": times, "found": len(found), "peak_mb": peak}), flush=True)
    detector.close()


@contextlib.contextmanager
def subjects(args: argparse.Namespace) -> Iterator[dict[str, Subject]]:
    """Start the subjects, one after the other, and end them."""
    from glip_deploy import load_image

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file, pixels = Path(folder) / "picture.ppm", load_image(args.picture)
        file.write_bytes(b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes())
        numbers = [str(args.side), str(args.threads)]
        python = [sys.executable, __file__, str(args.bundle), "--picture", str(file), "--side", numbers[0]]
        commands = {
            "C++, OpenVINO": [str(args.program), str(args.bundle), PROMPT, str(file), *numbers],
            "Python, OpenVINO": [*python, "--threads", numbers[1], "--answer", "openvino"],
            "Python, ONNX Runtime": [*python, "--threads", numbers[1], "--answer", "onnxruntime"],
        }
        started = {}
        for name, command in commands.items():
            started[name] = Subject(command)
            stack.callback(started[name].close)
        yield started


def main() -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "runtime" / "glip_pace")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--side", type=int, default=224, help="pixels of the shortest side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--frames", type=int, default=5, help="of each in a round")
    parser.add_argument("--json", type=Path, help="write the result")
    parser.add_argument("--answer", metavar="BACKEND", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        answer_in_python(args.bundle, args.answer, args.picture, args.side, args.threads)
        return 0
    with subjects(args) as measured:
        for subject in measured.values():
            subject.measure(WARM_UP)
            subject.times.clear()
        for _ in range(args.rounds):
            for subject in measured.values():
                subject.measure(args.frames)
    boxes = {name: subject.last["found"] for name, subject in measured.items()}
    if len(set(boxes.values())) > 1:
        raise SystemExit(f"the numbers of boxes differ: {boxes}")

    from glip_bench.machine.host import describe_machine, versions

    from glip_deploy import load_image
    from glip_deploy.frames.geometry import network_size

    height, width = load_image(args.picture).shape[:2]
    options = f"--side {args.side} --threads {args.threads} --rounds {args.rounds} --frames {args.frames}"
    facts = {
        "what": "C++ and Python",
        "command": f"python benchmarks/runtime/compare.py {args.bundle.name} {options}",
        "machine": describe_machine(),
        "versions": versions(),
        "prompt": PROMPT,
        "picture": {"height": height, "width": width, "network": network_size(height, width, args.side, 1333)},
        "threads": args.threads,
        "frames": args.rounds * args.frames,
        "boxes": next(iter(boxes.values())),
        "subjects": {name: subject.facts() for name, subject in measured.items()},
    }
    print(json.dumps(facts, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
