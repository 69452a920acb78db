"""The layout of the C++ runtime's sources, and what clang-tidy finds in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from runtime_build import ROOT, run

ROOM = ROOT / "engines" / "runtime"
SOURCES = sorted(file for kind in ("*.cpp", "*.hpp", "*.c", "*.h") for file in ROOM.rglob(kind))
SLOW = os.environ.get("GLIP_SLOW") == "1"
ALWAYS = tuple(ROOM / "src" / name for name in ("bundle.cpp", "c_api.cpp", "frames.cpp", "prompt_chunks.cpp"))
"""Of those that read bundles, prompts and pictures, and the C interface, as many as take less than 20 s of CPU."""
QUICK = "-clang-analyzer-*,-bugprone-reserved-identifier"
"""What takes more than a third of the time for all of them."""
COMPILED = tuple(file for file in SOURCES if file.suffix in (".c", ".cpp")) if SLOW else ALWAYS


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


@pytest.fixture(scope="module")
def tidy():
    """clang-tidy 14: another version has other checks."""
    if shutil.which("clang-tidy") is None:
        pytest.skip("clang-tidy is not installed")
    version = subprocess.run(["clang-tidy", "--version"], capture_output=True, text=True, check=True).stdout
    if "version 14." not in version:
        pytest.skip(f"clang-tidy 14 has the checks of .clang-tidy; here is {' '.join(version.split())}")
    return "clang-tidy"


@pytest.fixture(scope="module")
def databases(tidy, runtime, tmp_path_factory):
    """The folders whose `compile_commands.json` say how each source is compiled, by source."""
    folders = [runtime]
    if SLOW:  # what is compiled in OpenVINO's place only
        folders.append(tmp_path_factory.mktemp("without_openvino"))
        without = [f"-DGLIP_{part}=OFF" for part in ("OPENVINO", "TENSORRT", "TENSORRT_RTX", "EXAMPLES")]
        run("cmake", "-S", ROOM, "-B", folders[1], "-DGLIP_TESTS=ON", *without)
    found = {}
    for folder in reversed(folders):
        for entry in json.loads((folder / "compile_commands.json").read_text()):
            found[Path(entry["file"])] = folder
    return found


def findings(tidy, database, file, *options):
    """Return what it finds in a file and the headers of this project, a line each.

    A file that is compiled more than once, as for TensorRT and TensorRT-RTX, is looked at each way.
    """
    done = subprocess.run(
        [tidy, "--quiet", "-p", database, *options, file], capture_output=True, text=True, check=False
    )
    found = [line.removeprefix(f"{ROOT}/") for line in done.stdout.splitlines() if "error: " in line]
    assert (done.returncode == 0) == (not found), f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return found


@pytest.mark.parametrize("file", COMPILED, ids=lambda file: str(file.relative_to(ROOM)))
def test_clang_tidy_finds_nothing(tidy, databases, file):
    """In four files without what takes longest; with GLIP_SLOW=1 in all, with every check."""
    if file not in databases:
        pytest.skip(f"{file.name} is not built here: the headers of its backend, or OpenCV, were not found")
    found = findings(tidy, databases[file], file, *([] if SLOW else [f"--checks={QUICK}"]))
    assert not found, "\n" + "\n".join(found)


def test_clang_tidy_finds_a_fault(tidy, tmp_path):
    folder = tmp_path / "engines" / "runtime" / "src"
    folder.mkdir(parents=True)
    shutil.copy(ROOM / ".clang-tidy", folder.parent)
    file, header = folder / "x.cpp", folder / "x.hpp"
    commands = [
        {"directory": str(folder), "file": str(file), "arguments": ["c++", "-std=c++17", *more, "-c", str(file)]}
        for more in ([], ["-DGLIP_RTX"])
    ]
    (tmp_path / "compile_commands.json").write_text(json.dumps(commands))
    file.write_text('#include "x.hpp"\nlong area(int side) { return squared(side); }\n')
    sound = "inline long squared(int side) { return static_cast<long>(side) * side; }\n"
    header.write_text(sound)
    assert findings(tidy, tmp_path, file) == []
    header.write_text("inline long squared(int side) { return side * side; }\n")  # too small a type for the product
    found = findings(tidy, tmp_path, file)
    assert found
    assert all("x.hpp:1:" in line and "[bugprone-implicit-widening-of-multiplication-result" in line for line in found)
    # What only one of the ways to compile it has.
    header.write_text(f"{sound}#ifdef GLIP_RTX\ninline int* nothing() {{ return 0; }}\n#endif\n")
    (one,) = findings(tidy, tmp_path, file)
    assert "x.hpp:3:" in one and "[modernize-use-nullptr" in one
