"""How far a build is: TensorRT reports nested phases, of which this makes one fraction."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Fractions", "make_monitor"]


class Fractions:
    """The done fraction of nested phases; called from several threads.

    Args:
        on_progress: called with the fraction and the name of the innermost phase; returns False to stop the build.
    """

    def __init__(self, on_progress: Callable[[float, str], bool]) -> None:
        self._lock = threading.Lock()
        self._phases: dict[str, list[int]] = {}
        """Innermost last: steps and steps done."""
        self._on_progress = on_progress

    def start(self, name: str, steps: int) -> None:
        """Enter a phase."""
        with self._lock:
            self._phases[name] = [max(1, steps), 0]

    def step(self, name: str, index: int) -> bool:
        """Finish a step of a phase; return whether to go on."""
        with self._lock:
            if name in self._phases:
                self._phases[name][1] = index + 1
            fraction = 0.0
            for steps, done in reversed(self._phases.values()):
                fraction = min(1.0, (done + fraction) / steps)
            return self._on_progress(fraction, name)

    def finish(self, name: str) -> None:
        """Leave a phase."""
        with self._lock:
            self._phases.pop(name, None)


def make_monitor(module: Any, on_progress: Callable[[float, str], bool]) -> Any:
    """Return an `IProgressMonitor` of a TensorRT module that calls `on_progress` (see `Fractions`)."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # the base class is known at run time only
        """Passes TensorRT's phases on."""

        def __init__(self) -> None:
            super().__init__()
            self.fractions = Fractions(on_progress)

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self.fractions.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self.fractions.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            self.fractions.finish(phase_name)

    return Monitor()
