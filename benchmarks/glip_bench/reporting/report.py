"""A result as a folder to pass on: one Markdown file with the tables and the plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glip_bench.reporting.plots import curve_rows, draw_blocks, draw_sweep, table
from glip_bench.reporting.text import render
from glip_bench.subjects.base import Piece
from glip_deploy.errors import MissingPackage
from glip_deploy.files import check_folder, not_written, write_atomically

__all__ = ["check_report", "write_report"]

NAME = "report.md"


def check_report(folder: Path) -> None:
    """Check, before the measurement, that a report can be written.

    Raises:
        OutputError: a file, or a folder that cannot be made or written.
        MissingPackage: matplotlib is not installed.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise MissingPackage("--report draws with matplotlib, which is not installed; pip install 'glip-deploy[bench]'")
    check_folder(folder)


def write_report(result: Mapping[str, Any], folder: Path) -> Path:
    """Write report.md and its pictures.

    Returns:
        The Markdown file.

    Raises:
        OutputError: the disk is full, or the folder may not be written.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "\n".join(_lines(result, folder)))
    except OSError as error:
        raise not_written(path, error) from None
    return path


def _lines(result: Mapping[str, Any], folder: Path) -> list[str]:
    machine, shape, model = result["machine"], result["shape"], result["model"]
    subjects: Mapping[str, Any] = result["subjects"]
    gpus = "".join(f"; {gpu['name']}, driver {gpu['driver']}, {gpu['clock']} MHz" for gpu in result["gpus"])
    lines = [
        f"# {model['variant']}, {result['date']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}{gpus}.",
        f"Frames of {shape['frame'][1]}x{shape['frame'][0]} on a canvas of {shape['network'][1]}x{shape['network'][0]},"
        f" {shape['tokens']} tokens, {shape['classes']} classes, batch {shape['batch']};"
        f" {result['rounds_done']} rounds, all subjects in turn.",
        "",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".",
        "",
        *table(_summary(subjects)),
        "",
        *(f"- not here: {name}: {reason}" for name, reason in result["absent"].items()),
        "",
    ]
    if any(facts.get("stages_ms") for facts in subjects.values()):
        draw_blocks(subjects, folder / "blocks.png")
        lines += ["## Where the time goes", "", "![blocks](blocks.png)", ""]
    for sweep in result.get("sweeps", ()):
        file = f"{sweep['axis']}.png"
        draw_sweep(sweep, folder / file)
        lines += [
            f"## {sweep['label'].capitalize()}",
            "",
            f"![{sweep['label']}]({file})",
            "",
            *table(_points(sweep)),
            "",
        ]
    return [*lines, "## Everything", "", "```text", render(result), "```", ""]


def _summary(subjects: Mapping[str, Any]) -> list[list[str]]:
    rows = [["subject", "frames/s", "whole frame, ms", "p95", "image branch, ms", "times the first", "memory, GB"]]
    first = next(iter(subjects.values()))["pieces_ms"][Piece.IMAGE]["median"]
    for name, facts in subjects.items():
        whole, image = facts["pieces_ms"][Piece.WHOLE], facts["pieces_ms"][Piece.IMAGE]
        peak = facts.get("peak_device_bytes") or facts.get("peak_resident_bytes")
        rows.append(
            [
                name,
                f"{1e3 / whole['mean']:.2f}",
                f"{whole['median']:.1f}",
                f"{whole['p95']:.1f}",
                f"{image['median']:.1f}",
                f"{first / image['median']:.2f}",
                "" if peak is None else f"{peak / 1e9:.2f}",
            ]
        )
    return rows


def _points(sweep: Mapping[str, Any]) -> list[list[str]]:
    subjects = list(dict.fromkeys(name for point in sweep["points"] for name in point["subjects"]))
    curves = {name: {value: ms for value, ms, _ in curve_rows(sweep, name)} for name in subjects}
    values = list(dict.fromkeys(value for curve in curves.values() for value in curve))
    rows = [[sweep["label"], *(f"{name}, ms a frame" for name in subjects)]]
    for value in values:
        cells = (curves[name].get(value) for name in subjects)
        rows.append([value, *("" if ms is None else f"{ms:.1f}" for ms in cells)])
    return rows
