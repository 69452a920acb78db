"""One file per inference engine, all behind the same two calls (`base.Backend`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glip_deploy.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

    from glip_deploy.backends.base import Backend
    from glip_deploy.bundle.manifest import Bundle

__all__ = ["BACKENDS", "PROVIDERS", "open_backend"]

PROVIDERS = {
    "onnxruntime": ("CPUExecutionProvider",),
    "onnxruntime-cuda": ("CUDAExecutionProvider",),
    "onnxruntime-tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
    "onnxruntime-nv-tensorrt-rtx": ("NvTensorRTRTXExecutionProvider",),
}
"""ONNX Runtime's execution providers by backend: what the first does not take is the next one's, and last the CPU's."""
BACKENDS = (*PROVIDERS, "tensorrt")


def open_backend(name: str, bundle: Bundle, threads: int | None, engines: Path | None = None) -> Backend:
    """Open a bundle in the engine called `name`.

    Args:
        name: one of `BACKENDS`.
        bundle: the bundle.
        threads: CPU threads, for ONNX Runtime.
        engines: folder of engines that `glip-build` made, or its name in the bundle; None takes the first that fit.

    Raises:
        GlipError: unknown engine, one that is not installed, or a graph that it cannot load.
    """
    if name in PROVIDERS:
        from glip_deploy.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend.open(bundle, threads, PROVIDERS[name])
    if name == "tensorrt":
        from glip_deploy.backends.tensorrt import TensorRTBackend

        return TensorRTBackend.open(bundle, engines)
    raise OptionError(f'backend "{name}" is unknown; legal is {", ".join(BACKENDS)}')
