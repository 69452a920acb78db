"""Run the C++ runtime for many thousands of frames, and see whether memory, descriptors or threads grow.

python benchmarks/robustness/soak_cpp.py build/demo/glip_nano --frames 10000 --json soak-cpp.json

`make cpp` builds what it drives, `build/runtime/glip_soak`: prompts (long lists among them), pictures, batches and
clones change all the time, from a fixed seed, on OpenVINO. For the first half detectors are opened and closed, and the
process is looked at while none is open; for the second half one detector stays open. What may grow is what the soak
test of Python allows, `soak.py` beside this, in each half. Exit status 1 if something grows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from soak import Sample, verdict

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "runtime" / "glip_soak")
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1.0, help="MB per 1,000 frames")
    parser.add_argument("--json", type=Path, help="write samples and verdict")
    args = parser.parse_args()
    samples: dict[str, list[Sample]] = {"closed": [], "open": []}
    with tempfile.TemporaryDirectory() as cache:
        numbers = (args.frames, max(1, args.frames // 80), args.seed)
        command = [str(part) for part in (args.program, args.bundle, cache, *numbers)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                facts = json.loads(line)
                when = facts.pop("when")
                facts["frames"] -= args.frames // 2 if when == "open" else 0  # each half has a warm-up of its own
                samples[when].append(Sample(**facts))
        if process.returncode:
            return process.returncode
    found = {when: verdict(some, args.limit) for when, some in samples.items()}
    print(json.dumps(found))
    if args.json is not None:
        import openvino
        from glip_bench.machine.host import describe_machine

        result = {
            "what": "soak of the C++ runtime",
            "command": f"python benchmarks/robustness/soak_cpp.py glip_nano --frames {args.frames} --seed {args.seed}",
            "machine": describe_machine(),
            "openvino": openvino.__version__,
            "verdict": found,
            "samples": {when: [asdict(sample) for sample in some] for when, some in samples.items()},
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(one["flat"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
