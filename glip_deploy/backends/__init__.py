"""One file per inference engine, all behind the same two calls (`base.Backend`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glip_deploy.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

    from glip_deploy.backends.base import Backend
    from glip_deploy.bundle.manifest import Bundle

__all__ = ["BACKENDS", "DATA_ONLY", "MAX_THREADS", "OPENVINO", "PROVIDERS", "check_trusted", "open_backend"]

PROVIDERS = {
    "onnxruntime": ("CPUExecutionProvider",),
    "onnxruntime-cuda": ("CUDAExecutionProvider",),
    "onnxruntime-tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
    "onnxruntime-nv-tensorrt-rtx": ("NvTensorRTRTXExecutionProvider",),
}
"""ONNX Runtime's execution providers by backend: what the first does not take is the next one's, and last the CPU's."""
OPENVINO = "openvino"
BACKENDS = (*PROVIDERS, OPENVINO, "tensorrt")
MAX_THREADS = 512
"""On a CPU; every one is a thread of the system, whether or not there is a core for it."""
DATA_ONLY = ("onnxruntime", "onnxruntime-cuda", OPENVINO)
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
    precision: str | None = None,
    cache_dir: Path | None = None,
) -> Backend:
    """Open a bundle in the engine called `name`.

    Args:
        name: one of `BACKENDS`.
        bundle: the bundle.
        threads: CPU threads, for ONNX Runtime and OpenVINO.
        engines: folder of engines that `glip-build` made, or its name in the bundle; None takes the first that fit.
        trusted: False to refuse native code that comes with the bundle; see `check_trusted`.
        plugins: False to load no plugin library, and so only engines that need none.
        precision: for OpenVINO, see `glip_deploy.backends.openvino.Precision`; None is f32. The others compute in the
            precision that the bundle or the engine was made in.
        cache_dir: where OpenVINO keeps compiled graphs, None for nowhere.

    Raises:
        GlipError: a precision that the engine does not choose; an unknown engine, one that is not installed, or a
            graph that it cannot load.
    """
    check_trusted(name, trusted)
    if precision is not None and name in BACKENDS and name != OPENVINO:
        made_with = "glip-build --precision" if name == "tensorrt" else "glip-export --precision"
        raise OptionError(
            f'precision is "{precision}", which backend {name} cannot choose; use backend {OPENVINO}, or {made_with}'
        )
    if name in PROVIDERS:
        from glip_deploy.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend.open(bundle, threads, PROVIDERS[name])
    if name == OPENVINO:
        from glip_deploy.backends.openvino import OpenVINOBackend, Precision

        return OpenVINOBackend.open(bundle, threads, Precision.F32 if precision is None else precision, cache_dir)
    if name == "tensorrt":
        from glip_deploy.backends.tensorrt import TensorRTBackend

        return TensorRTBackend.open(bundle, engines, plugins=plugins)
    raise OptionError(f'backend "{name}" is unknown; legal is {", ".join(BACKENDS)}')
