"""What every command of the toolkit shares: how it is declared, how it runs, and how it ends.

A command is a `typer` application made by `make_app` and run by `run_app`. Data goes to standard output; log records,
progress, summaries and errors go to standard error. Exit status: 0 done, 1 an error that the caller can put right (one
line, no traceback), 2 bad usage (one line), 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 141 if the reader of
standard output went away.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from glip_deploy.cli.console import one_line, say
from glip_deploy.errors import GlipError, OutputError

__all__ = ["QUIET", "VERSION", "UsageError", "bad_option", "examples", "make_app", "plain", "run_app", "run_main"]

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Bad usage of any kind, as typer raises it (its own class is not public)."""


class _Help:
    """Prints the examples below the options unchanged: rich would wrap them, and they could not be copied."""

    epilog: str | None

    def format_help(self, context: Any, formatter: Any) -> None:
        """Print the help."""
        epilog, self.epilog = self.epilog, None
        super().format_help(context, formatter)  # type: ignore[misc]
        self.epilog = epilog
        if epilog:
            typer.echo(epilog)


class _Command(_Help, TyperCommand):
    pass


class _Group(_Help, TyperGroup):
    pass


class _App(typer.Typer):
    def command(self, name: str | None = None, **options: Any) -> Any:
        """Declare a command; see `typer.Typer.command`."""
        return super().command(name, **{"cls": _Command, **options})


def make_app(**options: Any) -> typer.Typer:
    """Return an empty application with the conventions of this toolkit; `options` go to `typer.Typer`."""
    return _App(
        cls=_Group,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        **options,
    )


def plain(text: str) -> str:
    """Return a help text in which [words in brackets] are shown as they are, not taken for markup."""
    return re.sub(r"\[(?=[a-z#/@])", r"\\[", text)


def examples(*lines: str, note: str = "") -> str:
    """Return an epilog for `--help`: the heading "examples:", command lines to be copied, then a note."""
    commands = "\n".join(f"  {line}" for line in lines)
    return "\n".join(["examples:", commands, *(["", note] if note else [])])


def bad_option(option: str, problem: str) -> Exception:
    """Return the error for a value that only makes sense, or not, beside other options: exit status 2."""
    return typer.BadParameter(problem, param_hint=f"'{option}'")


def run_app(app: typer.Typer, program: str, argv: Sequence[str] | None = None, *, extra: str | None = None) -> int:
    """Run an application and return its exit status.

    Args:
        app: made by `make_app`; a command may return its exit status.
        program: its name, as typed.
        argv: arguments without the program's name; None for those of the process.
        extra: the extra of glip-deploy that brings this program's packages, named where one is missing.
    """

    def command() -> int:
        # Not `app()`: that turns Ctrl-C and a closed pipe into exit statuses of its own and prints nothing.
        parsed = typer.main.get_command(app)
        with parsed.make_context(program, list(sys.argv[1:] if argv is None else argv)) as context:
            return int(parsed.invoke(context) or 0)

    return run_main(command, program, extra=extra)


def run_main(command: Callable[[], int], program: str, *, extra: str | None = None) -> int:
    """Run a function as a program's body: what it raises becomes one line and an exit status; see `run_app`.

    SIGTERM and SIGHUP raise KeyboardInterrupt in it, as Ctrl-C does, so that it ends as orderly.
    """
    _open_closed_streams()
    with _signals_as_interrupts() as received:
        status = _status(command, program, extra, received)
    return 128 + received[0] if status == 130 and received else status


def _status(command: Callable[[], int], program: str, extra: str | None, received: Sequence[int]) -> int:
    try:
        return command()
    except Exception as error:
        # An interruption while a library is imported comes out as whatever that library makes of it.
        if not received or isinstance(error, typer.Exit | OutputError):
            return _status_of(error, program, extra)
        say(f"{program}: interrupted")
        return 130
    except KeyboardInterrupt:
        say(f"{program}: interrupted")
        return 130


def _status_of(raised: Exception, program: str, extra: str | None) -> int:
    try:
        raise raised
    except UsageError as error:
        say(f"{program}: error: {one_line(_usage_problem(error, program))}")
        return 2
    except GlipError as error:
        say(f"{program}: error: {one_line(str(error))}")
        return 1
    except ImportError as error:
        if extra is None or error.name is None or error.name.startswith("glip_"):
            raise
        say(f"{program}: error: {error.name} is not installed; pip install 'glip-deploy[{extra}]'")
        return 1
    except typer.Exit as ended:
        return int(ended.exit_code)
    except typer.Abort:
        say(f"{program}: interrupted")
        return 130
    except BrokenPipeError:
        _forget_stdout()
        return 141
    except OSError as error:
        if error.filename is None:  # not a file that the caller named, so a bug
            raise
        say(f"{program}: error: {one_line(f'{error.filename} cannot be used ({error.strerror})')}")
        return 1


def _usage_problem(error: Any, program: str) -> str:
    context = error.ctx
    if type(error) is not typer.BadParameter:
        problem = error.format_message().rstrip(".")
        return f"{problem}; see {context.command_path if context else program} --help"
    named = str(error.param_hint or "").strip("'") or "/".join(error.param.opts if error.param else ())
    problem = str(error.message).removeprefix("Value error, ").rstrip(".")  # as typer words what a type refuses
    return f"argument {named}: {problem}" if named else problem


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP, as Python does on SIGINT; gives the numbers of those that came.

    A signal that is ignored (nohup) or handled already is left alone.
    """
    received: list[int] = []
    late: list[threading.Timer] = []
    report = sys.unraisablehook

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    def unraisable(problem: Any) -> None:
        # A signal that comes while an object is freed raises in its `__del__`, which passes nothing on: it would be
        # lost, as would be what is raised here, so it is sent once more a little later.
        if not received or not issubclass(problem.exc_type, KeyboardInterrupt):
            report(problem)
            return
        late.append(threading.Timer(0.01, _interrupt_main, (received[-1],)))
        late[-1].daemon = True
        late[-1].start()

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        for number in numbers:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, interrupt)
        sys.unraisablehook = unraisable
    try:
        yield received
    finally:
        if sys.unraisablehook is unraisable:
            sys.unraisablehook = report
        for timer in late:
            timer.cancel()
            with contextlib.suppress(KeyboardInterrupt):  # of a signal that it has just sent: the command is done
                timer.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt_main(number: int) -> None:
    """Send a signal to the main thread, from another one."""
    if sys.platform == "win32":
        _thread.interrupt_main(number)
    elif (ident := threading.main_thread().ident) is not None:
        signal.pthread_kill(ident, number)  # which also ends what the thread waits for


def _open_closed_streams() -> None:
    """Connect standard input, output and error to the null device where the process was started without them.

    Otherwise the next file that is opened takes their number, and messages of C libraries are written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free


def _forget_stdout() -> None:
    """Discard what is still buffered for a closed pipe, about which the interpreter would print an error at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _print_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        from glip_deploy import __version__

        typer.echo(f"{context.find_root().info_name} {__version__}")
        raise typer.Exit


VERSION = Annotated[
    bool,
    typer.Option("--version", metavar="", help="Print the version and exit.", callback=_print_version, is_eager=True),
]
"""The `--version` option of a command."""

QUIET = Annotated[bool, typer.Option("--quiet", metavar="", help="Print only errors.")]
"""The `--quiet` option of a command."""
