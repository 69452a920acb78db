"""A process of its own for TensorRT, which may abort, run out of memory or be interrupted without ending the caller.

The two sides exchange lines of JSON. The parent sends `Settings`, then one `GraphJob` after another; the child answers
with the environment, then with progress and one result, or an error, for each. A plugin is loaded in between.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from glip_deploy import errors
from glip_deploy.errors import EngineError, GlipError
from glip_engines.flavours import Dialect, Flavour, library_folder
from glip_engines.trt import BuiltGraph, GraphJob, Settings
from glip_engines.verify import Checked

__all__ = ["Environment", "Worker"]


@dataclass(frozen=True)
class Environment:
    """What the child found."""

    dialect: Dialect
    gpu: str | None
    """Name of this machine's GPU if that is the target."""


class Worker:
    """The parent's side; a context manager, and the child does not outlive it.

    Args:
        settings: what all engines share.

    Raises:
        GlipError: on entering: what `glip_engines.trt.Toolkit` raises, or an EngineError if the child died.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._child: subprocess.Popen[str]
        self._folder: Path
        self._stderr: IO[bytes]
        self.environment: Environment

    def __enter__(self) -> Worker:
        self._folder = Path(tempfile.mkdtemp(prefix="glip-build-"))
        self._stderr = (self._folder / "stderr").open("w+b")
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "glip_engines.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env={**os.environ, **self._library_path()},
                start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
            )
            try:
                answer = self._ask(asdict(self._settings), lambda fraction, phase: None)
                dialect = Dialect(self._settings.flavour, answer["version"], answer["compute_capability"])
                self.environment = Environment(dialect, answer["gpu"])
            except BaseException:
                self._end()
                raise
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._clean()

    def load_plugin(self, library: Path) -> None:
        """Load the library of the deformable convolution's plugin.

        Raises:
            EngineError: it cannot be loaded, or does not hold that plugin.
        """
        self._ask({"plugin": str(library)}, lambda fraction, phase: None)

    def build(self, job: GraphJob, on_progress: Callable[[float, str], None]) -> BuiltGraph:
        """Build one engine.

        Args:
            job: what to build.
            on_progress: called with the done fraction and the name of the phase.

        Raises:
            EngineError: the parser or the builder refused, or the child died.
            OSError: the engine could not be written.
        """
        return msgspec.convert(self._ask(asdict(job), on_progress), BuiltGraph)

    def verify(self, bundle: Path, folder: Path) -> list[Checked]:
        """Run engines on this machine's GPU and compare them with the bundle's graphs; see `verify_engines`.

        Raises:
            EngineError: an engine is wrong or cannot be run, or the child died.
        """
        answer = self._ask({"verify": str(folder), "bundle": str(bundle)}, lambda fraction, phase: None)
        return msgspec.convert(answer["checked"], list[Checked])

    def _library_path(self) -> dict[str, str]:
        """Return the environment in which TensorRT-RTX finds its own library by the name without a version number.

        Once a plugin is loaded its parser opens `libtensorrt_rtx.so`, which its wheel has only with a number, and it
        ends the process where it does not find it.
        """
        libraries = library_folder(self._settings.flavour)
        if libraries is None:
            return {}
        for library in libraries.glob("lib*.so.*"):
            plain = self._folder / f"{library.name.split('.so.')[0]}.so"
            if not plain.is_symlink() and not (libraries / plain.name).exists():
                plain.symlink_to(library.resolve())
        before = os.environ.get("LD_LIBRARY_PATH")
        return {"LD_LIBRARY_PATH": os.pathsep.join([str(self._folder), str(libraries), *([before] if before else [])])}

    def _ask(self, question: dict[str, Any], on_progress: Callable[[float, str], None]) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):  # it died: why follows below
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
        for line in self._child.stdout:
            answer = json.loads(line)
            kind = answer.pop("kind")
            if kind == "progress":
                on_progress(answer["fraction"], answer["phase"])
            elif kind == "result":
                return dict(answer)
            elif kind == "os error":
                raise OSError(answer["number"], answer["reason"])
            else:
                raise getattr(errors, answer["error"], EngineError)(answer["message"])
        raise EngineError(self._how_it_ended())

    def _how_it_ended(self) -> str:
        status = self._child.wait()
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        what = f": {lines[-1][:300]}" if lines else ""
        advice = "; the machine may be out of memory" if how == "SIGKILL" else ""
        return f"{self._settings.flavour} ended the build ({how}){what}{advice}; try other shapes or another precision"

    def _end(self) -> None:
        """Kill the child: a build cannot be interrupted otherwise, and nothing of an unfinished one is kept."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _clean(self) -> None:
        self._stderr.close()
        shutil.rmtree(self._folder, ignore_errors=True)


# -- the child's side -----------------------------------------------------------------------------------------------


class _Reporter:
    """Writes lines to the parent; stops the build when the parent is gone."""

    def __init__(self, channel: IO[str]) -> None:
        self._channel, self._last = channel, 0.0

    def send(self, kind: str, **content: Any) -> None:
        self._channel.write(json.dumps({"kind": kind, **content}) + "\n")
        self._channel.flush()

    def progress(self, fraction: float, phase: str) -> bool:
        now = time.monotonic()
        if now - self._last > 0.1:
            self._last = now
            try:
                self.send("progress", fraction=fraction, phase=phase)
            except OSError:
                return False
        return True


def _serve() -> None:
    # TensorRT's libraries print to stdout: that becomes stderr, and the parent's channel is another descriptor.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    report = _Reporter(channel)
    try:
        from glip_engines.trt import Toolkit

        given = json.loads(sys.stdin.readline())
        toolkit = Toolkit(Settings(**{**given, "flavour": Flavour(given["flavour"])}))
        report.send(
            "result",
            version=toolkit.dialect.version,
            compute_capability=toolkit.dialect.compute_capability,
            gpu=None if toolkit.gpu is None else toolkit.gpu.name,
        )
        for line in sys.stdin:
            request = json.loads(line)
            if "plugin" in request:
                toolkit.load_plugin(request["plugin"])
                report.send("result")
            elif "verify" in request:
                report.send("result", checked=msgspec.to_builtins(_verify(request["bundle"], request["verify"])))
            else:
                report.send("result", **msgspec.to_builtins(toolkit.build(GraphJob(**request), report.progress)))
    except GlipError as error:
        report.send("error", error=type(error).__name__, message=str(error))
    except OSError as error:
        report.send("os error", number=error.errno or 0, reason=error.strerror or str(error))


def _verify(bundle: str, folder: str) -> list[Checked]:
    from glip_deploy.backends.tensorrt import TensorRTBackend
    from glip_deploy.bundle.manifest import Bundle
    from glip_engines.verify import verify_engines

    opened = Bundle.open(Path(bundle), verify=False)
    backend = TensorRTBackend.open(opened, Path(folder))
    try:
        return verify_engines(opened, Path(folder), backend)
    finally:
        backend.close()


if __name__ == "__main__":
    _serve()
