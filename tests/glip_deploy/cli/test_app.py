"""What all commands share: help, usage errors, exit statuses, signals, and lines on standard error."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
from typing import Annotated

import pytest
import typer
from rich.progress import Progress

from glip_deploy.cli import console
from glip_deploy.cli.app import VERSION, bad_option, examples, make_app, plain, run_app, run_main
from glip_deploy.cli.arguments import ClassThreshold, at_least, class_threshold, only_one_of, probability, seconds
from glip_deploy.errors import GlipError, OptionError

LONG = 'tool --prompt "a man with a [green hat]" --source rtsp://camera/stream --json - | jq .detections'


def tool(body=lambda count, name: None, **options):
    app = make_app(**options)

    @app.command(epilog=examples(LONG, "tool --count 2", note="Exit status: 0 done."))
    def command(
        count: Annotated[int, typer.Option(parser=at_least(1), metavar="N", help=plain("How many [of them]."))],
        name: Annotated[str | None, typer.Option(metavar="NAME", help="Their name.")] = None,
        version: VERSION = False,
    ) -> int | None:
        """Do something."""
        return body(count, name)

    return app


def test_help_prints_brackets_and_unwrapped_examples(capsys):
    assert run_app(tool(), "tool", ["--help"]) == 0
    out, err = capsys.readouterr()
    assert out.strip().startswith("Usage: tool [OPTIONS]") and err == ""
    assert "How many [of them]." in out and f"examples:\n  {LONG}\n  tool --count 2\n\nExit status" in out


def test_the_help_of_a_command_among_several(capsys):
    app = make_app(epilog=examples("tools first"))
    for name in ("first", "second"):
        app.command(name, epilog=examples(f"tools {name} {LONG}"))(lambda: None)
    assert run_app(app, "tools", ["--help"]) == 0
    assert "examples:\n  tools first\n" in capsys.readouterr().out
    assert run_app(app, "tools", ["second", "--help"]) == 0
    assert f"tools second {LONG}" in capsys.readouterr().out


def test_version_names_the_program(capsys):
    from glip_deploy import __version__

    assert run_app(tool(), "tool", ["--version"]) == 0
    assert capsys.readouterr().out == f"tool {__version__}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing option '--count'; see tool --help"),
        (["--count"], "Option '--count' requires an argument; see tool --help"),
        (["--count", "0"], "argument --count: '0' is not a whole number of at least 1"),
        (["--count", "1", "--nonsense"], "No such option: --nonsense; see tool --help"),
        (["--count", "1", "--name", "bad"], "argument --name: needs --other to have an effect"),
        (["--count", "1", "--name", "two\nlines"], "argument --name: two lines"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(args, message, capsys):
    def body(count, name):
        if name is not None:
            raise bad_option("--name", "needs --other to have an effect" if name == "bad" else name)

    assert run_app(tool(body), "tool", args) == 2
    assert capsys.readouterr() == ("", f"tool: error: {message}\n")


def test_the_status_a_command_returns(capsys):
    assert run_app(tool(lambda count, name: count), "tool", ["--count", "7"]) == 7
    assert run_app(tool(), "tool", ["--count", "7"]) == 0
    assert capsys.readouterr() == ("", "")


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OptionError("count is 0; legal is 1"), 1, "tool: error: count is 0; legal is 1\n"),
        (GlipError("name a\nb \x1b[31mis bad\udc80"), 1, "tool: error: name a b \\x1b[31mis bad\\udc80\n"),
        (OSError(36, "File name too long", "nnn"), 1, "tool: error: nnn cannot be used (File name too long)\n"),
        (KeyboardInterrupt(), 130, "tool: interrupted\n"),
        (
            ModuleNotFoundError("no", name="torch"),
            1,
            "tool: error: torch is not installed; pip install 'glip-deploy[x]'\n",
        ),
    ],
)
def test_an_error_is_one_line_and_a_status(error, status, line, capsys):
    assert run_main(raising(error), "tool", extra="x") == status
    assert capsys.readouterr() == ("", line)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(raising(ZeroDivisionError()), "tool")
    with pytest.raises(OSError, match="Bad file descriptor"):
        run_main(raising(OSError(9, "Bad file descriptor")), "tool")
    with pytest.raises(ModuleNotFoundError):
        run_main(raising(ModuleNotFoundError("no", name="glip_deploy.x")), "tool", extra="x")


def run_python(code, **options):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send a signal to one process alone")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_end_a_command_in_an_orderly_way(name, status):
    default = "default_int_handler" if name == "SIGINT" else "SIG_DFL"
    done = run_python(f"""
        import os, signal, sys
        from glip_deploy.cli.app import run_main

        signal.signal(signal.{name}, signal.{default})  # whoever runs the tests may ignore it (nohup)

        def command():
            try:
                os.kill(os.getpid(), signal.{name})
            finally:
                print("completed")

        sys.exit(run_main(command, "tool"))
    """)
    assert (done.returncode, done.stdout, done.stderr) == (status, "completed\n", "tool: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send a signal to one process alone")
def test_an_interruption_that_a_library_turns_into_another_error():
    """As ONNX Runtime's import does: "ONNX Runtime is not installed", with status 1."""
    done = run_python("""
        import os, signal, sys
        from glip_deploy.cli.app import run_main
        from glip_deploy.errors import MissingPackage

        signal.signal(signal.SIGINT, signal.default_int_handler)

        def command():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise MissingPackage("it is not installed") from None

        sys.exit(run_main(command, "tool"))
    """)
    assert (done.returncode, done.stderr) == (130, "tool: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send a signal to one process alone")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_an_object_is_freed_is_not_lost(name, status):
    """Python reports what is raised in `__del__` as ignored, with a traceback, and goes on."""
    code = f"""
        import os, signal, sys, time
        from glip_deploy.cli.app import run_main

        class Freed:
            def __del__(self):
                os.kill(os.getpid(), signal.{name})

        def command():
            Freed()
            time.sleep(20)
            return 0

        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
        sys.exit(run_main(command, "tool"))
    """
    done = run_python(code)
    assert (done.returncode, done.stderr) == (status, "tool: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_a_signal_that_is_ignored_stays_ignored():
    done = run_python("""
        import os, signal, sys
        from glip_deploy.cli.app import run_main

        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        sys.exit(run_main(lambda: os.kill(os.getpid(), signal.SIGHUP) or 5, "tool"))
    """)
    assert done.returncode == 5, done.stderr


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    assert run_main(lambda: 0, "tool") == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform == "win32", reason="the shell's way to close a stream")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_put_messages_into_files(tmp_path, closed):
    code = """
        import os, sys
        from glip_deploy.cli.app import run_main
        from glip_deploy.cli.console import say

        def command():
            with open("results", "w") as file:
                file.write("result")
                file.flush()
                os.write(2, b"a C library's warning")
                say("a message")
            return 3

        sys.exit(run_main(command, "tool"))
    """
    (tmp_path / "tool.py").write_text(textwrap.dedent(code))
    script = f'"{sys.executable}" tool.py {closed}'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        script, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert done.returncode == 3 and done.stdout == ""
    assert ("a message" in done.stderr) == ("2>" not in closed)
    assert (tmp_path / "results").read_text() == "result"


# --- option values ---


@pytest.mark.parametrize("text", ["2", "0.5", "x", "", "1" * 5000])
def test_numbers_out_of_range(text):
    with pytest.raises(typer.BadParameter, match="is not a whole number of at least 3"):
        at_least(3)(text)
    if text != "0.5":
        with pytest.raises(typer.BadParameter, match=r"is not a number in \[0, 1\]"):
            probability(text)


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "soon"])
def test_seconds_out_of_range(text):
    with pytest.raises(typer.BadParameter, match="is not a number of seconds above 0"):
        seconds(text)


def test_values():
    assert (at_least(3)("3"), probability("0.25"), seconds("1e2")) == (3, 0.25, 100.0)
    assert class_threshold(" traffic light =0.3") == ClassThreshold("traffic light", 0.3)
    assert class_threshold("a=b=0.3") == ClassThreshold("a=b", 0.3)
    for text in ("person", "=0.3", " =1"):
        with pytest.raises(typer.BadParameter, match="is not NAME=VALUE"):
            class_threshold(text)


def test_options_that_cannot_be_combined(capsys):
    only_one_of({"--a": None, "--b": False, "--c": []})
    only_one_of({"--a": None, "--b": "", "--c": []}, required=True)
    assert run_main(lambda: only_one_of({"--a": "x", "--b": 0}), "tool") == 2
    assert run_main(lambda: only_one_of({"--a": None, "--b": None}, required=True), "tool") == 2
    assert capsys.readouterr().err.splitlines() == [
        "tool: error: argument --b: not allowed with argument --a; see tool --help",
        "tool: error: one of the arguments --a --b is required; see tool --help",
    ]


# --- standard error ---


def test_log_records_are_lines(capsys):
    logger = logging.getLogger("glip_deploy.somewhere")
    before = logging.getLogger("glip_deploy").level
    with console.log_lines("tool", "warning"):
        logger.info("not shown")
        logger.warning("shown\non one line")
    logger.warning("not shown either")
    assert capsys.readouterr().err == "tool: warning: shown on one line\n"
    assert logging.getLogger("glip_deploy").level == before


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_terminals(monkeypatch, capsys):
    with console.frame_progress(2, "detecting") as advance:
        advance()
    with console.Steps(2) as steps:
        steps.step("first")
        steps.step("second")
    assert capsys.readouterr() == ("", "[1/2] first\n[2/2] second\n")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.frame_progress(2, "detecting") as advance:
        advance()
        console.say("a line")
        advance()
    with console.Steps(1) as steps:
        steps.step("first")
    shown = sys.stderr.getvalue()
    assert "detecting" in shown and "2/2" in shown and "a line\n" in shown and "first" in shown
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.frame_progress(2, "detecting", show=False) as advance:
        advance()
    assert sys.stderr.getvalue() == ""


def test_progress_within_long_steps(monkeypatch, capsys):
    def two_steps():
        with console.phase_progress() as update:
            for step in ("text engine", "image engine"):
                for fraction in (0.0, 0.7, 0.4):  # a phase of which TensorRT knew less than it thought
                    update(step, fraction, "timing")

    two_steps()
    assert capsys.readouterr() == ("", "text engine\nimage engine\n")
    with console.phase_progress(quiet=True) as update:
        update("text engine", 0.0, "timing")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    seen = []
    update_bar = Progress.update

    def spy(bar, task, **values):
        seen.append((values["description"], values["completed"]))
        update_bar(bar, task, **values)

    monkeypatch.setattr(Progress, "update", spy)
    two_steps()
    steps = ["text engine: timing"] * 3 + ["image engine: timing"] * 3
    assert seen == list(zip(steps, [0.0, 0.7, 0.7] * 2, strict=True))


def test_a_closed_standard_error_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    console.say("a line")
    with console.frame_progress(1, "detecting") as advance:
        advance()
    assert capsys.readouterr().out == ""
