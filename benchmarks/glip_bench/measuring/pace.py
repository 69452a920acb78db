"""Latency at a fixed frame rate: a camera that does not wait, of which only the newest frame is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glip_bench.measuring.timing import Timing

__all__ = ["Pace", "follow"]


@dataclass(frozen=True)
class Pace:
    """How well a subject kept up with a camera."""

    rate: float
    """Frames a second the camera gave."""
    offered: int
    """Frames given from the first one taken to the last."""
    taken: int
    latency: Timing
    """From the moment a frame is there to its boxes."""

    @property
    def dropped(self) -> int:
        """Frames that a newer one replaced before the subject was free."""
        return self.offered - self.taken

    @property
    def keeps_up(self) -> bool:
        """Whether no frame was dropped."""
        return self.dropped == 0

    def to_dict(self) -> dict[str, Any]:
        """Return the form of a result file."""
        return {
            "rate": self.rate,
            "offered": self.offered,
            "taken": self.taken,
            "dropped": self.dropped,
            "keeps_up": self.keeps_up,
            "latency_ms": self.latency.to_dict(),
        }


def follow(
    action: Callable[[int], object],
    rate: float,
    frames: int,
    least_taken: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Pace:
    """Run `action` on a camera's frames as they come.

    Frame i is there i / rate seconds after the start. Whenever the action returns, it is given the newest frame that it
    has not had, or waits for the next one. No thread is needed: which frame is the newest follows from the clock.

    Args:
        action: given the frame's number; returns when its boxes are there.
        rate: frames a second, above 0.
        frames: the camera gives at least this many.
        least_taken: the camera goes on until the action had so many, however slow it is.
        clock: gives seconds; for tests.
        sleep: waits so many seconds; for tests.
    """
    start = clock()
    last, taken = -1, 0
    latencies: list[float] = []
    while last + 1 < frames or taken < least_taken:
        # One microsecond more: a wait ends at the frame's own time, give or take rounding.
        newest = math.floor((clock() - start) * rate + 1e-6 * rate)
        if newest <= last:
            sleep(max(0.0, start + (last + 1) / rate - clock()))
            continue
        action(newest)
        latencies.append(clock() - start - newest / rate)
        last, taken = newest, taken + 1
    return Pace(rate, last + 1, taken, Timing.of(latencies))
