"""Two results of the same measurement: how much faster or slower the new one is, and whether that exceeds noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glip_bench.machine.host import processor
from glip_bench.subjects.base import Piece
from glip_deploy.errors import OptionError

__all__ = ["LEAST", "Change", "compare", "render_comparison", "uncertainty"]

LEAST = 0.03
"""A smaller change never counts: clocks and page placement differ by as much between two processes."""
SIGMAS = 3.0
"""A change counts from so many standard errors on."""
SMALL = 0.02
"""A piece below this share of the whole frame is shown, and not judged."""
MEMORY = 0.05
"""Change of memory that counts."""

_SAME = ("variant", "fusion")
_SHAPE = ("batch", "network", "tokens", "classes")


@dataclass(frozen=True)
class Change:
    """One figure of one subject in both results."""

    subject: str
    figure: str
    old: float
    new: float
    unit: str
    tolerance: float
    """Relative; within it, the change is noise."""
    counts: bool = True
    more_is_better: bool = False

    @property
    def ratio(self) -> float:
        """New over old."""
        return self.new / self.old if self.old else math.inf

    @property
    def worse(self) -> bool:
        """Whether the new figure is worse beyond noise."""
        return self.counts and (self._less if self.more_is_better else self._more)

    @property
    def better(self) -> bool:
        """Whether the new figure is better beyond noise."""
        return self.counts and (self._more if self.more_is_better else self._less)

    @property
    def _more(self) -> bool:
        return self.new > self.old * (1 + self.tolerance)

    @property
    def _less(self) -> bool:
        return self.new * (1 + self.tolerance) < self.old


def uncertainty(timing: Mapping[str, Any]) -> float:
    """Return the standard error of a median, relative to it.

    Args:
        timing: with "samples" in milliseconds; without them (results of schema 1), the 95th percentile stands in.
    """
    median, samples = float(timing["median"]), np.asarray(timing.get("samples", ()), np.float64)
    if not median:
        return 0.0
    if len(samples) >= 5:  # robust: one hiccup must not hide a regression
        sigma = 1.4826 * float(np.median(np.abs(samples - np.median(samples))))
    elif len(samples) >= 2:
        sigma = float(samples.std(ddof=1))
    else:
        sigma = (float(timing.get("p95", timing["maximum"])) - median) / 1.645
    return 1.2533 * sigma / math.sqrt(max(1, int(timing["runs"]))) / median


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[Change], list[str]]:
    """Compare what both results have.

    Returns:
        (changes, remarks: what differs between the two that a reader should know).

    Raises:
        OptionError: another model or shape, or no subject in common.
    """
    for group, keys in (("model", _SAME), ("shape", _SHAPE)):
        for key in keys:
            before, after = old[group].get(key), new[group].get(key)
            if before != after:
                raise OptionError(
                    f"the old result has {group} {key} {before}, the new one {after}; measure with the same"
                )
    common = [name for name in new["subjects"] if name in old["subjects"]]
    if not common:
        raise OptionError(f"no subject in common; old: {', '.join(old['subjects'])}; new: {', '.join(new['subjects'])}")
    changes: list[Change] = []
    for name in common:
        changes += _subject(name, old["subjects"][name], new["subjects"][name])
    return changes, _remarks(old, new, common)


def _subject(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    changes = []
    whole = float(new["pieces_ms"][Piece.WHOLE]["median"])
    for piece in Piece:
        before, after = old["pieces_ms"].get(piece), new["pieces_ms"].get(piece)
        if before is None or after is None:
            continue
        noise = SIGMAS * math.hypot(uncertainty(before), uncertainty(after))
        counts = max(before["median"], after["median"]) >= SMALL * whole
        changes.append(
            Change(name, str(piece), before["median"], after["median"], "ms", max(LEAST, noise), counts=counts)
        )
    for key, title in (("peak_resident_bytes", "peak memory"), ("peak_device_bytes", "peak device memory")):
        if old.get(key) and new.get(key):
            changes.append(Change(name, title, old[key] / 1e9, new[key] / 1e9, "GB", MEMORY))
    before, after = old.get("agreement"), new.get("agreement")
    if before and after and before["with"] == after["with"] and before["of"] and after["of"]:
        was, now = (100 * side["matched"] / side["of"] for side in (before, after))
        changes.append(Change(name, "boxes matched", was, now, "%", 0.0, more_is_better=True))
    return changes


def _remarks(old: Mapping[str, Any], new: Mapping[str, Any], common: list[str]) -> list[str]:
    remarks = []
    for title, before, after in (
        ("processor", processor(old["machine"]["cpu"]), processor(new["machine"]["cpu"])),
        ("cores", old["machine"]["cores"], new["machine"]["cores"]),
        ("GPUs", *(", ".join(gpu["name"] for gpu in side["gpus"]) or "none" for side in (old, new))),
        ("precision", old["model"].get("precision"), new["model"].get("precision")),
        ("threads", old.get("threads"), new.get("threads")),
        ("frame size", old["shape"]["frame"], new["shape"]["frame"]),
    ):
        if before != after:
            remarks.append(f"{title}: {before} -> {after}")
    packages = sorted({*old["versions"], *new["versions"]})
    remarks += [
        f"{package} {old['versions'].get(package, 'absent')} -> {new['versions'].get(package, 'absent')}"
        for package in packages
        if old["versions"].get(package) != new["versions"].get(package)
    ]
    for side, other, title in ((old, new, "only in the old result"), (new, old, "only in the new result")):
        alone = [name for name in side["subjects"] if name not in other["subjects"]]
        if alone:
            remarks.append(f"{title}: {', '.join(alone)}")
    if any("samples" not in old["subjects"][name]["pieces_ms"][Piece.WHOLE] for name in common):
        remarks.append("the old result has no single samples: its noise is estimated from its 95th percentile")
    return remarks


def render_comparison(changes: list[Change], remarks: list[str], old: Path | str | None) -> str:
    """Return a comparison as text; the last line is the verdict."""
    lines = [f"against {old}", *(f"differs: {remark}" for remark in remarks)]
    lines += ["", f"{'':<40}{'old':>12}{'new':>12}{'new/old':>10}{'noise':>9}"]
    subject = ""
    for change in changes:
        if change.subject != subject:
            subject = change.subject
            lines.append(subject)
        old_text, new_text = (f"{value:.2f} {change.unit}" for value in (change.old, change.new))
        ratio, noise = f"{change.ratio:.2f}", f"{change.tolerance:.0%}"
        verdict = "  WORSE" if change.worse else "  better" if change.better else ""
        lines.append(f"  {change.figure:<38}{old_text:>12}{new_text:>12}{ratio:>10}{noise:>9}{verdict}")
    worse = [change for change in changes if change.worse]
    lines.append("")
    if worse:
        lines.append("worse beyond noise: " + ", ".join(f"{c.subject} {c.figure}" for c in worse))
    else:
        lines.append("nothing is worse beyond noise")
    return "\n".join(lines)
