"""TensorRT's messages, which explain a failure in several lines and in its own source code's terms, as one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["one_line"]

_NO_GPU = re.compile(r"cudaError (35|100)|catchCudaError|CUDA initialization failure")
"""What TensorRT-RTX logs at every fault on a machine without a GPU; it explains nothing."""
_LONGEST = 400


def one_line(messages: Sequence[str]) -> str:
    """Return the first line that explains something, without source locations; empty if there is none."""
    lines = [line.strip() for message in messages for line in message.splitlines()]
    for line in lines:
        if line and not _NO_GPU.search(line) and not re.match(r"(\[\d+\] )?Invalid Node", line):
            return re.sub(r"^\S*::\S+: Error Code \d+: |\.? In \S+ at \S+:\d+", "", line)[:_LONGEST]
    return ""
