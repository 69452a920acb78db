"""Fetch TensorRT's type stubs for `make lint`, without TensorRT itself, and mend what is not valid Python in them.

The package (tensorrt-stubs, from the package registry) asks for all of TensorRT, two gigabytes that mypy does not need;
and it has arguments called `in`, and one without a default after others with one.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = "tensorrt-stubs==10.13.0.35.1"


def mended(text: str) -> str:
    """Return the stub's text as valid Python."""
    text = re.sub(r"\bin: ", "in_: ", text)
    text = re.sub(r"channel_axis: int\)", "channel_axis: int = ...)", text)
    ast.parse(text)
    return text


def main(target: Path) -> None:
    """Install the stubs into a folder and mend them."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--upgrade", "--target", str(target), PACKAGE], check=True)
    for stub in target.rglob("*.pyi"):
        stub.write_text(mended(stub.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
