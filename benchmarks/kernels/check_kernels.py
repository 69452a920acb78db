r"""Check and time the deformable convolution's CUDA kernels on the GPU at hand, and GLIP in fp16 torch with them.

    python benchmarks/kernels/check_kernels.py --output benchmarks/results/glip_t-kernels-h200.json
    python benchmarks/kernels/check_kernels.py --output checked.json --bundle glip_t/   # and the bundle's engines
    python benchmarks/kernels/check_kernels.py --plan     # what would be checked here, and what is missing for it
    python benchmarks/kernels/check_kernels.py --floors   # the least times, of every GPU in the table

A few minutes. Builds the kernels for this GPU (nvcc), compares them with the reference outputs and with float64,
times every shape of GLIP at 800x1344 against torchvision's deform_conv2d and against the least time there is, and the
whole image branch of GLIP-T with 16 tokens in fp16: plain, with our kernels, and with our kernels as a CUDA graph.
With --bundle, engines of which `glip-build` made on this machine, also: frames of the host that the GPU resizes, in RGB
and NV12, two clones under load, a prompt changed in mid-stream, frames of PyTorch, CuPy and PyCUDA with and without
streams, ONNX Runtime's CUDA provider. The kernels run once more under compute-sanitizer. Of these, what is not
installed is left out and named.
Needs torch with CUDA and a C++ compiler; torchvision if it is to be compared. Exit status 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Runs from a checkout, also where nothing is installed but torch.
sys.path[:0] = [str(ROOT), *(str(ROOT / room) for room in ("export", "engines", "benchmarks"))]

from glip_deploy.errors import GlipError, MissingPackage, OptionError  # noqa: E402
from glip_deploy.files import check_file  # noqa: E402

FASTER_THAN_TORCHVISION, TIMES_THE_FLOOR, IMAGE_BRANCH_MS = 3.0, 2.5, 8.0
"""Aims, on an H200: the first two for P3's own call in fp16."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="JSON", help="result file, written after every part")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="a bundle with engines for this machine")
    parser.add_argument("--plan", action="store_true", help="only print what would be checked, and what is missing")
    parser.add_argument("--floors", action="store_true", help="only print the least times")
    parser.add_argument("--library", type=Path, metavar="FILE", help="a libglip_deform.so built elsewhere for this GPU")
    parser.add_argument("--runs", type=int, default=50, metavar="N", help="timed runs of each shape (50)")
    parser.add_argument("--kernels-only", action="store_true", help="leave the model out")
    args = parser.parse_args(argv)
    if args.floors:
        print(floors_as_text())
        return 0
    if args.plan:
        from kernels.engine_checks import plan

        print("\n".join(plan(args.bundle)))
        return 0
    if args.output is None:
        parser.error("name a result file with --output")
    try:
        return check(args.output, args.library, args.runs, kernels_only=args.kernels_only, bundle=args.bundle)
    except GlipError as error:
        print(f"check_kernels.py: error: {error}", file=sys.stderr)
        return 1


def floors_as_text() -> str:
    """Return the least microseconds of every shape on every GPU of the table, fp16."""
    from glip_bench.limits.hardware import HARDWARE

    from kernels.floors import LAYERS, calls, floor_of, total_floor

    rows = [("800x1344, fp16, us", "GMAC", "MB", "a layer", *HARDWARE)]
    for call in calls():
        floors = (floor_of(call, machine) for machine in HARDWARE.values())
        cells = (f"{f.seconds * 1e6:.1f} {'a' if f.arithmetic > f.bytes else 'b'}" for f in floors)
        name = f"{call.name} {call.out[0]}x{call.out[1]}, stride {call.stride}"
        rows.append((name, f"{call.macs / 1e9:.3f}", f"{call.bytes() / 1e6:.2f}", str(call.times), *cells))
    for model, layers in LAYERS.items():
        sums = (f"{layers * total_floor(calls(), machine) * 1e3:.2f} ms" for machine in HARDWARE.values())
        macs = layers * sum(call.macs * call.times for call in calls())
        size = layers * sum(call.bytes() * call.times for call in calls())
        rows.append((f"{model}, all", f"{macs / 1e9:.1f}", f"{size / 1e6:.0f}", str(13 * layers), *sums))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "", "a: the arithmetic takes longer; b: the bytes do. The last rows are sums."])


def check(
    output: Path, library_file: Path | None, runs: int, *, kernels_only: bool = False, bundle: Path | None = None
) -> int:
    """Do everything; return the exit status.

    Args:
        output: the result file.
        library_file: the kernels; None to build them.
        runs: timed runs of each shape.
        kernels_only: leave out the image branch and compute-sanitizer, which runs this program so.
        bundle: one whose engines are checked too.

    Raises:
        GlipError: no torch, no GPU, no compiler, or an output that cannot be written.
    """
    check_file(output)
    torch = require_gpu()
    from glip_bench.reporting.results import write_result

    from kernels.correctness import correctness
    from kernels.kernel import DeformLibrary
    from kernels.speed import image_branch, kernel_times

    file = library_file
    if file is None:
        from glip_engines.compile import build_library

        major, minor = torch.cuda.get_device_capability()
        file = build_library([10 * major + minor])
    elif not file.is_file():
        raise OptionError(f"--library {file} is not there; leave it out to build one")
    try:
        library = DeformLibrary(file)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"{file} cannot be loaded ({reason}); build it on this machine") from None
    result = header(torch)
    result["correct"] = correctness(library)
    write_result(output, result)
    result["kernels"] = kernel_times(library, result["gpu"]["name"], runs)
    write_result(output, result)
    result["image_branch"] = {"left_out": "--kernels-only"} if kernels_only else image_branch(library, runs)
    result["aims"] = aims(result)
    write_result(output, result)
    result["engines"] = [] if kernels_only else check_engines(bundle, file)
    write_result(output, result)
    print(as_text(result))
    return 0 if all(row["ok"] for row in (*result["correct"], *result["engines"])) else 1


def check_engines(bundle: Path | None, library: Path) -> list[dict[str, Any]]:
    """Check the backend on a bundle's engines, if one is given, and the kernels' accesses to memory."""
    from tempfile import TemporaryDirectory

    from glip_export.verify import PICTURE

    from glip_deploy import Detector, load_image
    from kernels.engine_checks import check_detector, onnxruntime_cuda, sanitizer

    rows = []
    if bundle is not None:
        picture = load_image(PICTURE)
        with Detector.open(bundle, backend="tensorrt") as detector:
            rows += [*check_detector(detector, picture), onnxruntime_cuda(bundle, detector, picture)]
    with TemporaryDirectory() as scratch:
        options = ["--output", str(Path(scratch) / "sanitized.json"), "--library", str(library), "--runs", "1"]
        rows.append(sanitizer([str(Path(__file__).resolve()), "--kernels-only", *options]))
    return rows


def require_gpu() -> ModuleType:
    """Return torch.

    Raises:
        MissingPackage: it is not installed.
        OptionError: it sees no GPU.
    """
    try:
        import torch
    except ImportError:
        raise MissingPackage("torch is not installed; pip install torch, a build with CUDA") from None
    if not torch.cuda.is_available():
        raise OptionError(f"torch {torch.__version__} sees no NVIDIA GPU here; run this on a machine with one")
    return torch


def header(torch: Any) -> dict[str, Any]:
    """Return what was measured on."""
    from glip_bench.machine.gpus import describe_gpus
    from glip_bench.machine.host import describe_machine

    gpus = [gpu.to_dict() for gpu in describe_gpus()]
    return {
        "schema": 1,
        "kind": "kernels",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "gpu": {"name": torch.cuda.get_device_name(), **(gpus[0] if gpus else {})},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit()},
    }


def commit() -> str:
    """Return the checkout's commit, "unknown" outside of one."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def aims(result: dict[str, Any]) -> dict[str, Any]:
    """Return every aim, what was reached (None: not measured), and whether the aim is met."""
    first = result["kernels"]["shapes"][0]
    rows = {
        "P3: times faster than torchvision": (first.get("faster"), FASTER_THAN_TORCHVISION, True),
        "P3: times the floor": (first.get("times_the_floor"), TIMES_THE_FLOOR, False),
        "GLIP-T image branch, CUDA graph, ms": (
            result["image_branch"].get("graph_ms", {}).get("median"),
            IMAGE_BRANCH_MS,
            False,
        ),
    }
    return {
        name: {
            "aim": aim,
            "reached": reached,
            "met": None if reached is None else (reached >= aim if more else reached <= aim),
        }
        for name, (reached, aim, more) in rows.items()
    }


def as_text(result: dict[str, Any]) -> str:
    """Return the result for a terminal."""
    from kernels.correctness import TOLERANCE

    correct = result["correct"]
    worst = {p: max(r["error"] for r in correct if r["precision"] == p) for p in {r["precision"] for r in correct}}
    errors = ", ".join(f"{p} {e:.1e} (allowed {TOLERANCE[p]:.0e})" for p, e in sorted(worst.items()))
    lines = [
        f"{result['gpu']['name']}, torch {result['versions']['torch']}",
        f"{sum(r['ok'] for r in correct)} of {len(correct)} cases right; largest errors: {errors}",
        *(f"WRONG: {r['case']}, {r['precision']}: {r['error']:.2e}" for r in correct if not r["ok"]),
        "",
        f"{'us, fp16':<22}{'ours':>9}{'NCHW':>9}{'torchvision':>13}{'faster':>8}{'floor':>9}{'x floor':>9}",
    ]
    for row in result["kernels"]["shapes"]:
        floor = max(row["floor_us"].values()) if "floor_us" in row else None
        cells = (
            f"{row['ours_us']['median']:>9.1f}{row['ours_nchw_us']['median']:>9.1f}",
            f"{row['torchvision_us']['median']:>13.1f}{row['faster']:>8.1f}" if "faster" in row else " " * 21,
            f"{floor:>9.1f}{row['times_the_floor']:>9.1f}" if floor else "",
        )
        lines.append(f"{row['name'] + ', stride ' + str(row['stride']):<22}" + "".join(cells))
    lines.append(f"five levels, one launch{result['kernels']['five_levels_in_one_launch_us']['median']:>8.1f}")
    lines.append(f"torchvision: {result['kernels']['torchvision']}")
    if result["kernels"].get("no_floor"):
        lines.append(f"floor: {result['kernels']['no_floor']}")
    model = result["image_branch"]
    if "graph_ms" in model:
        lines += ["", "GLIP-T image branch, 800x1344, 16 tokens, fp16, ms"]
        for key, title in (
            ("eager_torchvision_ms", "eager, torchvision's kernel"),
            ("eager_ms", "eager, our kernel"),
            ("graph_ms", "CUDA graph, our kernel"),
        ):
            if key in model:
                lines.append(f"  {title:<32}{model[key]['median']:>8.2f}")
        lines += [f"    {name:<30}{stage['all']:>8.2f}" for name, stage in model["stages_ms"].items()]
        errors = ", ".join(f"{name} {value:.1e}" for name, value in model["error_against_fp32"].items())
        lines.append(f"  mean relative error against fp32: {errors}")
    for row in result.get("engines", []):
        how = row.get("left_out") or row.get("error") or f"{row.get('distance', 0):.2f} of what is allowed"
        lines.append(f"{row['case']}: {'' if row['ok'] else 'WRONG: '}{how}")
    lines.append("")
    for name, aim in result["aims"].items():
        reached = "not measured" if aim["reached"] is None else f"{aim['reached']:.2f}"
        lines.append(
            f"{name}: {reached}, aim {aim['aim']:g}"
            + ("" if aim["met"] is None else (", met" if aim["met"] else ", NOT met"))
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
