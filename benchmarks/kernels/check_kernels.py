r"""Check and time the deformable convolution's CUDA kernels on the GPU at hand, and GLIP in fp16 torch with them.

    python benchmarks/kernels/check_kernels.py --output benchmarks/results/glip_t-kernels-h200.json
    python benchmarks/kernels/check_kernels.py --floors   # the least times, of every GPU in the table

A few minutes. Builds the kernels for this GPU (nvcc), holds them against the reference outputs and against float64,
times every shape of GLIP at 800x1344 against torchvision's deform_conv2d and against the least time there is, and the
whole image branch of GLIP-T with 16 tokens in fp16: plain, with our kernels, and with our kernels as a CUDA graph.
Needs torch with CUDA and a C++ compiler; torchvision if it is to be compared. Exit status 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
# Runs from a checkout, also where nothing is installed but torch.
sys.path[:0] = [
    str(path) for path in (Path(__file__).parent, ROOT, *(ROOT / p for p in ("export", "engines", "benchmarks")))
]

from glip_deploy.errors import GlipError, OptionError  # noqa: E402

if TYPE_CHECKING:
    from kernel import DeformLibrary

TOLERANCE = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 1.6e-2}
"""Largest error over the largest value: sums of 2304 products, rounded once for fp16 and bf16."""
CASES = [
    ([(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)], 256, 256, 1, 1, 2.0),
    ([(100, 168), (50, 84), (25, 42), (13, 21)], 256, 256, 1, 2, 2.0),
    ([(25, 42), (13, 21)], 256, 256, 3, 1, 30.0),
    ([(9, 7), (1, 1), (2, 33)], 24, 40, 2, 1, 3.0),
    ([(9, 7), (3, 64)], 16, 8, 2, 2, 3.0),
]
"""Against float64: sizes of the levels, channels in and out, batch, stride, spread of the offsets."""
FASTER_THAN_TORCHVISION, TIMES_THE_FLOOR, IMAGE_BRANCH_MS = 3.0, 2.5, 8.0
"""Aims, on an H200: the first two for P3's own call in fp16."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="JSON", help="result file, written after every part")
    parser.add_argument("--floors", action="store_true", help="only print the least times")
    parser.add_argument("--library", type=Path, metavar="FILE", help="a libglip_deform.so built elsewhere for this GPU")
    parser.add_argument("--runs", type=int, default=50, metavar="N", help="timed runs of each shape (50)")
    parser.add_argument("--kernels-only", action="store_true", help="leave the model out")
    args = parser.parse_args(argv)
    if args.floors:
        print(floors_as_text())
        return 0
    if args.output is None:
        parser.error("name a result file with --output")
    try:
        return check(args)
    except GlipError as error:
        print(f"check_kernels.py: error: {error}", file=sys.stderr)
        return 1


def floors_as_text() -> str:
    """Return the least microseconds of every shape on every GPU of the table, fp16."""
    from floors import LAYERS, calls, floor_of, total_floor
    from glip_bench.limits.hardware import HARDWARE

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


def check(args: argparse.Namespace) -> int:
    """Do everything; returns the exit status.

    Raises:
        GlipError: no torch, no GPU, no compiler, or an output that cannot be written.
    """
    from glip_bench.reporting.results import write_result

    from glip_deploy.files import check_file

    check_file(args.output)
    torch = require_gpu()
    from kernel import DeformLibrary

    major, minor = torch.cuda.get_device_capability()
    if args.library is None:
        from glip_engines.compile import build_library

        file = build_library([10 * major + minor])
    else:
        file = args.library
        if not file.is_file():
            raise GlipError(f"--library {file} is not there; leave it out to build one")
    try:
        library = DeformLibrary(file)
    except OSError as error:
        raise GlipError(f"{file} cannot be loaded ({str(error).splitlines()[0]}); build it on this machine") from None
    result = header(torch)
    wrong = []
    for title, part in (
        ("correct", lambda: correctness(torch, library)),
        ("kernels", lambda: kernel_times(torch, library, result["gpu"]["name"], args.runs)),
        ("image_branch", lambda: image_branch(torch, library, args.runs)),
    ):
        if title == "image_branch" and args.kernels_only:
            result[title] = {"left_out": "--kernels-only"}
            continue
        result[title] = part()
        write_result(args.output, result)
    wrong = [row for row in result["correct"] if not row["ok"]]
    result["aims"] = aims(result)
    write_result(args.output, result)
    print(as_text(result))
    return 1 if wrong else 0


def require_gpu() -> Any:
    """Return torch.

    Raises:
        GlipError: not installed, or it sees no GPU.
    """
    try:
        import torch
    except ImportError:
        raise GlipError("torch is not installed; pip install torch, a build with CUDA") from None
    if not torch.cuda.is_available():
        raise GlipError(f"torch {torch.__version__} sees no NVIDIA GPU here; run this on a machine with one")
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


# -- right? ---------------------------------------------------------------------------------------------------------


def correctness(torch: Any, library: DeformLibrary) -> list[dict[str, Any]]:
    """Hold the kernels against the official code's outputs, and against float64 on random inputs."""
    rows = goldens(torch, library)
    generator = torch.Generator().manual_seed(0)
    for sizes, inner, outer, batch, stride, spread in CASES:
        for precision, dtype in precisions(torch).items():
            for last in (False, True):
                error = against_double(
                    torch, library, generator, sizes, (inner, outer), batch, stride, spread, dtype, last
                )
                name = f"{len(sizes)} levels from {sizes[0][0]}x{sizes[0][1]}, {inner} to {outer}, batch {batch}"
                layout = "NHWC" if last else "NCHW"
                rows.append(
                    {
                        "case": f"{name}, stride {stride}, offsets of {spread:g}, {layout}",
                        "precision": precision,
                        "error": error,
                        "ok": error <= TOLERANCE[precision],
                    }
                )
    rows.append(in_a_graph(torch, library, generator))
    return rows


def precisions(torch: Any) -> dict[str, Any]:
    """Return torch's types by name; bf16 from Ampere on."""
    found = {"fp32": torch.float32, "fp16": torch.float16}
    if torch.cuda.get_device_capability()[0] >= 8:
        found["bf16"] = torch.bfloat16
    return found


def goldens(torch: Any, library: DeformLibrary) -> list[dict[str, Any]]:
    """Run the official code's own cases, flat offset maps among them."""
    import numpy as np
    from kernel import MapLevel

    with np.load(ROOT / "tests" / "data" / "goldens" / "unit_dcn.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    rows = []
    for case in json.loads(str(arrays["meta"])):
        name = case["name"]
        x, positions, weight, bias, out = (
            torch.from_numpy(arrays[f"{name}_{part}"]).cuda() for part in ("x", "offset_mask", "weight", "bias", "out")
        )
        level = MapLevel(
            x.contiguous(),
            positions[:, :18].contiguous(),
            positions[:, 18:].sigmoid().contiguous(),
            tuple(out.shape[2:]),
        )
        (ours,) = library.run(library.pack(weight, bias, case["stride"]), [level])
        error = float((ours - out).abs().max() / out.abs().max())
        rows.append({"case": f"golden {name}", "precision": "fp32", "error": error, "ok": error <= TOLERANCE["fp32"]})
    return rows


def random_levels(
    torch: Any, generator: Any, sizes: Sequence[tuple[int, int]], channels: int, batch: int, stride: int, spread: float
) -> list[Any]:
    """Return made-up maps with fp32 offsets and masks, in fp32, on the GPU."""
    from kernel import MapLevel

    def noise(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).cuda()

    rows = []
    for height, width in sizes:
        out = (-(-height // stride), -(-width // stride))
        offset, mask = spread * noise(batch, 18, *out), noise(batch, 9, *out).sigmoid()
        rows.append(MapLevel(noise(batch, channels, height, width), offset, mask, out))
    return rows


def against_double(
    torch: Any,
    library: DeformLibrary,
    generator: Any,
    sizes: Sequence[tuple[int, int]],
    channels: tuple[int, int],
    batch: int,
    stride: int,
    spread: float,
    dtype: Any,
    channels_last: bool,
) -> float:
    """Return the largest error over the largest value, all levels in one launch."""
    from dataclasses import replace

    from glip_export.model.deform import deform_conv2d

    levels = random_levels(torch, generator, sizes, channels[0], batch, stride, spread)
    form = torch.channels_last if channels_last else torch.contiguous_format
    levels = [replace(level, x=level.x.to(dtype).contiguous(memory_format=form)) for level in levels]
    weight = (
        (torch.randn(channels[1], channels[0], 3, 3, generator=generator) / (9 * channels[0]) ** 0.5).cuda().to(dtype)
    )
    bias = torch.randn(channels[1], generator=generator).cuda().to(dtype)
    found = library.run(library.pack(weight, bias, stride), levels, channels_last)
    worst = 0.0
    for level, ours in zip(levels, found, strict=True):
        tensors = (level.x, level.offset, level.mask, weight, bias)
        exact = deform_conv2d(*(tensor.double() for tensor in tensors), stride)
        worst = max(worst, float((ours.double() - exact).abs().max() / exact.abs().max()))
    return worst


def in_a_graph(torch: Any, library: DeformLibrary, generator: Any) -> dict[str, Any]:
    """Capture a launch of five levels; replay it on other features."""
    levels = random_levels(torch, generator, [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)], 256, 1, 1, 2.0)
    weight, bias = torch.randn(256, 256, 3, 3, generator=generator).cuda(), torch.zeros(256).cuda()
    weights = library.pack(weight, bias)
    found, replay = captured(torch, lambda: library.run(weights, levels))
    for level in levels:
        level.x.mul_(-2.0)
    expected = library.run(weights, levels)
    replay()
    torch.cuda.synchronize()
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return {"case": "in a CUDA graph, replayed", "precision": "fp32", "error": 0.0 if same else 1.0, "ok": same}


def captured(torch: Any, action: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Record an action as a CUDA graph; returns its results, which a replay writes again, and the replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = action()
    return found, graph.replay


# -- fast? ----------------------------------------------------------------------------------------------------------


def kernel_times(torch: Any, library: DeformLibrary, gpu: str, runs: int) -> dict[str, Any]:
    """Time every shape of GLIP at 800x1344 in fp16, each call alone, and one layer's own five levels in one launch."""
    from dataclasses import replace

    from floors import LAYERS, calls, floor_of, total_floor
    from glip_bench.limits.hardware import hardware_of

    try:
        machine, no_floor = hardware_of(gpu), None
    except OptionError as error:
        machine, no_floor = None, str(error)
    torchvision = find_torchvision()
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(256, 256, 3, 3, generator=generator) / 48).cuda().half()
    bias = torch.zeros(256).cuda().half()
    rows = []
    layer = {"ours": 0.0, "torchvision": 0.0}
    for call in calls():
        (level,) = random_levels(torch, generator, [call.size], 256, 1, call.stride, 1.0)
        plain = replace(level, x=level.x.half())
        nhwc = replace(level, x=plain.x.contiguous(memory_format=torch.channels_last))
        weights = library.pack(weight, bias, call.stride)
        row: dict[str, Any] = {"name": call.name, "out": list(call.out), "stride": call.stride, "a_layer": call.times}
        row["ours_us"] = timed(torch, launch_of(torch, library, weights, nhwc, True), runs)
        row["ours_nchw_us"] = timed(torch, launch_of(torch, library, weights, plain, False), runs)
        if torchvision is not None:
            offset, mask = level.offset.half(), level.mask.half()

            def theirs(x: Any = plain.x, offset: Any = offset, mask: Any = mask, stride: int = call.stride) -> None:
                torchvision.ops.deform_conv2d(x, offset, weight, bias, stride=stride, padding=1, mask=mask)

            row["torchvision_us"] = timed(torch, theirs, runs)
            row["faster"] = row["torchvision_us"]["median"] / row["ours_us"]["median"]
            layer["torchvision"] += call.times * row["torchvision_us"]["median"]
        if machine is not None:
            floor = floor_of(call, machine)
            row["floor_us"] = {"arithmetic": floor.arithmetic * 1e6, "bytes": floor.bytes * 1e6}
            row["times_the_floor"] = row["ours_us"]["median"] / (floor.seconds * 1e6)
        layer["ours"] += call.times * row["ours_us"]["median"]
        rows.append(row)
    levels = random_levels(torch, generator, [call.size for call in calls() if call.stride == 1], 256, 1, 1, 1.0)
    halves = [replace(v, x=v.x.half().contiguous(memory_format=torch.channels_last)) for v in levels]
    weights = library.pack(weight, bias)
    results = library.run(weights, halves, True)
    together = timed(torch, library.bind(weights, halves, results), runs)
    return {
        "shapes": rows,
        "five_levels_in_one_launch_us": together,
        "one_layer_us": {name: value for name, value in layer.items() if value},
        "floor_of_a_model_ms": None
        if machine is None
        else {name: layers * total_floor(calls(), machine) * 1e3 for name, layers in LAYERS.items()},
        "no_floor": no_floor,
        "torchvision": "not installed: not compared" if torchvision is None else str(torchvision.__version__),
    }


def launch_of(torch: Any, library: DeformLibrary, weights: Any, level: Any, channels_last: bool) -> Callable[[], None]:
    """Return one prepared launch."""
    results = library.run(weights, [level], channels_last)
    return library.bind(weights, [level], results)


def find_torchvision() -> Any:
    """Return torchvision if it has its CUDA operators, else None."""
    try:
        import torchvision
        import torchvision.ops
    except (ImportError, RuntimeError):
        return None
    return torchvision


def timed(torch: Any, action: Callable[[], Any], runs: int) -> dict[str, float]:
    """Time an action on the GPU, its data out of the L2 cache before every run; microseconds."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        action()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        action()
        end.record()
    torch.cuda.synchronize()
    return summary([start.elapsed_time(end) * 1e3 for start, end in pairs])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum, maximum and 95th percentile."""
    ranked = sorted(values)
    return {
        "median": statistics.median(ranked),
        "minimum": ranked[0],
        "maximum": ranked[-1],
        "p95": ranked[min(len(ranked) - 1, round(0.95 * (len(ranked) - 1)))],
    }


# -- the model ------------------------------------------------------------------------------------------------------


def image_branch(torch: Any, library: DeformLibrary, runs: int) -> dict[str, Any]:
    """Time GLIP-T's image branch at 800x1344 with 16 tokens in fp16, and hold it against fp32."""
    from half_model import HalfImageBranch, Inputs, relative_error, stages
    from kernel import use_kernel, with_library

    glip = stand_in(torch)
    glip.cuda()
    with torch.inference_mode():
        inputs = Inputs.random(glip, 800, 1344, 16, "cuda")
        reference_branch = glip.predict(normalised(glip, inputs), inputs.embedding, inputs.mask)
        result: dict[str, Any] = {"canvas": [800, 1344], "tokens": 16, "classes": 5, "precision": "fp16"}
        torchvision = find_torchvision()
        if torchvision is not None:
            theirs = HalfImageBranch(stand_in(torch, deform_by(torchvision)).cuda())
            result["eager_torchvision_ms"] = milliseconds(torch, lambda: theirs(inputs), max(5, runs // 5))
            del theirs
        branch = HalfImageBranch(glip)
        use_kernel(glip, with_library(library))
        found = glip.predict(branch.image(inputs), inputs.embedding.half(), inputs.mask)
        result["error_against_fp32"] = relative_error(found, reference_branch)
        result["eager_ms"] = milliseconds(torch, lambda: branch(inputs), max(5, runs // 5))
        _, replay = captured(torch, lambda: branch(inputs))
        result["graph_ms"] = milliseconds(torch, replay, runs)
        result["stages_ms"] = {}
        for name, (action, times) in stages(branch, inputs).items():
            _, replay = captured(torch, action)
            one = milliseconds(torch, replay, runs)["median"]
            result["stages_ms"][name] = {"one": one, "times": times, "all": one * times}
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def stand_in(torch: Any, deform: Callable[..., Any] | None = None) -> Any:
    """Return a full-size GLIP-T with the stand-in weights; `deform` computes its deformable convolutions."""
    sys.path.insert(0, str(ROOT / "examples" / "stand_in"))
    from glip_export.checkpoints import build, derive_config
    from synth_weights import items

    manifest = str(ROOT / "examples" / "stand_in" / "manifests" / "glip_T.json")
    state = {key: torch.from_numpy(value) for key, value in items(manifest, "")}
    return build(state, derive_config(state), deform=deform)[0].eval().requires_grad_(False)


def normalised(glip: Any, inputs: Any) -> Any:
    """Return the network's input in fp32."""
    from glip_export.model.glip import normalise

    return normalise(inputs.frames, inputs.image_sizes, glip.config.input)


def deform_by(torchvision: Any) -> Callable[..., Any]:
    """Return torchvision's deformable convolution, with the arguments of `glip_export.model.deform.deform_conv2d`."""
    run = torchvision.ops.deform_conv2d

    def deform(x: Any, offset: Any, mask: Any, weight: Any, bias: Any, stride: int = 1) -> Any:
        return run(x, offset.contiguous(), weight, bias, stride=stride, padding=1, mask=mask.contiguous())

    return deform


def milliseconds(torch: Any, action: Callable[[], Any], runs: int) -> dict[str, float]:
    """Time frames one after another, as a video has them; milliseconds."""
    for _ in range(3):
        action()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in pairs:
        start.record()
        action()
        end.record()
    torch.cuda.synchronize()
    return summary([start.elapsed_time(end) for start, end in pairs])


# -- said -----------------------------------------------------------------------------------------------------------


def aims(result: dict[str, Any]) -> dict[str, Any]:
    """Return what was aimed at, what was reached (None: not measured), and whether that will do."""
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
