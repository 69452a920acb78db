"""One file per inference engine, all behind the same two calls (`base.Backend`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glip_deploy.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

    from glip_deploy.backends.base import Backend
    from glip_deploy.bundle.manifest import Bundle

__all__ = ["BACKENDS", "DATA_ONLY", "MAX_THREADS", "PROVIDERS", "check_trusted", "open_backend"]

PROVIDERS = {
    "onnxruntime": ("CPUExecutionProvider",),
    "onnxruntime-cuda": ("CUDAExecutionProvider",),
    "onnxruntime-tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
    "onnxruntime-nv-tensorrt-rtx": ("NvTensorRTRTXExecutionProvider",),
}
"""ONNX Runtime's execution providers by backend: what the first does not take is the next one's, and last the CPU's."""
BACKENDS = (*PROVIDERS, "tensorrt")
MAX_THREADS = 512
"""On a CPU; every one is a thread of the system, whether or not there is a core for it."""
DATA_ONLY = ("onnxruntime", "onnxruntime-cuda")
"""Backends to which all of a bundle is data. The others run native code that a bundle may hold: engines and their
plugin libraries, or engines inside a graph (nodes `EPContext`, which ONNX Runtime's TensorRT providers load)."""


def check_trusted(name: str, trusted: bool) -> None:
    """Raise if a backend would run native code of a bundle that is not trusted.

    Raises:
        OptionError: it would.
    """
    if not trusted and name in BACKENDS and name not in DATA_ONLY:
        raise OptionError(
            f"backend {name} runs native code that comes with the bundle, which is not trusted;"
            f" use backend {' or '.join(DATA_ONLY)}"
        )


def open_backend(
    name: str,
    bundle: Bundle,
    threads: int | None,
    engines: Path | None = None,
    *,
    trusted: bool = True,
    plugins: bool = True,
) -> Backend:
    """Open a bundle in the engine called `name`.

    Args:
        name: one of `BACKENDS`.
        bundle: the bundle.
        threads: CPU threads, for ONNX Runtime.
        engines: folder of engines that `glip-build` made, or its name in the bundle; None takes the first that fit.
        trusted: False to refuse native code that comes with the bundle; see `check_trusted`.
        plugins: False to load no plugin library, and so only engines that need none.

    Raises:
        GlipError: unknown engine, one that is not installed, or a graph that it cannot load.
    """
    check_trusted(name, trusted)
    if name in PROVIDERS:
        from glip_deploy.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend.open(bundle, threads, PROVIDERS[name])
    if name == "tensorrt":
        from glip_deploy.backends.tensorrt import TensorRTBackend

        return TensorRTBackend.open(bundle, engines, plugins=plugins)
    raise OptionError(f'backend "{name}" is unknown; legal is {", ".join(BACKENDS)}')
