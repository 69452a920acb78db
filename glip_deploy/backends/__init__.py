"""One file per inference engine, all with the same two calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.bundle import Bundle
    from glip_deploy.device_frame import DeviceCanvas

__all__ = ["BACKENDS", "Backend", "open_backend"]

BACKENDS = ("onnxruntime", "tensorrt")


class Backend(Protocol):
    """Runs the two graphs of a bundle."""

    def encode_text(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Turn (T,) token ids into the text embedding (T, D)."""
        ...

    def detect(
        self,
        frames: NDArray[np.uint8] | DeviceCanvas,
        image_sizes: NDArray[np.int64],
        text_embedding: NDArray[np.float32],
        text_mask: NDArray[np.int64],
        class_map: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Turn (B, H, W, 3) BGR bytes and text into candidates: boxes (B, K, 4), scores (B, K), labels (B, K).

        image_sizes (B, 2), text_embedding (B, T, D), text_mask (B, T), class_map (B, C, T). Boxes are xyxy in
        pixels of the resized picture; a slot with score 0 is empty.

        Raises:
            GlipError: frames in GPU memory that this engine cannot read.
        """
        ...

    def clone(self) -> Backend:
        """Another backend on the same engines, for frames that should not wait for this one's."""
        ...

    def close(self) -> None:
        """Free the engine's memory."""
        ...


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
    if name == "onnxruntime":
        from glip_deploy.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, threads)
    if name == "tensorrt":
        from glip_deploy.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(bundle, engines)
    raise GlipError(f'backend "{name}" is unknown; legal is {", ".join(BACKENDS)}')
