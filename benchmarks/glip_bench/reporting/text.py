"""Results as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glip_bench.reporting.plots import bars, blocks_of
from glip_bench.subjects.base import Piece

__all__ = ["render", "render_floor"]

FIRST = 42
"""Width of the first column."""

Rows = list[tuple[str, Sequence[object]]]
"""Of a table: a name and its cells."""


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
        *(f"not here: {name}: {reason}" for name, reason in result["absent"].items()),
        *_whole_frames(subjects),
        *_against_first(subjects),
        *_pieces(subjects),
        *_blocks(subjects),
        *_single_figures(subjects),
        *_floors(subjects),
        *([f"no hardware limit: {result['no_floor']}"] if "no_floor" in result else []),
        *_paces(subjects),
    ]
    if "ends_ms" in result:
        decode, draw = result["ends_ms"]["decode"], result["ends_ms"]["draw"]
        names = (f"reading a frame of {decode['size'][1]}x{decode['size'][0]}", f"drawing {draw['boxes']} boxes")
        cells = ([f"{timing[key]:.2f}" for key in ("median", "p95")] for timing in (decode, draw))
        lines += _table("around the detector", ["median ms", "p95"], zip(names, cells, strict=True))
    if "prompt_ms" in result:
        prompts = ((name, [f"{ms:.2f}"]) for name, ms in result["prompt_ms"].items())
        lines += _table("text branch, once a prompt (ONNX Runtime)", ["ms"], prompts)
    lines += _resizing(result.get("resize", ()))
    for sweep in result.get("sweeps", ()):
        lines += ["", *bars(sweep)]
    if not result.get("complete", True):
        lines += ["", "interrupted: not everything was measured; --resume continues"]
    return "\n".join(lines)


def _table(
    title: str, heads: Iterable[object], rows: Iterable[tuple[str, Iterable[object]]], width: int = 10
) -> list[str]:
    """Return an empty line and a table's lines; nothing where it has no rows."""
    lines = []
    for name, cells in [(title, heads), *rows]:
        lines.append((f"{name:<{FIRST}}" + "".join(f"{cell!s:>{width}}" for cell in cells)).rstrip())
    return ["", *lines] if len(lines) > 1 else []


def _known(subjects: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: facts[key] for name, facts in subjects.items() if facts.get(key)}


def _whole_frames(subjects: Mapping[str, Any]) -> list[str]:
    keys = ("median", "mean", "p90", "p95", "p99", "minimum", "maximum")
    rows: Rows = []
    for name, facts in subjects.items():
        whole = facts["pieces_ms"][Piece.WHOLE]
        values = [f"{whole[key]:.1f}" if key in whole else "" for key in keys]
        rows.append((name, [*values, f"{1e3 / whole['mean']:.2f}"]))
    return _table("whole frame, ms", ["median", "mean", "p90", "p95", "p99", "min", "max", "FPS"], rows)


def _against_first(subjects: Mapping[str, Any]) -> list[str]:
    (first, reference), *others = subjects.items()
    rows: Rows = []
    for name, facts in others:
        ratios = []
        for piece in (Piece.WHOLE, Piece.IMAGE):
            ours, theirs = (side["pieces_ms"][piece]["median"] for side in (facts, reference))
            ratios.append(f"{theirs / ours:.2f}x" if ours else "")
        agreement, boxes = facts.get("agreement"), ""
        if agreement:
            extra = agreement["found"] - agreement["matched"]
            boxes = f"   {agreement['matched']} of {agreement['of']}" + (f", {extra} more" if extra else "")
            if "threshold" in agreement:
                boxes += f", score above {agreement['threshold']:g}"
        rows.append((name, [*ratios, boxes]))
    heads = ["whole frame", "image branch", "   same boxes in the first frame"]
    return _table(f"against {first}", heads, rows, width=16)


def _pieces(subjects: Mapping[str, Any]) -> list[str]:
    timings = ((piece, [facts["pieces_ms"].get(piece) for facts in subjects.values()]) for piece in Piece)
    rows = ((piece, [f"{one['median']:.2f}" if one else "" for one in ones]) for piece, ones in timings if any(ones))
    return _table("per piece, median ms", subjects, rows, width=22)


def _blocks(subjects: Mapping[str, Any]) -> list[str]:
    known = _known(subjects, "stages_ms")

    def part(stages: Mapping[str, float], stage: str) -> str:
        return f"{stages[stage]:.1f} {stages[stage] / (sum(stages.values()) or 1):>5.0%}" if stage in stages else ""

    rows = ((stage, [part(stages, stage) for stages in known.values()]) for stage in blocks_of(known.values()))
    return _table("image branch by block, ms", known, rows, width=22)


def _single_figures(subjects: Mapping[str, Any]) -> list[str]:
    rows: Rows = []
    for title, key, unit in (
        ("opening, s", "open_seconds", 1.0),
        ("first prompt, s", "first_prompt_seconds", 1.0),
        ("first frame, s", "first_frame_seconds", 1.0),
        ("peak resident memory, GB", "peak_resident_bytes", 1e9),
        ("peak device memory, GB", "peak_device_bytes", 1e9),
    ):
        values = [facts.get(key) for facts in subjects.values()]
        if any(value is not None for value in values):
            rows.append((title, ["" if value is None else f"{value / unit:.2f}" for value in values]))
    return _table("", subjects, rows, width=22)


def _floors(subjects: Mapping[str, Any]) -> list[str]:
    rows = (
        (
            f"{name} ({one['hardware']}, {one['precision']})",
            [
                f"{one['gmac']:.1f}",
                f"{one['flops'] / 1e12:.3g}",
                f"{one['floor_ms']:.1f}",
                f"{one['share']:.0%}",
            ],
        )
        for name, one in _known(subjects, "floor").items()
    )
    return _table("against the hardware's limit", ["GMAC", "TFLOP/s", "limit, ms", "reached"], rows, width=12)


def _paces(subjects: Mapping[str, Any]) -> list[str]:
    rate, rows = 0.0, list[tuple[str, Sequence[object]]]()
    for name, pace in _known(subjects, "frame_rate").items():
        rate, latency = pace["rate"], pace["latency_ms"]
        times = (f"{latency['median']:.1f}", f"{latency['p95']:.1f}")
        rows.append((name, [pace["taken"], pace["dropped"], *times, "yes" if pace["keeps_up"] else "no"]))
    return _table(f"at {rate:g} frames a second", ["taken", "dropped", "median", "p95", "keeps up"], rows)


def _resizing(measured: Iterable[Mapping[str, Any]]) -> list[str]:
    rows: Rows = []
    for row in measured:
        (from_h, from_w), (to_h, to_w) = row["from"], row["to"]
        times = [f"{row['ms'][method]['median']:.1f}" for method in ("exact", "fast")]
        name = f"{from_w}x{from_h} -> {to_w}x{to_h}"
        rows.append((name, [*times, f"{row['mean_difference_grey_levels']:.2f}"]))
    return _table("resize", ["exact ms", "fast ms", "mean difference, gray levels"], rows)


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
