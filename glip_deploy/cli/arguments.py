"""How options are declared, and the values that several commands take: numbers in a range, NAME=VALUE, log levels.

The parsers raise `typer.BadParameter`: bad usage, with the value and the legal range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import typer

from glip_deploy.cli.app import UsageError, plain

__all__ = [
    "ClassThreshold",
    "LogLevel",
    "at_least",
    "class_threshold",
    "flag",
    "only_one_of",
    "option",
    "probability",
    "seconds",
    "share_of_gpus",
]


class LogLevel(StrEnum):
    """The least serious log records that are shown."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class ClassThreshold:
    """A score threshold for one class."""

    name: str
    value: float


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the parser of a whole number of at least `least`, and at most `most` where that is given."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            limit = "" if most is None else f" and at most {most}"
            raise typer.BadParameter(f"{text!r} is not a whole number of at least {least}{limit}")
        return value

    return whole_number


def seconds(text: str) -> float:
    """Parse a finite number of seconds above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{text!r} is not a number of seconds above 0")
    return value


def probability(text: str) -> float:
    """Parse a number in [0, 1]."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text!r} is not a number in [0, 1]")
    return value


def share_of_gpus(text: str) -> float:
    """Parse a number of GPUs above 0: a whole number, or a fraction of one."""
    value = _number(text)
    if not (0 < value <= 1 or (value < math.inf and value == int(value) > 0)):
        raise typer.BadParameter(f"{text!r} is neither a whole number of GPUs of at least 1 nor a fraction of one")
    return value


def class_threshold(text: str) -> ClassThreshold:
    """Parse NAME=VALUE, a class and a number in [0, 1]; the name may hold an equals sign itself."""
    name, equals, value = text.rpartition("=")
    if not equals or not name.strip():
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE, such as person=0.4")
    return ClassThreshold(name.strip(), probability(value))


def option(
    metavar: str | None, help: str, panel: str | None = None, parser: Callable[[str], Any] | None = None, name: str = ""
) -> Any:
    """Return a `typer.Option` that takes a value.

    Args:
        metavar: what stands for the value in `--help`.
        help: a sentence, shown as it is; see `glip_deploy.cli.app.plain`.
        panel: the group in `--help`.
        parser: converts the value, or raises `typer.BadParameter`.
        name: such as "--class", where it is not that of the parameter.
    """
    names = [name] if name else []
    return typer.Option(*names, metavar=metavar, help=plain(help), rich_help_panel=panel, parser=parser)


def flag(name: str, help: str, panel: str | None = None) -> Any:
    """Return a `typer.Option` that takes no value."""
    return typer.Option(name, metavar="", help=plain(help), rich_help_panel=panel)


def only_one_of(options: Mapping[str, object], *, required: bool = False) -> None:
    """Check that at most one of some options was given, or exactly one where that is required.

    Args:
        options: option -> its value; None, False and an empty list count as not given.
        required: one of them must be given.

    Raises:
        UsageError: several were given, or none.
    """
    given = [name for name, value in options.items() if value is not None and value is not False and value != []]
    if len(given) > 1:
        raise UsageError(f"argument {given[1]}: not allowed with argument {given[0]}")
    if required and not given:
        raise UsageError(f"one of the arguments {' '.join(options)} is required")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
