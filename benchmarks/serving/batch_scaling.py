"""Measure how glip-batch scales with its workers.

python benchmarks/serving/batch_scaling.py build/demo/glip_nano --json scaling.json

Every form is run on a few pictures and on many, as a command of its own each time, all forms in turn. What the second
takes longer than the first is for the pictures that it has more, without the start of Python, Ray and the bundle; the
rest is the start. Results of all forms are compared: they must be the same detections.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "examples" / "nano" / "media" / "scene.jpg"
PROMPT = "dog. red apple. bicycle. guitar. penguin. sunflower. bus. traffic light. backpack"


@dataclass(frozen=True)
class Form:
    """A way to run glip-batch."""

    name: str
    options: tuple[str, ...]


FORMS = (
    Form("1 worker, 1 thread", ("--workers", "1", "--threads", "1")),
    Form("1 worker, 2 threads", ("--workers", "1", "--threads", "2")),
    Form("1 worker, 1 thread, on Ray", ("--workers", "1", "--threads", "1", "--ray", "local")),
    Form("2 workers, 1 thread each, on Ray", ("--workers", "2", "--threads", "1")),
)


@dataclass(frozen=True)
class Speed:
    """What a form did; seconds are medians."""

    form: str
    few_seconds: float
    many_seconds: float
    pictures_a_second: float
    start_seconds: float


def run(bundle: Path, pictures: Path, output: Path, side: int, form: Form) -> float:
    """Run a form into a folder that is not there; return the seconds of the whole command."""
    where = ["--model", str(bundle), "--source", str(pictures), "--output", str(output), "--quiet"]
    command = [sys.executable, "-m", "glip_deploy.cli.batch", *where, "--prompt", PROMPT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    began = time.perf_counter()
    subprocess.run([*command, "--shortest-side", str(side), *form.options], check=True, env=environment)
    return time.perf_counter() - began


def scores_of(output: Path) -> list[list[tuple[str, float]]]:
    """Return label and score, with five digits, of every detection by picture."""
    from pyarrow import parquet

    rows = parquet.read_table(output / "detections.parquet").to_pylist()
    return [[(one["label"], round(one["score"], 5)) for one in row["detections"]] for row in rows]


def measure(bundle: Path, few: int, many: int, runs: int, side: int) -> list[Speed]:
    """Run all forms in turn.

    Raises:
        SystemExit: two forms found something else.
    """
    seconds: dict[tuple[Form, int], list[float]] = {(form, count): [] for form in FORMS for count in (few, many)}
    found: dict[int, list[list[tuple[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for count in (few, many):
            folder = Path(temporary) / str(count)
            folder.mkdir()
            for number in range(count):
                shutil.copy(PICTURE, folder / f"{number}.jpg")
        for _ in range(runs):
            for (form, count), taken in seconds.items():
                output = Path(temporary) / "out"
                taken.append(run(bundle, Path(temporary) / str(count), output, side, form))
                scores = scores_of(output)
                if found.setdefault(count, scores) != scores:
                    raise SystemExit(f"{form.name} found something else than {FORMS[0].name}")
                shutil.rmtree(output)
    speeds = []
    for form in FORMS:
        short, long = statistics.median(seconds[form, few]), statistics.median(seconds[form, many])
        rate = (many - few) / (long - short)
        speeds.append(Speed(form.name, round(short, 2), round(long, 2), round(rate, 2), round(short - few / rate, 2)))
    return speeds


def main() -> None:
    """Measure, print a table, and write the result."""
    from glip_bench.machine.host import describe_machine, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--few", type=int, default=16, help="pictures of the short run (default 16)")
    parser.add_argument("--many", type=int, default=400, help="pictures of the long run (default 400)")
    parser.add_argument("--runs", type=int, default=3, help="of each form and length (default 3)")
    parser.add_argument("--side", type=int, default=224, help="shortest side (default 224, that of GLIP-nano)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    speeds = measure(options.bundle.resolve(), options.few, options.many, options.runs, options.side)
    for one in speeds:
        print(f"{one.form:34} {one.pictures_a_second:7.2f} pictures a second, {one.start_seconds:6.2f} s to start")
    import ray

    result: dict[str, Any] = {
        "what": "scaling of glip-batch",
        "command": f"python benchmarks/serving/batch_scaling.py {options.bundle.name} --few {options.few}"
        f" --many {options.many} --runs {options.runs} --side {options.side}",
        "machine": describe_machine(),
        "versions": {**versions(), "ray": ray.__version__},
        "speeds": [asdict(one) for one in speeds],
        "two_workers_over_one": round(speeds[3].pictures_a_second / speeds[2].pictures_a_second, 3),
        "two_workers_over_one_with_two_threads": round(speeds[3].pictures_a_second / speeds[1].pictures_a_second, 3),
    }
    print(f"two workers over one, one thread each: {result['two_workers_over_one']}")
    print(f"two workers over one with two threads: {result['two_workers_over_one_with_two_threads']}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
