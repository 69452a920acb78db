"""glip-bench: how fast, how much memory, and where the time goes, on the machine at hand."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glip_deploy.errors import GlipError

__all__ = ["main"]

# 14 tokens, as the reference timings of the official code have.
PROMPT = "person. bicycle. car. traffic light. hair drier"

EXAMPLES = """\
examples:
  glip-bench --model glip_t/
  glip-bench --model glip_t/ --frame 1920x1080 --runs 20 --json result.json
  glip-bench --model glip_t/ --shortest-side 320 --prompt "person. dog"
  glip-bench --model glip_t/ --floor A100
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status (0 done, 1 an error with a one-line message, 2 bad usage)."""
    args = _parser().parse_args(argv)
    try:
        _check_target(args.json)
        if args.floor is not None:
            result = _floor(args)
            if args.json is not None:
                _write(args.json, result)
            print(render_floor(result))
            return 0
        from glip_bench.detection import Settings, run

        settings = Settings(
            bundle=args.model,
            picture=args.picture if args.picture is not None else _own_picture(),
            prompt=args.prompt,
            frame_size=args.frame,
            shortest_side=args.shortest_side,
            longest_side=args.longest_side or None,
            runs=args.runs,
            threads=args.threads,
        )
        result = run(settings, (lambda step: None) if args.quiet else _step)
        if args.json is not None:
            _write(args.json, result)
    except GlipError as error:
        print(f"glip-bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("glip-bench: interrupted, nothing was written", file=sys.stderr)
        return 130
    print(render(result))
    return 0


def render(result: dict[str, Any]) -> str:
    """Return a result as text for a terminal."""
    machine, shape, subject = result["machine"], result["shape"], result["subject"]
    lines = [
        f"{subject['variant']} {subject['precision']}, {subject['backend']} {result['versions']['onnxruntime']}",
        f"{machine['cpu']}, {machine['cores']} cores",
        f"frame {shape['frame'][1]}x{shape['frame'][0]} on a canvas of {shape['network'][1]}x{shape['network'][0]},"
        f" {shape['tokens']} tokens, {shape['classes']} classes, batch {shape['batch']}",
        "",
        f"{'per frame':<46}{'median ms':>12}{'p95 ms':>10}",
    ]
    lines += [f"{name:<46}{t['median']:>12.1f}{t['p95']:>10.1f}" for name, t in result["frame_ms"].items()]
    rate = 1e3 / result["frame_ms"]["whole frame"]["median"]
    lines += [f"{'frames per second':<46}{rate:>12.2f}", "", f"{'image branch by stage':<46}{'ms':>12}{'share':>10}"]
    stages = result["image_branch_stage_ms"]
    total = sum(stages.values()) or 1.0
    lines += [f"{name:<46}{ms:>12.1f}{ms / total:>10.0%}" for name, ms in stages.items()]
    lines += ["", f"{'text branch':<46}{'ms':>12}"]
    lines += [f"{name:<46}{ms:>12.2f}" for name, ms in result["prompt_ms"].items()]
    lines += ["", f"{'resize':<28}{'exact ms':>10}{'fast ms':>10}{'mean difference, grey levels':>32}"]
    for row in result["resize"]:
        (from_h, from_w), (to_h, to_w) = row["from"], row["to"]
        name = f"{from_w}x{from_h} -> {to_w}x{to_h}"
        exact, fast = row["ms"]["exact"]["median"], row["ms"]["fast"]["median"]
        lines.append(f"{name:<28}{exact:>10.1f}{fast:>10.1f}{row['mean_difference_grey_levels']:>32.2f}")
    lines += [
        "",
        f"opened in {result['open_seconds']:.1f} s, first frame after {result['first_frame_seconds']:.1f} s more;"
        f" peak resident memory {result['peak_resident_bytes'] / 1e9:.2f} GB",
    ]
    return "\n".join(lines)


def _floor(args: argparse.Namespace) -> dict[str, Any]:
    """Count the work of one frame and say how fast a machine could do it."""
    from dataclasses import asdict

    from glip_bench.floor import Shape, by_stage, count_image_branch, floor_of, hardware, measure_cpu
    from glip_deploy import Bundle
    from glip_deploy.image import network_size
    from glip_deploy.prompt import parse_prompt

    machine = None if args.floor.lower() == "cpu" else hardware(args.floor)  # a wrong name fails before the work
    bundle = Bundle.open(args.model)
    prompt = parse_prompt(args.prompt, bundle.tokenizer(), max_tokens=bundle.max_tokens)
    frame_height, frame_width = args.frame
    resized = network_size(frame_height, frame_width, args.shortest_side, args.longest_side or None)
    height, width = (-(-side // 32) * 32 for side in resized)
    shape = Shape(height, width, tokens=len(prompt.input_ids), classes=len(prompt))
    work = count_image_branch(bundle, shape)
    machine = machine or measure_cpu()
    precision = "fp32" if machine.name == "cpu" else "fp16"
    floor = floor_of(work, shape, machine, precision)
    return {
        "kind": "floor",
        "variant": bundle.variant,
        "shape": asdict(shape),
        "gmac_by_stage": {stage.value: round(macs / 1e9, 3) for stage, macs in by_stage(work).items()},
        "weights": sum(one.weights for one in work),
        "hardware": asdict(machine),
        "precision": precision,
        "floor_ms": {name: round(seconds * 1e3, 4) for name, seconds in asdict(floor).items()},
    }


def render_floor(result: dict[str, Any]) -> str:
    """Return a floor as text for a terminal."""
    shape, machine, floor = result["shape"], result["hardware"], result["floor_ms"]
    flops = machine["single_flops" if result["precision"] == "fp32" else "half_flops"]
    total = sum(result["gmac_by_stage"].values())
    lines = [
        f"{result['variant']}, {shape['width']}x{shape['height']}, {shape['tokens']} tokens,"
        f" {shape['classes']} classes, batch {shape['batch']}:"
        f" {total:.1f} GMAC, {result['weights'] / 1e6:.1f} M weights",
        "",
        f"{'image branch':<46}{'GMAC':>10}{'share':>8}",
    ]
    lines += [f"{name:<46}{gmac:>10.2f}{gmac / total:>8.1%}" for name, gmac in result["gmac_by_stage"].items()]
    lines += [
        "",
        f"{machine['name']}, {result['precision']}: {flops / 1e12:.3g} TFLOP/s,"
        f" {machine['bytes_per_second'] / 1e9:.3g} GB/s",
        f"{'arithmetic alone':<46}{floor['arithmetic']:>10.3f} ms",
        f"{'weights and frame read once':<46}{floor['memory']:>10.3f} ms",
        f"{'each product apart, through memory':<46}{floor['by_product']:>10.3f} ms",
    ]
    return "\n".join(lines)


def _step(name: str) -> None:
    print(f"[{name}]", file=sys.stderr, flush=True)


def _own_picture() -> Path:
    """Find the photograph that travels with glip-export, without importing torch."""
    from importlib.util import find_spec

    spec = find_spec("glip_export")
    if spec is None or not spec.submodule_search_locations:
        raise GlipError("glip_export and its picture are not installed; name one with --picture")
    return Path(spec.submodule_search_locations[0]) / "data" / "picture.jpg"


def _check_target(path: Path | None) -> None:
    """Fail before the measurement rather than after it."""
    if path is None:
        return
    if path.is_dir():
        raise GlipError(f"--json {path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise GlipError(f"--json {path}: the folder {path.absolute().parent} does not exist; make it first")


def _write(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise GlipError(f"--json {path}: writing failed ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _size(text: str) -> tuple[int, int]:
    """Read "1920x1080" as (height, width)."""
    width, cross, height = text.lower().partition("x")
    if not cross or not (width.isdecimal() and height.isdecimal()) or not (int(width) and int(height)):
        raise argparse.ArgumentTypeError(f'"{text}" is not a size; write width x height in pixels, as in 1920x1080')
    return int(height), int(width)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is not a whole number of 1 or more')
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glip-bench",
        description="Time detection with an exported GLIP piece by piece, on ONNX Runtime's CPU provider.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="bundle that glip-export wrote")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="picture the frames are cut from (default: ours)")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f'what to look for (default: "{PROMPT}")')
    parser.add_argument("--frame", type=_size, default=(960, 1600), metavar="WxH", help="frame size (1600x960)")
    parser.add_argument("--shortest-side", type=_count, default=800, metavar="PIXELS", help="network size (800)")
    parser.add_argument("--longest-side", type=int, default=1333, metavar="PIXELS", help="its limit (1333), 0 for none")
    parser.add_argument("--runs", type=_count, default=7, metavar="N", help="timed frames (7)")
    parser.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: one a core)")
    parser.add_argument(
        "--floor", metavar="NAME", help="time nothing; say what a GPU, or the cpu at hand, could do at best"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="only the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
