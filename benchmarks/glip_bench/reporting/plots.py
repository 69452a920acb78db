"""Cost curves, as PNG and for the terminal; Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glip_deploy.bundle.contract import Stage
from glip_deploy.errors import MissingPackage
from glip_deploy.files import atomic_file, not_written

__all__ = ["bars", "blocks_of", "curve_rows", "draw_blocks", "draw_sweep", "table"]

WIDTH = 44  # of the longest bar, in characters
BLOCK, PARTS = "█", " ▏▎▍▌▋▊▉"


def curve_rows(sweep: Mapping[str, Any], subject: str) -> list[tuple[str, float | None, str]]:
    """Return (value, median milliseconds of the image branch for one frame, remark) of each point."""
    rows: list[tuple[str, float | None, str]] = []
    for point in sweep["points"]:
        facts = point["subjects"].get(subject)
        if facts is None:
            continue
        name = str(point["value"])
        if "precision" in point:
            name = f"{Path(name).name} ({point['precision']})"
        if "error" in facts:
            rows.append((name, None, str(facts["error"])))
        else:
            rows.append((name, facts["image_ms"]["median"] / point["batch"], ""))
    return rows


def bars(sweep: Mapping[str, Any]) -> list[str]:
    """Return a sweep as lines of text: a bar for every value of every subject, all to one scale."""
    subjects = _subjects(sweep)
    curves = {subject: curve_rows(sweep, subject) for subject in subjects}
    known = [ms for rows in curves.values() for _, ms, _ in rows if ms is not None]
    longest = max(known, default=1.0) or 1.0
    lines = [f"{sweep['label']}: image branch, ms a frame"]
    for subject, rows in curves.items():
        lines.append(f"  {subject}")
        width = max((len(name) for name, _, _ in rows), default=0)
        for name, ms, remark in rows:
            drawn = remark if ms is None else f"{ms:>10.1f} {_bar(ms / longest)}"
            lines.append(f"    {name:>{width}} {drawn}".rstrip())
    return lines


def _bar(share: float) -> str:
    eighths = round(share * WIDTH * 8)
    whole, rest = divmod(eighths, 8)
    return (BLOCK * whole + (PARTS[rest] if rest else "")) or PARTS[1]


def _subjects(sweep: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for point in sweep["points"] for name in point["subjects"]))


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackage("plots need matplotlib; pip install 'glip-deploy[bench]'") from None
    return Figure, FigureCanvasAgg


def draw_sweep(sweep: Mapping[str, Any], path: Path) -> None:
    """Draw a sweep's curves, milliseconds a frame over the value, as PNG.

    Raises:
        MissingPackage: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure_class, canvas_class = _matplotlib()
    figure = figure_class(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for subject in _subjects(sweep):
        rows = [(name, ms) for name, ms, _ in curve_rows(sweep, subject) if ms is not None]
        names = [name for name, _ in rows]
        numeric = all(name.isdecimal() for name in names)
        axes.plot([int(name) for name in names] if numeric else names, [ms for _, ms in rows], "o-", label=subject)
    axes.set(xlabel=sweep["label"], ylabel="image branch, ms a frame")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, canvas_class, path)


def draw_blocks(subjects: Mapping[str, Any], path: Path) -> None:
    """Draw where each subject's image branch spends its time, as stacked bars, as PNG.

    Args:
        subjects: of a result; those without "stages_ms" are left out.
        path: the file.

    Raises:
        MissingPackage: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure_class, canvas_class = _matplotlib()
    known = {name: facts["stages_ms"] for name, facts in subjects.items() if facts.get("stages_ms")}
    figure = figure_class(figsize=(8.0, 1.2 + 0.6 * len(known)), layout="constrained")
    axes = figure.add_subplot()
    names = list(known)[::-1]
    left = [0.0] * len(names)
    for stage in blocks_of(known.values()):
        widths = [float(known[name].get(stage, 0.0)) for name in names]
        axes.barh(names, widths, left=left, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="image branch, ms")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    _save(figure, canvas_class, path)


def blocks_of(profiles: Iterable[Mapping[str, float]]) -> list[str]:
    """Return the names of all blocks in some "stages_ms", in the network's order; other names come last."""
    order = {str(stage): place for place, stage in enumerate(Stage)}
    names = dict.fromkeys(name for profile in profiles for name in profile)
    return sorted(names, key=lambda name: order.get(name, len(order)))


def _save(figure: Any, canvas_class: Any, path: Path) -> None:
    canvas_class(figure)
    try:
        with atomic_file(path) as partial:
            figure.savefig(partial, dpi=120)
    except OSError as error:
        raise not_written(path, error) from None


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows, the first of them headings, as a Markdown table."""
    head, *body = rows
    return [_row(head), "|" + "---|" * len(head), *(_row(row) for row in body)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
