"""The computer that a number was measured on: processor, memory, versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["describe_machine", "processor", "versions"]

PACKAGES = ("glip-deploy", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy", "pillow", "tokenizers", "torch")


def describe_machine() -> dict[str, Any]:
    """Return processor name, usable cores, memory in bytes, operating system."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, by name."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor(name: str) -> str:
    """Return a processor's name without its clock, which wanders from one reading to the next."""
    return ", ".join(part for part in name.split(", ") if not part.endswith("GHz"))


def _cpu_name() -> str:
    """Return the processor's own name, its clock, and the widest vector instructions that it has."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in reversed(info.read_text().splitlines()))
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    name = fields.get("model name", platform.machine())
    flags = fields.get("flags", "").split()
    widest = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags), "")
    megahertz = fields.get("cpu MHz", "")
    clock = f", {float(megahertz) / 1e3:.2f} GHz" if megahertz else ""
    return f"{name}{clock}{', ' + widest if widest else ''}"


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
