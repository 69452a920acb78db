"""Fuzz every area for a time, from a seed, and print what was tried and found.

    python tests/fuzz/campaign.py                          ten seconds an area, seed 0
    python tests/fuzz/campaign.py --seconds 60 --seed 7 prompts videos
    python tests/fuzz/campaign.py --atheris prompts        inputs guided by coverage (pip install atheris)
    python tests/fuzz/campaign.py --replay                 every kept case again

Each area runs in a process of its own, so that a crash of a native library is found as well. The input of a fault is
kept under tests/fuzz/cases/AREA, where the tests run it from then on. Exit status 1 if there was one.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tests")]

from areas import AREAS, Area, check_message  # noqa: E402

from glip_deploy.errors import GlipError  # noqa: E402

CASES = HERE / "cases"
SLOW = 20.0
"""Seconds of CPU: an input that takes longer is a fault."""
MEMORY = 12 * 2**30
"""Bytes of address space: an input that asks for more is a fault."""


def kept_cases(name: str) -> list[Path]:
    """Return the kept inputs of an area."""
    return sorted((CASES / name.replace(" ", "_")).glob("*"))


def try_one(area: Area, data: bytes) -> str:
    """Run one input; return "accepted" or "refused".

    Raises:
        Exception: the input found a fault.
    """
    began = time.process_time()
    try:
        area.run(data)
        outcome = "accepted"
    except GlipError as error:
        check_message(error, area.folder)
        outcome = "refused"
    spent = time.process_time() - began
    assert spent < SLOW, f"took {spent:.1f} s of CPU"
    return outcome


def keep(name: str, data: bytes) -> Path:
    """Write the input of a fault beside the tests."""
    folder = CASES / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:12]
    path.write_bytes(data)
    return path


def work(name: str, bundle: Path, folder: Path, seed: int, seconds: float, most: int | None) -> dict[str, Any]:
    """Run an area in this process; faults are kept and counted."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    area, draw, current = AREAS[name](bundle, folder), random.Random(f"{name} {seed}"), folder / "current"
    found: dict[str, Any] = {"accepted": 0, "refused": 0, "faults": []}
    began = time.monotonic()
    while time.monotonic() - began < seconds and (most is None or found["accepted"] + found["refused"] < most):
        data = area.make(draw)
        current.write_bytes(data)
        try:
            found[try_one(area, data)] += 1
        except Exception:
            if len(found["faults"]) < 20:
                lines = traceback.format_exc().strip().splitlines()
                found["faults"].append([str(keep(name, data)), [line.strip()[:300] for line in lines[-7:]]])
    return found


def guided(name: str, bundle: Path, folder: Path, seed: int, seconds: float) -> None:
    """Run an area under atheris, which searches for inputs that reach new code; it ends the process itself."""
    import atheris

    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["glip_deploy", "glip_export"]):
        area = AREAS[name](bundle, folder)
    corpus, draw = folder / "corpus", random.Random(seed)
    corpus.mkdir()
    for i in range(50):
        (corpus / str(i)).write_bytes(area.make(draw))

    def one(data: bytes) -> None:
        try:
            try_one(area, data)
        except Exception:
            keep(name, data)
            raise

    options = [f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", "-timeout=30", "-rss_limit_mb=8192"]
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={folder}/", *options], one)
    atheris.Fuzz()


def tiny_bundle(folder: Path) -> Path:
    """Export a tiny bundle."""
    from glip_export.bundle_writer import export_bundle
    from tiny_glip import write_tiny

    export_bundle(write_tiny(folder / "tiny.pth"), folder / "bundle")
    return folder / "bundle"


def run_area(name: str, bundle: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run an area in a child; its death is a fault of the input it last wrote down."""
    with tempfile.TemporaryDirectory(prefix="glip-fuzz-") as scratch:
        mode = "--atheris" if args.atheris else "--worker"
        command = [sys.executable, str(HERE / "campaign.py"), mode, name, "--bundle", str(bundle), "--folder", scratch]
        command += ["--seconds", str(args.seconds), "--seed", str(args.seed)]
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if args.atheris:
            runs = re.findall(r"^Done (\d+) runs", child.stderr, re.MULTILINE)
            lines = [line.strip()[:300] for line in child.stderr.strip().splitlines()[-12:]]
            faults = [] if child.returncode == 0 else [["kept beside the others", lines]]
            return {"accepted": 0, "refused": 0, "guided": int(runs[0]) if runs else 0, "faults": faults}
        try:
            return dict(json.loads(child.stdout.splitlines()[-1]))
        except (ValueError, IndexError):
            how = f"died ({signal.Signals(-child.returncode).name if child.returncode < 0 else child.returncode})"
            current = Path(scratch) / "current"
            case = str(keep(name, current.read_bytes())) if current.is_file() else "no input"
            lines = [line.strip()[:300] for line in child.stderr.strip().splitlines()[-12:]]
            return {"accepted": 0, "refused": 0, "faults": [[case, [how, *lines]]]}


def replay(bundle: Path) -> dict[str, dict[str, Any]]:
    """Run every kept case again, in this process."""
    results = {}
    for name, kind in AREAS.items():
        found: dict[str, Any] = {"accepted": 0, "refused": 0, "faults": []}
        with tempfile.TemporaryDirectory(prefix="glip-fuzz-") as scratch:
            area = kind(bundle, Path(scratch))
            for case in kept_cases(name):
                try:
                    found[try_one(area, case.read_bytes())] += 1
                except Exception as error:
                    found["faults"].append([str(case), [repr(error)[:300]]])
        results[name] = found
    return results


def main() -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", help=", ".join(AREAS))
    parser.add_argument("--seconds", type=float, default=10.0, help="for each area")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path, help="of a tiny GLIP; exported first where it is not given")
    parser.add_argument("--atheris", action="store_true", help="let coverage guide the inputs")
    parser.add_argument("--replay", action="store_true", help="run the kept cases")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    faulthandler.enable()
    unknown = [name for name in args.areas if name not in AREAS]
    if unknown:
        parser.error(f"{unknown[0]} is no area; there are {', '.join(AREAS)}")
    if args.folder is not None and args.atheris:
        guided(args.areas[0], args.bundle, args.folder, args.seed, args.seconds)
        return 0
    if args.worker:
        print(json.dumps(work(args.areas[0], args.bundle, args.folder, args.seed, args.seconds, None)))
        return 0
    with tempfile.TemporaryDirectory(prefix="glip-fuzz-") as scratch:
        bundle = args.bundle or tiny_bundle(Path(scratch))
        if args.replay:
            results = replay(bundle)
        else:
            results = {}
            for name in args.areas or AREAS:
                results[name] = run_area(name, bundle, args)
                print(f"[{name}: {len(results[name]['faults'])} faults]", file=sys.stderr, flush=True)
    print(f"{'area':<18}{'inputs':>9}{'accepted':>10}{'refused':>9}{'faults':>8}")
    total = 0
    for name, found in results.items():
        tried = found["accepted"] + found["refused"] + found.get("guided", 0) + len(found["faults"])
        total += tried
        print(f"{name:<18}{tried:>9}{found['accepted']:>10}{found['refused']:>9}{len(found['faults']):>8}")
    faults = [fault for found in results.values() for fault in found["faults"]]
    print(f"{total} inputs, {len(faults)} faults; seed {args.seed}")
    for case, lines in faults:
        print(f"\n{os.path.relpath(case, ROOT) if case.startswith('/') else case}")
        print("\n".join(f"    {line}" for line in lines))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
