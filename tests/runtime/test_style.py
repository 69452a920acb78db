"""The layout of the C++ runtime's sources."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from runtime_build import ROOT

ROOM = ROOT / "engines" / "runtime"
SOURCES = sorted(file for kind in ("*.cpp", "*.hpp", "*.c", "*.h") for file in ROOM.rglob(kind))


@pytest.fixture(scope="module")
def formatter():
    """clang-format 14: another version lays out some lines in another way."""
    if shutil.which("clang-format") is None:
        pytest.skip("clang-format is not installed")
    version = subprocess.run(["clang-format", "--version"], capture_output=True, text=True, check=True).stdout
    if "version 14." not in version:
        pytest.skip(f"clang-format 14 decides about layout; here is {version.strip()}")
    return "clang-format"


def test_layout(formatter):
    assert len(SOURCES) > 30
    done = subprocess.run([formatter, "--dry-run", "-Werror", *SOURCES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run clang-format -i on\n{done.stderr[-3000:]}"


def test_another_layout_is_found(formatter, tmp_path):
    shutil.copy(ROOM / ".clang-format", tmp_path)
    (tmp_path / "x.cpp").write_text("int  x ;\n")
    done = subprocess.run([formatter, "--dry-run", "-Werror", tmp_path / "x.cpp"], capture_output=True, check=False)
    assert done.returncode != 0
