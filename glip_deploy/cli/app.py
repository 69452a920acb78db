"""What every command of the toolkit shares: how it is declared, run, and how it ends.

A command is a `typer` application made by `make_app` and run by `run_app`. Data goes to standard output; log, progress,
summaries and errors go to standard error. Exit status: 0 done, 1 an error that the caller can put right (one line, no
traceback), 2 bad usage, 130 after Ctrl-C, 141 if the reader of standard output went away.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from glip_deploy.cli.console import say
from glip_deploy.errors import GlipError

__all__ = ["QUIET", "VERSION", "UsageError", "bad_option", "examples", "make_app", "run_app", "run_main"]

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Bad usage of any kind, as typer raises it (its own class is not public)."""


def make_app(**options: Any) -> typer.Typer:
    """Return an empty application with the conventions of this toolkit; `options` go to `typer.Typer`."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        **options,
    )


def examples(*lines: str, note: str = "") -> str:
    """Return an epilog for `--help`: command lines as typed, then a note."""
    from rich.markup import escape

    return "\n\n".join(["examples:", *(escape(line) for line in lines), *([escape(note)] if note else [])])


def bad_option(option: str, problem: str) -> Exception:
    """Return the error for a value that only makes sense, or not, beside other options: exit status 2."""
    return typer.BadParameter(problem, param_hint=f"'{option}'")


def run_app(app: typer.Typer, program: str, argv: Sequence[str] | None = None, *, extra: str | None = None) -> int:
    """Run an application and return its exit status; nothing but `SystemExit` from a debugger passes through.

    Args:
        app: made by `make_app`; a command may return its exit status.
        program: its name, as people type it.
        argv: arguments without the program's name; None for those of the process.
        extra: the extra of glip-deploy that brings this program's packages, named where one is missing.
    """

    def command() -> int:
        arguments = list(sys.argv[1:] if argv is None else argv)
        return int(app(arguments, prog_name=program, standalone_mode=False) or 0)

    return run_main(command, program, extra=extra)


def run_main(command: Callable[[], int], program: str, *, extra: str | None = None) -> int:
    """Run a function as a program's body: what it raises becomes one line and an exit status; see `run_app`."""
    try:
        return command()
    except UsageError as error:
        context = getattr(error, "ctx", None)
        if context is not None:
            say(context.get_usage())
        say(f"{program}: error: {_one_line(error.format_message())}")  # type: ignore[attr-defined]
        return 2
    except GlipError as error:
        say(f"{program}: error: {error}")
        return 1
    except ImportError as error:
        if extra is None or error.name is None or error.name.startswith("glip_"):
            raise
        say(f"{program}: error: {error.name} is not installed; pip install 'glip-deploy[{extra}]'")
        return 1
    except typer.Exit as ended:
        return int(ended.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        say(f"{program}: interrupted")
        return 130
    except BrokenPipeError:
        _forget_stdout()
        return 141


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _forget_stdout() -> None:
    """Send what is still buffered for a closed pipe nowhere; the interpreter would complain about it at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _print_version(wanted: bool) -> None:
    if wanted:
        from glip_deploy import __version__

        typer.echo(f"glip-deploy {__version__}")
        raise typer.Exit


VERSION = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
]
"""The `--version` option of a command."""

QUIET = Annotated[bool, typer.Option("--quiet", help="Print only errors.")]
"""The `--quiet` option of a command."""
