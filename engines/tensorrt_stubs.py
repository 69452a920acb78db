"""Install TensorRT's type stubs for `make lint`, without TensorRT itself.

The stubs are NVIDIA's API of TensorRT 10.13 as others published it, so that mypy checks our calls against the real
signatures. Stubs of our own would be as long as our use of the API and would only repeat what we believe about it. The
package has two faults, both repaired here: it depends on all of TensorRT (2 GB), and its stubs are not valid Python
(arguments called `in`, and one without a default after others with one), which mypy cannot be told to ignore.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = "tensorrt-stubs==10.13.0.35.1"


def main(target: Path) -> None:
    """Install the stubs into a folder and make them valid Python."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--upgrade", "--target", str(target), PACKAGE], check=True)
    for stub in target.rglob("*.pyi"):
        text = re.sub(r"\bin: ", "in_: ", stub.read_text(encoding="utf-8"))
        text = text.replace("channel_axis: int)", "channel_axis: int = ...)")
        ast.parse(text)  # another version of the package may have other faults
        stub.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
