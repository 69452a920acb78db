r"""Build a bundle's engines for every target tensorrt-rtx has and in both forms; report times, sizes and memory.

    python benchmarks/kernels/build_matrix.py build/demo/glip_t --output benchmarks/results/glip_t-engines.json

Needs no GPU. Every build is a `glip-build` of its own, so the figures are what a user sees; the engines are deleted.
The file is written after every build, and builds it already holds are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / room) for room in ("export", "engines", "benchmarks"))]

from glip_bench.machine.host import describe_machine  # noqa: E402
from glip_bench.reporting.results import write_result  # noqa: E402

from glip_deploy.bundle.engines import ENGINES, EngineRecord  # noqa: E402
from glip_deploy.bundle.manifest import MANIFEST  # noqa: E402
from glip_deploy.errors import GlipError, OptionError  # noqa: E402
from glip_deploy.files import check_file, sha256_of  # noqa: E402
from kernels.processes import run_measured  # noqa: E402

ARCHES = ("SM75", "SM80", "SM86", "SM89", "SM120")
FORMS = ("native", "plugin")
FIXED = ("--size", "800x1344", "--tokens", "16")
OTHERS: dict[str, tuple[str, ...]] = {
    "bf16": (*FIXED, "--precision", "bf16"),
    "fp32": (*FIXED, "--precision", "fp32"),
    "five prompt lengths": ("--size", "800x1344", "--tokens", "16,32,64,128,256"),
    "every canvas and prompt length": (),
}
"""Beside the fp16 engines of one canvas and one prompt length, for SM80."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status, which is 1 if a build failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--arch", nargs="+", default=list(ARCHES), metavar="SM", help=f"default: {' '.join(ARCHES)}")
    parser.add_argument("--others", action="store_true", help=f"also {', '.join(OTHERS)}")
    parser.add_argument("--limit", type=float, default=1800, metavar="S", help="seconds for one build (default 1800)")
    parser.add_argument("--output", type=Path, required=True, metavar="JSON")
    args = parser.parse_args(argv)
    jobs: list[tuple[str, str, str, tuple[str, ...]]]
    jobs = [(arch, form, "fp16", FIXED) for arch in args.arch for form in FORMS]
    if args.others:
        jobs += [("SM80", form, name, options) for name, options in OTHERS.items() for form in FORMS]
    try:
        report = _open(args.output, args.bundle)
        failed = 0
        for arch, form, name, options in jobs:
            key = f"{arch}, {form}, {name}"
            if "seconds" not in report["builds"].get(key, {}):
                report["builds"][key] = build(args.bundle, arch, form, options, args.limit)
                write_result(args.output, report)
            row = report["builds"][key]
            failed += "error" in row
            print(f"{key}: {row}", flush=True)
    except GlipError as error:
        print(f"build_matrix.py: error: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


def build(bundle: Path, arch: str, form: str, options: Sequence[str], limit: float) -> dict[str, Any]:
    """Run one glip-build; return its seconds, megabytes and peak memory, or how it failed."""
    name = f"matrix-{os.getpid()}"
    command = ["-m", "glip_engines.cli", "--flavor", "tensorrt-rtx", "--arch", arch, "--form", form, *options]
    folder = bundle / ENGINES / name
    try:
        done = run_measured([sys.executable, *command, "--name", name, "--quiet", str(bundle)], limit)
        if done.status is None:
            return {"error": f"not done after {limit:.0f} s"}
        if done.status:
            return {"error": done.said.strip()}
        record = EngineRecord.read(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = {file.removesuffix(".plan"): engine for file, engine in record.engines.items()}
    return {
        "version": record.version,
        "seconds": {graph: engine.seconds for graph, engine in rows.items()},
        "megabytes": {graph: round(engine.size / 1e6, 1) for graph, engine in rows.items()},
        "peak_gigabytes": round(done.peak_bytes / 1e9, 2),
    }


def _open(output: Path, bundle: Path) -> dict[str, Any]:
    """Return the report so far, or an empty one.

    Raises:
        OptionError: not a bundle; an output of another bundle, or one that is not a report.
        OutputError: the output cannot be written.
    """
    check_file(output)
    if not (bundle / MANIFEST).is_file():
        raise OptionError(f"{bundle} is not a bundle; make one with glip-export")
    digest = sha256_of(bundle / MANIFEST)
    if not output.exists():
        return {"machine": describe_machine(), "bundle": bundle.name, "manifest_sha256": digest, "builds": {}}
    try:
        report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        known = report["manifest_sha256"]
    except (ValueError, KeyError, TypeError):
        raise OptionError(f"{output} is not a report of this program; name another --output") from None
    if known != digest:
        raise OptionError(f"{output} is about another bundle than {bundle}; name another --output")
    return report


if __name__ == "__main__":
    sys.exit(main())
