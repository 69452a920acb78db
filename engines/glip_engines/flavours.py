"""TensorRT's flavours: which is installed, for which GPU it builds, and what a version of it understands.

Nothing here loads TensorRT.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from glip_deploy.errors import EngineError, MissingPackage, OptionError

__all__ = ["Dialect", "Flavour", "Gpu", "choose_flavour", "current_gpu", "installed", "library_folder", "target_of"]


class Flavour(StrEnum):
    """The full TensorRT, or TensorRT for RTX."""

    TENSORRT = "tensorrt"
    RTX = "tensorrt-rtx"

    @property
    def module(self) -> str:
        """Name of the Python module."""
        return self.value.replace("-", "_")


@dataclass(frozen=True)
class Dialect:
    """What a version of a flavour understands when it builds for a compute capability."""

    flavour: Flavour
    version: str
    """As the module's `__version__` says."""
    compute_capability: int
    """80 for 8.0."""

    @property
    def major(self) -> int:
        """First number of the version; TensorRT-RTX counts from 1."""
        return int(self.version.split(".", maxsplit=1)[0])

    @property
    def release(self) -> tuple[int, int]:
        """First two numbers of the version."""
        major, minor, *_ = [*self.version.split("."), "0"]
        return int(major), int(minor)

    @property
    def may_refuse_layer_norms(self) -> bool:
        """Whether the parser sets a precision of layer norms, which a strongly typed network may reject.

        The parsers of TensorRT 10.0 to 10.5 do so in every network; those from 10.6 on do not (docs/internals).
        """
        return self.flavour is Flavour.TENSORRT and (10, 0) <= self.release < (10, 6)

    @property
    def may_missample_in_half(self) -> bool:
        """Whether fp32 sampling in a half-precision network is reported to be wrong: pytorch/TensorRT issue 4074.

        The report is about 10.14.1 and names no version that is right again.
        """
        return self.flavour is Flavour.TENSORRT and self.release >= (10, 14)

    @property
    def is_8(self) -> bool:
        """Whether this is TensorRT 8.6: opset 17, no int64 at a network's borders, no strong typing, no bf16."""
        return self.flavour is Flavour.TENSORRT and self.major < 10

    @property
    def multiplies_half_only(self) -> bool:
        """Whether it multiplies matrices in fp16 alone and has no bf16 (see `glip_engines.rewriting.products`)."""
        return self.flavour is Flavour.RTX and self.compute_capability == 75


@dataclass(frozen=True)
class Gpu:
    """The GPU of this machine that a build would use."""

    name: str
    compute_capability: int
    """80 for 8.0."""


def installed(flavour: Flavour) -> bool:
    """Return whether the Python module is there; type stubs alone, which make an empty package, do not count."""
    spec = importlib.util.find_spec(flavour.module)
    return spec is not None and spec.origin is not None


def choose_flavour(wanted: str | None) -> Flavour:
    """Return the flavour asked for, or the one that is installed (the full TensorRT where both are).

    Raises:
        OptionError: not a flavour.
        MissingPackage: not installed.
    """
    if wanted is None:
        for flavour in Flavour:
            if installed(flavour):
                return flavour
        raise MissingPackage(
            "neither tensorrt nor tensorrt-rtx is installed; pip install 'glip-deploy[tensorrt]' on the target machine,"
            " or 'glip-deploy[tensorrt-rtx]', which also builds without a GPU"
        )
    try:
        flavour = Flavour(wanted)
    except ValueError:
        raise OptionError(f'flavour is "{wanted}"; legal is {" or ".join(Flavour)}') from None
    if not installed(flavour):
        raise MissingPackage(f"{flavour} is not installed; pip install 'glip-deploy[{flavour}]'")
    return flavour


def library_folder(flavour: Flavour) -> Path | None:
    """Return where the wheel keeps its shared libraries; None if they are the system's."""
    spec = importlib.util.find_spec(f"{flavour.module}_libs")
    places = (spec.submodule_search_locations if spec is not None else None) or ()
    return next((Path(place) for place in places), None)


def current_gpu() -> Gpu | None:
    """Ask the driver for the first visible GPU; return None without a driver or a GPU."""
    name, device, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        calls = (
            cuda.cuInit(0),
            cuda.cuDeviceGet(ctypes.byref(device), 0),
            cuda.cuDeviceGetName(name, len(name), device),
            cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device),
            cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
        )
    except (OSError, AttributeError):
        return None
    return None if any(calls) else Gpu(name.value.decode(errors="replace"), 10 * major.value + minor.value)


def target_of(flavour: Flavour, arch: str | None) -> int:
    """Return the compute capability a build is for; `glip_engines.trt.Toolkit` checks that it can be.

    Raises:
        OptionError: not "SM" and a number.
        EngineError: none named, and no GPU here.
    """
    if arch is not None:
        match = re.fullmatch(r"SM(\d{2,3})", arch.upper())
        if match is None:
            raise OptionError(f'--arch is "{arch}"; write SM and a compute capability, SM80 say')
        return int(match[1])
    gpu = current_gpu()
    if gpu is None:
        instead = "name one with --arch, SM80 say" if flavour is Flavour.RTX else "build on the target machine"
        raise EngineError(f"there is no NVIDIA GPU or driver here to build for; {instead}")
    return gpu.compute_capability
