"""Ask pip's resolver whether the `pip install` lines of docs/deploy/recipes can be had; nothing is installed.

    python benchmarks/kernels/check_recipes.py

Each page names its Python and machine in a comment, `<!-- resolver: 3.11 x86_64 -->`. The full TensorRT's library is on
NVIDIA's own index: of it, the bindings alone are resolved, which the package registry has too.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "docs" / "deploy" / "recipes"
GLIBC = (5, 12, 17, 27, 28, 31, 34, 35)
"""Second numbers of the C library's versions that wheels are made for."""
BINDINGS = (
    (re.compile(r"^tensorrt==(8[\d.]+?)(\.post\d+)?$"), r"tensorrt-bindings==\1"),
    (re.compile(r"^tensorrt-(cu\d+)==(.+)$"), r"tensorrt-\1-bindings==\2"),
    # An archive of sources, which pip does not take for another machine.
    (re.compile(r"^tensorrt-rtx-(cu\d+)==(.+)$"), r"tensorrt-rtx-\1-bindings==\2 tensorrt-rtx-\1-libs==\2"),
)


def target(page: str) -> tuple[str, str]:
    """Return the version of Python and the machine that a page is for.

    Raises:
        ValueError: it names none.
    """
    found = re.search(r"<!-- resolver: (3\.\d+) (x86_64|aarch64) -->", page)
    if found is None:
        raise ValueError("a recipe needs a comment such as <!-- resolver: 3.11 x86_64 -->")
    return found[1], found[2]


def recipe_lines(page: str) -> list[list[str]]:
    """Return what the `pip install` lines of a page's sh blocks ask for, one list of words each."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[2:] for words in lines if words[:2] == ["pip", "install"]]


def requirements(words: list[str]) -> list[str]:
    """Return what the resolver is asked for: no other index, bindings for the full TensorRT, this checkout for "."."""
    if "--extra-index-url" in words:
        words = words[: words.index("--extra-index-url")]
    for pattern, bindings in BINDINGS:
        words = [part for word in words for part in pattern.sub(bindings, word).split()]
    return [f"{ROOT}{word[1:]}" if word.startswith(".") else word for word in words]


def main() -> int:
    """Resolve every line; return 1 if one cannot be."""
    failed = False
    for page in sorted(RECIPES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        python, machine = target(text)
        platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBC]
        for words in recipe_lines(text):
            wanted = requirements(words)
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
                command += ["--target", folder, "--only-binary=:all:", "--python-version", python, *platforms, *wanted]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            said = "resolves" if done.returncode == 0 else (errors or ["pip failed"])[0]
            print(f"{page.name}, Python {python}, {machine}: {' '.join(wanted).replace(str(ROOT), '.')}: {said}")
            failed = failed or done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
