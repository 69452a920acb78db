"""An environment of its own for what is shipped: the wheel is installed there, extra by extra, from the registry."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from parity_data import ROOT

PIP = ("-m", "pip", "--disable-pip-version-check")
Done: TypeAlias = "subprocess.CompletedProcess[str]"
OFFLINE = re.compile(r"Failed to establish a new connection|Name or service not known|name resolution|timed out", re.I)


def run(*command: object, cwd: Path | None = None, timeout: float | None = None, **environment: object) -> Done:
    """Run a command with its output caught.

    Args:
        command: its words.
        cwd: where, this folder by default.
        timeout: seconds after which it is ended, with an exception.
        environment: variables to set; PYTHONPATH is never handed on.
    """
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {name: str(value) for name, value in environment.items()}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, env=variables, timeout=timeout)


def skip_if_offline(done: Done) -> None:
    """Skip where the package registry cannot be reached; never in CI, and for no other fault."""
    if done.returncode and OFFLINE.search(done.stderr) and not os.environ.get("CI"):
        pytest.skip(f"the package registry cannot be reached: {done.stderr.strip().splitlines()[-1][:200]}")


def closure(requirements: Iterable[str]) -> Iterator[metadata.Distribution]:
    """Give installed distributions, with the extras that are named, and all that they require here, each once."""
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras}:
            if (name, extra) in seen:
                continue
            try:
                distribution = metadata.distribution(name)
            except metadata.PackageNotFoundError:  # required, but not installed: pip says whether it is missed
                continue
            if all(name != other for other, _ in seen):
                yield distribution
            seen.add((name, extra))
            waiting += (Requirement(text) for text in required(distribution, extra))


def required(distribution: metadata.Distribution, extra: str = "") -> list[str]:
    """Return what a distribution requires on this machine, by itself ("") or for one of its extras."""
    texts = ((Requirement(text).marker, text) for text in distribution.requires or ())
    return [text for marker, text in texts if marker is None or marker.evaluate({"extra": extra})]


def uv() -> str | None:
    """Return uv, which installs in a fraction of pip's time, or None where it is not."""
    return shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


class CleanEnvironment:
    """A virtual environment that starts empty."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, with_pip=True)
        self.folder, self.wheel = folder, wheel
        self.bin = folder / ("Scripts" if sys.platform == "win32" else "bin")
        self.python = self.bin / "python"
        self._installed: set[str] = set()

    def install(self, *extras: str) -> None:
        """Install the wheel with extras; what an earlier call has installed stays."""
        if self._installed.issuperset(extras) and "" in self._installed:
            return
        wanted = f"{self.wheel}[{','.join(sorted(extras))}]" if extras else self.wheel
        installer = None if (self.folder / "lent").exists() else uv()  # which does not see what is lent
        if installer is None:
            self.pip("install", "--quiet", "--no-compile", wanted)  # what is imported is compiled then
        else:
            done = run(installer, "pip", "install", "--quiet", "--python", self.python, wanted)
            skip_if_offline(done)
            assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        self._installed.update(["", *extras])

    def pip(self, *arguments: object) -> None:
        """Run pip, which must succeed."""
        done = self.run("python", *PIP, *arguments)
        skip_if_offline(done)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]

    def lend(self, *requirements: str) -> None:
        """Make distributions of the running environment, and what they require, look installed here.

        For those too large to be installed for a test. They are linked, not copied; pip, asked for them later, finds
        them there.
        """
        lent = self.folder / "lent"
        lent.mkdir(exist_ok=True)
        for distribution in closure(requirements):
            for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
                if not (lent / top).exists() and top != "__pycache__":
                    (lent / top).symlink_to(str(distribution.locate_file(top)))
        code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        Path(self.run("python", "-c", code).stdout.strip(), "lent.pth").write_text(f"{lent}\n")

    def lend_extras(self, *extras: str) -> None:
        """Lend what the toolkit requires, by itself and for these extras."""
        ours = metadata.distribution("glip-deploy")
        self.lend(*{text for extra in ("", *extras) for text in required(ours, extra)})

    def run(self, program: str, *arguments: object, cwd: Path | None = None, **options: Any) -> Done:
        """Run one of its programs, outside the checkout unless `cwd` says otherwise; options are those of `run`."""
        return run(self.bin / program, *arguments, cwd=cwd or self.folder, **options)

    def distributions(self) -> set[str]:
        """Return the names of all that is installed, normalized."""
        code = (
            "import re; from importlib.metadata import distributions as d;"
            "print(*{re.sub(r'[-_.]+', '-', one.name).lower() for one in d()})"
        )
        return set(self.run("python", "-c", code).stdout.split())


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout in an isolated environment."""
    done = run(sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    skip_if_offline(done)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    return path
