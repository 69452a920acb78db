"""The speeds and the memory that the GLIP paper states, and beside them what was measured with this toolkit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glip_bench.machine.host import processor
from glip_bench.reporting.results import read_result
from glip_bench.subjects.base import Piece, SubjectName
from glip_deploy.errors import GlipError, OptionError

__all__ = ["PAPER", "Row", "measured_rows", "paper_table", "results_folder"]

MODELS = ("GLIP-T", "GLIP-L")
MACHINES = ("P100", "V100", "A100")
"""GPUs that each have a place in the table, measured or not."""
SIZE = (800, 1344)
"""Canvas (height, width) a result must have to stand in this table."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    fusion: bool
    machine: str
    form: str
    fps: float
    gigabytes: float | None
    source: str


PAPER = (
    Row("GLIP-T", False, "P100", "paper", 4.84, 1.0, "GLIP paper, appendix"),
    Row("GLIP-T", True, "P100", "paper", 2.52, 2.4, "GLIP paper, appendix"),
    Row("GLIP-L", False, "P100", "paper", 0.54, 4.8, "GLIP paper, appendix"),
    Row("GLIP-L", True, "P100", "paper", 0.32, 7.7, "GLIP paper, appendix"),
)


def results_folder() -> Path:
    """Return benchmarks/results of this checkout, or of the working directory.

    Raises:
        OptionError: neither exists.
    """
    for place in (Path(__file__).resolve().parents[2] / "results", Path("benchmarks/results")):
        if place.is_dir():
            return place
    raise OptionError("there is no benchmarks/results here; run it in the project's folder, or name one with --results")


def measured_rows(folder: Path) -> tuple[list[Row], list[str]]:
    """Read the results of a folder.

    Returns:
        (rows, why files that look like detection results do not count).
    """
    rows, left_out = [], []
    for file in sorted(folder.glob("*.json")):
        if not _is_detection(file):
            continue
        try:
            result = read_result(file)
        except GlipError as error:
            left_out.append(str(error))
            continue
        if tuple(result["shape"]["network"]) != SIZE:
            height, width = result["shape"]["network"]
            left_out.append(f"{file.name}: its canvas is {width}x{height}, the table is for {SIZE[1]}x{SIZE[0]}")
            continue
        rows += _rows(result, file.name)
    return rows, left_out


def _is_detection(file: Path) -> bool:
    """Tell whether a file is a detection result; engine builds and floors lie in the same folder."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # read_result says what is wrong with it
    return isinstance(content, dict) and content.get("kind") == "detection"


def _rows(result: Mapping[str, Any], name: str) -> list[Row]:
    variant = str(result["model"]["variant"])
    model = next((m for m in MODELS if variant == m or variant.startswith(f"{m} ")), None)
    if model is None:
        return []
    rows = []
    for subject, facts in result["subjects"].items():
        if SubjectName(subject).is_yardstick:
            continue
        on_gpu = facts.get("device") not in (None, "cpu")
        gpus = result["gpus"]
        machine = gpus[0]["name"] if on_gpu and gpus else processor(result["machine"]["cpu"])
        if not on_gpu:
            machine += f", {result['machine']['cores']} cores"
        peak = facts.get("peak_device_bytes") if on_gpu else facts.get("peak_resident_bytes")
        tokens = facts.get("tokens", result["shape"]["tokens"])
        form = f"{subject}, {facts.get('precision')}, {tokens} tokens"
        fps = 1e3 / facts["pieces_ms"][Piece.WHOLE]["mean"]
        rows.append(
            Row(model, bool(result["model"]["fusion"]), machine, form, fps, None if peak is None else peak / 1e9, name)
        )
    return rows


def paper_table(rows: Sequence[Row], left_out: Sequence[str] = ()) -> str:
    """Return the table as Markdown, which is readable as text too."""
    cells = [("model", "deep fusion", "machine", "form", "frames/s", "memory, GB", "source")]
    for model in MODELS:
        for fusion in (False, True):
            known = [row for row in rows if (row.model, row.fusion) == (model, fusion)]
            ours = sorted((row for row in known if row.form != "paper"), key=lambda row: (row.machine, row.fps))
            words = (model, "with" if fusion else "without")
            cells += [
                (*words, r.machine, r.form, _fps(r.fps), _gigabytes(r.gigabytes), r.source)
                for r in [row for row in known if row.form == "paper"] + ours
            ]
            measured = {word for row in ours for word in re.split(r"[\s-]+", row.machine)}
            missing = [name for name in MACHINES if name not in measured]
            if missing:
                cells.append((*words, ", ".join(missing), "glip-deploy", "not measured yet", "", ""))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines += [
        "",
        f"Canvas {SIZE[1]}x{SIZE[0]} (the paper: images at its evaluation size). Memory is peak device memory on a GPU,"
        " peak resident memory on a CPU.",
    ]
    lines += [f"left out: {reason}" for reason in left_out]
    return "\n".join(lines)


def _fps(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
