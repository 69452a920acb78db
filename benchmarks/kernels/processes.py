"""A program that runs as a process group of its own, with a time limit and its peak memory.

This file is also the small program in between that measures: `python processes.py COMMAND...` runs a command and prints
the peak memory, in bytes, of the largest process of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Measured", "run_measured"]


@dataclass(frozen=True)
class Measured:
    """How a program ended."""

    status: int | None
    """Its exit status; None if it was stopped at the limit."""
    said: str
    """What it wrote to standard error."""
    peak_bytes: int
    """Peak resident memory of the largest of its processes."""


def run_measured(command: Sequence[str], limit: float) -> Measured:
    """Run a program to its end, or for `limit` seconds; its standard output is thrown away. Not for Windows."""
    # Not from this process: a child's peak begins at the memory of the process that starts it.
    child = subprocess.Popen(
        [sys.executable, __file__, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    late = False
    try:
        printed, said = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        if child.returncode is None:  # late, or interrupted: nothing is left running
            os.killpg(child.pid, signal.SIGTERM)
            child.communicate()
    if late:
        return Measured(None, "", 0)
    return Measured(child.returncode, said, int(printed or 0))


def _run(command: Sequence[str]) -> int:
    import resource

    status = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    sys.stdout.write(str(peak * (1 if sys.platform == "darwin" else 1024)))
    return status


if __name__ == "__main__":
    sys.exit(_run(sys.argv[1:]))
