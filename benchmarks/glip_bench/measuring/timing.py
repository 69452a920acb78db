"""Repeated timing and its statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["Timing", "measure", "measure_interleaved"]


@dataclass(frozen=True)
class Timing:
    """Durations of one thing done several times, in milliseconds."""

    runs: int
    median: float
    mean: float
    p90: float
    p95: float
    p99: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarize durations given in seconds.

        Raises:
            ValueError: there are none.
        """
        if not len(seconds):
            raise ValueError("no durations to summarize")
        ms = np.asarray(seconds, np.float64) * 1e3
        return cls(
            runs=len(ms),
            median=float(np.median(ms)),
            mean=float(ms.mean()),
            p90=float(np.percentile(ms, 90)),
            p95=float(np.percentile(ms, 95)),
            p99=float(np.percentile(ms, 99)),
            minimum=float(ms.min()),
            maximum=float(ms.max()),
        )

    @property
    def fps(self) -> float:
        """Runs a second at the mean duration, which is what a long run of them gives."""
        return 1e3 / self.mean if self.mean else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the form of a result file: milliseconds, to the microsecond."""
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}


def measure(action: Callable[[], object], runs: int, warmup: int = 1) -> Timing:
    """Time `action` `runs` times after `warmup` untimed ones."""
    return measure_interleaved({"": action}, runs, warmup)[""]


def measure_interleaved(actions: dict[str, Callable[[], object]], runs: int, warmup: int = 1) -> dict[str, Timing]:
    """Time several actions in turn (A B A B ...), so that a machine that slows down slows all of them alike."""
    for _ in range(warmup):
        for action in actions.values():
            action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(runs):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in seconds.items()}
