"""What every inference engine looks like to the detector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from glip_deploy.errors import FrameError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from glip_deploy.bundle.contract import Candidates, ImageInputs

__all__ = ["Backend", "check_on_host"]


class Backend(Protocol):
    """Runs the graphs of a bundle: the text branch and the image branch."""

    @property
    def text_key(self) -> str:
        """Hex digest of what encodes prompts, if not the bundle's text graph; embeddings are cached by it."""
        ...

    def encode_text(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Turn (T,) token ids into the text embedding (T, D)."""
        ...

    def detect(self, inputs: ImageInputs) -> Candidates:
        """Run the image branch.

        Raises:
            GlipError: frames in GPU memory that this engine cannot read; a shape that it was not built for.
        """
        ...

    def detect_prompts(self, inputs: Iterable[ImageInputs]) -> list[Candidates]:
        """Run the image branch for several prompts on the same frames, what the text does not change only once.

        Args:
            inputs: of each prompt; frames and sizes are the same in all.

        Returns:
            The candidates of each prompt.

        Raises:
            GlipError: as `detect`.
        """
        ...

    def prepare_resize(self) -> bool:
        """Get ready to resize frames on the GPU; False where this engine cannot.

        Raises:
            GlipError: it could, but something that it needs is missing.
        """
        ...

    def clone(self) -> Backend:
        """Another backend on the same engines, for frames that should not wait for this one's."""
        ...

    def close(self) -> None:
        """Free the engine's memory."""
        ...


def check_on_host(inputs: ImageInputs) -> None:
    """Check that frames are arrays of the host, for backends that read no others.

    Raises:
        FrameError: they are in GPU memory.
    """
    if not isinstance(inputs.frames, np.ndarray):
        raise FrameError("the frame is in GPU memory, which this backend cannot read; copy it, or use backend tensorrt")
