"""Results as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glip_bench.reporting.plots import bars, blocks_of
from glip_bench.subjects.base import Piece

__all__ = ["render", "render_floor"]

FIRST = 42
"""Width of the first column."""


def render(result: Mapping[str, Any]) -> str:
    """Return a detection result as text."""
    machine, shape, model = result["machine"], result["shape"], result["model"]
    subjects: Mapping[str, Any] = result["subjects"]
    lines = [
        f"{model['variant']}, {'with' if model['fusion'] else 'without'} deep fusion",
        f"{machine['cpu']}, {machine['cores']} cores"
        + "".join(f"; {gpu['name']}, driver {gpu['driver']}" for gpu in result["gpus"]),
        f"frame {shape['frame'][1]}x{shape['frame'][0]} on a canvas of {shape['network'][1]}x{shape['network'][0]},"
        f" {shape['tokens']} tokens, {shape['classes']} classes, batch {shape['batch']}",
    ]
    lines += [f"not here: {name}: {reason}" for name, reason in result["absent"].items()]
    lines += ["", f"{'whole frame, ms':<{FIRST}}" + _heads("median", "mean", "p90", "p95", "p99", "min", "max", "FPS")]
    for name, facts in subjects.items():
        whole = facts["pieces_ms"][Piece.WHOLE]
        keys = ("median", "mean", "p90", "p95", "p99", "minimum", "maximum")
        values = [f"{whole[key]:.1f}" if key in whole else "" for key in keys]
        lines.append(f"{name:<{FIRST}}" + _heads(*values, f"{1e3 / whole['mean']:.2f}"))
    if len(subjects) > 1:
        lines += ["", *_against_first(subjects)]
    lines += ["", f"{'per piece, median ms':<{FIRST}}" + _heads(*subjects, width=22)]
    for piece in Piece:
        timings = [facts["pieces_ms"].get(piece) for facts in subjects.values()]
        if any(timings):
            row = (f"{timing['median']:.2f}" if timing else "" for timing in timings)
            lines.append(f"{piece:<{FIRST}}" + _heads(*row, width=22))
    lines += _blocks(subjects) + _single_figures(subjects) + _floors(subjects)
    lines += [f"no hardware limit: {result['no_floor']}"] if "no_floor" in result else []
    lines += _paces(subjects)
    if "ends_ms" in result:
        decode, draw = result["ends_ms"]["decode"], result["ends_ms"]["draw"]
        lines += ["", f"{'around the detector':<{FIRST}}" + _heads("median ms", "p95")]
        names = (f"reading a frame of {decode['size'][1]}x{decode['size'][0]}", f"drawing {draw['boxes']} boxes")
        for name, timing in zip(names, (decode, draw), strict=True):
            lines.append(f"{name:<{FIRST}}" + _heads(f"{timing['median']:.2f}", f"{timing['p95']:.2f}"))
    if "prompt_ms" in result:
        lines += ["", f"{'text branch, once a prompt (ONNX Runtime)':<{FIRST}}" + _heads("ms")]
        lines += [f"{name:<{FIRST}}" + _heads(f"{ms:.2f}") for name, ms in result["prompt_ms"].items()]
    if "resize" in result:
        lines += ["", f"{'resize':<{FIRST}}" + _heads("exact ms", "fast ms", "mean difference, gray levels")]
        for row in result["resize"]:
            (from_h, from_w), (to_h, to_w) = row["from"], row["to"]
            exact, fast = (f"{row['ms'][method]['median']:.1f}" for method in ("exact", "fast"))
            name = f"{from_w}x{from_h} -> {to_w}x{to_h}"
            lines.append(f"{name:<{FIRST}}" + _heads(exact, fast, f"{row['mean_difference_grey_levels']:.2f}"))
    for sweep in result.get("sweeps", ()):
        lines += ["", *bars(sweep)]
    if not result.get("complete", True):
        lines += ["", "interrupted: not everything was measured; --resume continues"]
    return "\n".join(lines)


def _heads(*cells: object, width: int = 10) -> str:
    return "".join(f"{cell!s:>{width}}" for cell in cells)


def _against_first(subjects: Mapping[str, Any]) -> list[str]:
    first, reference = next(iter(subjects.items()))
    lines = [f"{'against ' + first:<{FIRST}}{'whole frame':>16}{'image branch':>16}   same boxes in the first frame"]
    for name, facts in list(subjects.items())[1:]:
        ratios = []
        for piece in (Piece.WHOLE, Piece.IMAGE):
            ours, theirs = (side["pieces_ms"][piece]["median"] for side in (facts, reference))
            ratios.append(f"{theirs / ours:.2f}x" if ours else "")
        agreement = facts.get("agreement")
        boxes = ""
        if agreement:
            extra = agreement["found"] - agreement["matched"]
            boxes = f"{agreement['matched']} of {agreement['of']}" + (f", {extra} more" if extra else "")
            if "threshold" in agreement:
                boxes += f", score above {agreement['threshold']:g}"
        lines.append(f"{name:<{FIRST}}{ratios[0]:>16}{ratios[1]:>16}   {boxes}")
    return lines


def _blocks(subjects: Mapping[str, Any]) -> list[str]:
    known = {name: facts["stages_ms"] for name, facts in subjects.items() if facts.get("stages_ms")}
    if not known:
        return []
    lines = ["", f"{'image branch by block, ms':<{FIRST}}" + _heads(*known, width=22)]
    for stage in blocks_of(known.values()):
        cells = (_part(stages[stage], sum(stages.values())) if stage in stages else "" for stages in known.values())
        lines.append(f"{stage:<{FIRST}}" + _heads(*cells, width=22))
    return lines


def _part(ms: float, total: float) -> str:
    return f"{ms:.1f} {ms / (total or 1):>5.0%}"


def _single_figures(subjects: Mapping[str, Any]) -> list[str]:
    rows = (
        ("opening, s", "open_seconds", 1.0),
        ("first prompt, s", "first_prompt_seconds", 1.0),
        ("first frame, s", "first_frame_seconds", 1.0),
        ("peak resident memory, GB", "peak_resident_bytes", 1e9),
        ("peak device memory, GB", "peak_device_bytes", 1e9),
    )
    lines = ["", f"{'':<{FIRST}}" + _heads(*subjects, width=22)]
    for title, key, unit in rows:
        values = [facts.get(key) for facts in subjects.values()]
        if any(value is not None for value in values):
            cells = ("" if value is None else f"{value / unit:.2f}" for value in values)
            lines.append(f"{title:<{FIRST}}" + _heads(*cells, width=22))
    return lines


def _floors(subjects: Mapping[str, Any]) -> list[str]:
    known = {name: facts["floor"] for name, facts in subjects.items() if facts.get("floor")}
    if not known:
        return []
    title = "against the hardware's limit"
    lines = ["", f"{title:<{FIRST}}" + _heads("GMAC", "TFLOP/s", "limit, ms", "reached", width=12)]
    for name, floor in known.items():
        cells = (
            f"{floor['gmac']:.1f}",
            f"{floor['flops'] / 1e12:.3g}",
            f"{floor['floor_ms']:.1f}",
            f"{floor['share']:.0%}",
        )
        row = f"{name} ({floor['hardware']}, {floor['precision']})"
        lines.append(f"{row:<{FIRST}}" + _heads(*cells, width=12))
    return lines


def _paces(subjects: Mapping[str, Any]) -> list[str]:
    known = {name: facts["frame_rate"] for name, facts in subjects.items() if facts.get("frame_rate")}
    if not known:
        return []
    rate = next(iter(known.values()))["rate"]
    title = f"at {rate:g} frames a second"
    lines = ["", f"{title:<{FIRST}}" + _heads("taken", "dropped", "median", "p95", "keeps up")]
    for name, pace in known.items():
        latency = pace["latency_ms"]
        cells = (pace["taken"], pace["dropped"], f"{latency['median']:.1f}", f"{latency['p95']:.1f}")
        lines.append(f"{name:<{FIRST}}" + _heads(*cells, "yes" if pace["keeps_up"] else "no"))
    return lines


def render_floor(result: Mapping[str, Any]) -> str:
    """Return a floor as text."""
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
