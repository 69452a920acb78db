"""Timing on a GPU: single kernels with a cold cache, frames one after another, CUDA graphs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

__all__ = ["captured", "milliseconds", "summary", "timed"]

Result = TypeVar("Result")


def captured(action: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
    """Record an action as a CUDA graph; return its results, which a replay writes again, and the replay."""
    stream: Any = torch.cuda.Stream  # torch does not type it
    side = stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = action()
    return found, graph.replay


def timed(action: Callable[[], object], runs: int) -> dict[str, float]:
    """Time an action on the GPU, its data out of the L2 cache before every run; in microseconds."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    return summary([1e3 * value for value in _elapsed(action, runs, warmup=5, before=flush.zero_)])


def milliseconds(action: Callable[[], object], runs: int) -> dict[str, float]:
    """Time frames one after another, as a video has them; in milliseconds."""
    return summary(_elapsed(action, runs, warmup=3))


def _elapsed(
    action: Callable[[], object], runs: int, warmup: int, before: Callable[[], object] = lambda: None
) -> list[float]:
    for _ in range(warmup):
        action()
    event: Any = torch.cuda.Event  # torch does not type it
    pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(runs)]
    for start, end in pairs:
        before()
        start.record()
        action()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum, maximum and 95th percentile."""
    ranked = sorted(values)
    return {
        "median": statistics.median(ranked),
        "minimum": ranked[0],
        "maximum": ranked[-1],
        "p95": ranked[min(len(ranked) - 1, round(0.95 * (len(ranked) - 1)))],
    }
