"""Prompts with their text embeddings: what a frame is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.prompts.tokens import Prompt

__all__ = ["ChunkedPrompt", "EncodedPrompt"]


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A prompt with its text embedding: all that a frame needs of it."""

    prompt: Prompt
    embedding: NDArray[np.float32]
    """(T, D) float32, read-only."""

    @property
    def phrases(self) -> tuple[str, ...]:
        """One label per class."""
        return self.prompt.phrases

    @property
    def chunks(self) -> tuple[EncodedPrompt, ...]:
        """The prompts that are run one after the other: this one, or those of a `ChunkedPrompt`."""
        return (self,)


class ChunkedPrompt(EncodedPrompt):
    """A list of names that is longer than a prompt, in chunks that are prompts of their own.

    Detections are labeled by the place in the whole list.
    """

    def __init__(self, chunks: Sequence[EncodedPrompt]) -> None:
        object.__setattr__(self, "_chunks", tuple(chunks))
        object.__setattr__(self, "_phrases", tuple(phrase for chunk in chunks for phrase in chunk.phrases))

    def __repr__(self) -> str:
        return f"ChunkedPrompt({len(self.phrases)} classes in {len(self.chunks)} chunks)"

    def __getattr__(self, name: str) -> Any:
        if name in ("prompt", "embedding"):
            raise AttributeError(f"a ChunkedPrompt has no {name}; each of its {len(self.chunks)} chunks has one")
        raise AttributeError(f"'ChunkedPrompt' object has no attribute {name!r}")

    @property
    def phrases(self) -> tuple[str, ...]:
        """One label per class, of all chunks in order."""
        phrases: tuple[str, ...] = self._phrases
        return phrases

    @property
    def chunks(self) -> tuple[EncodedPrompt, ...]:
        """The chunks, in the list's order."""
        chunks: tuple[EncodedPrompt, ...] = self._chunks
        return chunks
