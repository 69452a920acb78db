"""Standard error of a command: plain lines, log records, and progress bars where it is a terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

__all__ = [
    "Steps",
    "frame_progress",
    "is_terminal",
    "log_lines",
    "one_line",
    "phase_progress",
    "say",
    "stderr_for_lines",
    "stdout_for_data",
]

_BARS: list[Progress] = []
"""The bar that is shown, if any; lines are printed above it."""
_OWN: list[TextIO] = []
"""Where lines and bars go instead of standard error, inside `stderr_for_lines`."""


def say(line: str) -> None:
    """Print a line to standard error, above the progress bar if there is one; nothing where it is closed."""
    stream = _stderr()
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):
        if _BARS:
            _BARS[-1].console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=stream, flush=True)


def one_line(message: str) -> str:
    """Return a message as a single line: line breaks become spaces, other control characters are spelled out."""
    line = " ".join(message.splitlines())
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


@contextlib.contextmanager
def stdout_for_data() -> Iterator[None]:
    """Keep standard output for what Python writes to it: what C libraries print there goes to standard error."""
    before = sys.stdout
    try:
        ours = before is not None and before.fileno() == 1
    except (OSError, ValueError):  # not a file: captured, or closed
        ours = False
    if not ours:
        yield
        return
    before.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(os.dup(kept), "w", encoding=before.encoding, errors=before.errors)
    try:
        yield
        sys.stdout.flush()
    finally:
        data, sys.stdout = sys.stdout, before
        os.dup2(kept, 1)
        os.close(kept)
        with contextlib.suppress(OSError):
            data.close()


@contextlib.contextmanager
def stderr_for_lines(*, wanted: bool = True) -> Iterator[None]:
    """Keep standard error for `say` and progress bars: what others print there, libraries and processes, is lost.

    Args:
        wanted: False to leave it as it is, to look for a fault.
    """
    before = sys.stderr
    try:
        ours = wanted and before is not None and before.fileno() == 2
    except (OSError, ValueError):  # not a file: captured, or closed
        ours = False
    if not ours:
        yield
        return
    before.flush()
    kept = os.dup(2)
    with os.fdopen(os.dup(2), "w", encoding=before.encoding, errors=before.errors, buffering=1) as own:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        _OWN.append(own)
        try:
            yield
        finally:
            _OWN.remove(own)
            before.flush()
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def log_lines(program: str, level: str, *names: str) -> Iterator[None]:
    """Write the records of these loggers as `PROGRAM: LEVEL: MESSAGE`, a line each, on standard error.

    Args:
        program: the program's name.
        level: "debug", "info", "warning" or "error".
        names: of the loggers; all of the toolkit's where none is given.
    """
    handler = _Lines(program)
    loggers = [
        logging.getLogger(name) for name in names or ("glip_deploy", "glip_export", "glip_engines", "glip_bench")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level.upper())
    try:
        yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(old)


class _Lines(logging.Handler):
    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{self._program}: {record.levelname.lower()}: {one_line(record.getMessage())}")
        if record.exc_info and record.exc_info[0] is not None:  # a fault of the program's own, in one that goes on
            say("".join(traceback.format_exception(*record.exc_info)).rstrip())


@contextlib.contextmanager
def frame_progress(total: int | None, description: str, *, show: bool = True) -> Iterator[Callable[[], None]]:
    """Show frames done, frames a second and the time left; gives a function to call after each frame.

    Args:
        total: number of frames, or None where it is unknown.
        description: what is going on.
        show: False for no bar at all; there is none where standard error is no terminal either.
    """
    if not show or not is_terminal():
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        """Frames a second, over the last of them."""

        def render(self, task: object) -> Text:
            speed = getattr(task, "speed", None)
            return Text("" if speed is None else f"{speed:.1f} fps")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=_console(), transient=True) as bar:
        task = bar.add_task(description, total=total)
        _BARS.append(bar)
        try:
            yield lambda: bar.advance(task)
        finally:
            _BARS.remove(bar)


@contextlib.contextmanager
def phase_progress(*, quiet: bool = False) -> Iterator[Callable[[str, float, str], None]]:
    """Show how far each of several long steps is: a bar with the running time on a terminal, a line a step elsewhere.

    Gives a function to call with the step's name, its done fraction (0 to 1) and the phase it is in. The bar starts
    again with each step and never moves back.

    Args:
        quiet: show nothing.
    """
    begun: list[str] = []
    if quiet or not is_terminal():

        def line(step: str, fraction: float, phase: str) -> None:
            if not quiet and step not in begun:
                begun.append(step)
                say(step)

        yield line
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TaskProgressColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_console(), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        _BARS.append(bar)

        def update(step: str, fraction: float, phase: str) -> None:
            done = bar.tasks[task].completed if begun == [step] else 0.0
            begun[:] = [step]
            bar.update(task, completed=max(done, fraction), description=f"{step}: {phase}"[:60])

        try:
            yield update
        finally:
            _BARS.remove(bar)


class Steps:
    """A known number of steps: a bar with the running time on a terminal, a line a step elsewhere.

    Args:
        count: number of steps.
        quiet: show nothing.
    """

    def __init__(self, count: int, *, quiet: bool = False) -> None:
        self._count, self._quiet, self._begun = count, quiet, 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Steps:
        if not self._quiet and is_terminal():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), console=_console(), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._count)
            _BARS.append(self._bar)
        return self

    def step(self, name: str) -> None:
        """Show that a step begins, and so that the one before is done."""
        self._begun += 1
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._begun - 1, description=name)
        elif not self._quiet:
            say(f"[{self._begun}/{self._count}] {name}")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            _BARS.remove(self._bar)


def _stderr() -> TextIO | None:
    return _OWN[-1] if _OWN else sys.stderr


def is_terminal() -> bool:
    """Return whether lines and bars are shown on a terminal."""
    stream = _stderr()
    return stream is not None and stream.isatty()


def _console() -> Console:
    from rich.console import Console

    return Console(file=_OWN[-1]) if _OWN else Console(stderr=True)
