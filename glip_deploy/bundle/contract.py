"""The contract of the graphs: what every exporter writes and every backend, verifier and benchmark relies on.

Names, dtypes and axes of inputs and outputs are stated here and nowhere else. `ImageInputs` and `Candidates` are the
same things as typed groups of arrays; `Stage` names the blocks of the network, and is stamped on every node of a graph
when it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_deploy.frames.device import DeviceCanvas

__all__ = [
    "BACKBONE_GRAPH",
    "CANDIDATES",
    "HEAD_GRAPH",
    "IMAGE_GRAPH",
    "PARTS",
    "RAW_OUTPUTS",
    "STAGE_KEY",
    "TEXT_GRAPH",
    "Candidates",
    "GraphContract",
    "ImageInputs",
    "Stage",
    "TensorContract",
    "backbone_contract",
    "feature_tensors",
    "head_contract",
    "image_contract",
    "text_contract",
    "text_inputs",
]

TEXT_GRAPH = "text.onnx"
IMAGE_GRAPH = "image.onnx"
BACKBONE_GRAPH = "backbone.onnx"
HEAD_GRAPH = "head.onnx"
PARTS = ("backbone", "head")
"""The image branch in two parts, for several prompts on a frame."""

STAGE_KEY = "glip.stage"
"""Key of a node's `metadata_props` under which its `Stage` is written."""


class Stage(StrEnum):
    """A block of the network; every node of a written graph belongs to one."""

    INPUT = "input"
    """Normalization of pixels and zeroing of the padding."""
    BACKBONE = "backbone"
    """Swin."""
    FPN = "FPN"
    TEXT = "text encoder"
    """BERT, in the text graph."""
    TUNED_PROMPT = "tuned prompt"
    """What a prompt-tuned checkpoint adds to the embedding, in the text graph."""
    FUSION = "fusion"
    """Cross-attention between image and text."""
    FUSION_SOFTMAX = "softmax over locations"
    """Of the fusion: how much the text looks at every location of the image."""
    TEXT_LAYERS = "text layers of the head"
    """The BERT layer after each fusion."""
    OFFSETS = "offsets and masks"
    """The convolution that makes sampling offsets and masks."""
    DEFORMABLE = "deformable convolution"
    GROUP_NORM = "group norm"
    DYHEAD = "dynamic head"
    """Level attention, upsampling and DyReLU."""
    PREDICTION = "predictions"
    """Logits, box deltas and centerness."""
    SELECTION = "selection"
    """Scores, top candidates and box decoding."""


@dataclass(frozen=True)
class TensorContract:
    """Name, dtype and axes of one input or output; an axis is a number or the name of a dynamic size."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    meaning: str

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Index to name, for the axes that are not fixed."""
        return {i: axis for i, axis in enumerate(self.shape) if isinstance(axis, str)}


@dataclass(frozen=True)
class GraphContract:
    """What a graph takes and gives, as the manifest states it."""

    file: str
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest's form of it."""

        def rows(tensors: tuple[TensorContract, ...]) -> list[dict[str, Any]]:
            return [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "meaning": t.meaning} for t in tensors]

        return {"file": self.file, "inputs": rows(self.inputs), "outputs": rows(self.outputs)}


def text_contract(hidden: int) -> GraphContract:
    """Return what the text graph takes and gives; `hidden` is the width of the text embedding."""
    return GraphContract(
        TEXT_GRAPH,
        (
            TensorContract("input_ids", "int64", ("batch", "tokens"), "WordPiece ids, [CLS] and [SEP] included"),
            TensorContract("attention_mask", "int64", ("batch", "tokens"), "1 for real tokens"),
        ),
        (TensorContract("text_embedding", "float32", ("batch", "tokens", hidden), "input of the image branch"),),
    )


RAW_OUTPUTS = (
    TensorContract("logits", "float32", ("batch", "locations", "tokens"), "alignment of locations and tokens"),
    TensorContract("deltas", "float32", ("batch", "locations", 4), "box regression dx, dy, dw, dh"),
    TensorContract("centerness", "float32", ("batch", "locations"), "before the sigmoid"),
)
"""Outputs of the head before selection; in an image graph only if it was exported with them."""


_FRAMES = (
    TensorContract(
        "frames", "uint8", ("batch", "height", "width", 3), "BGR canvas, sides multiples of 32, picture top left"
    ),
    TensorContract("image_sizes", "int64", ("batch", 2), "height and width of the picture in the canvas"),
)
_CANDIDATES = (
    TensorContract("boxes", "float32", ("batch", "candidates", 4), "xyxy pixels of the picture in the canvas"),
    TensorContract("scores", "float32", ("batch", "candidates"), "0 for an empty slot"),
    TensorContract("labels", "int64", ("batch", "candidates"), "row of class_map"),
)
CANDIDATES = tuple(tensor.name for tensor in _CANDIDATES)
"""Names of the outputs of the image branch, in the order of `Candidates`."""


def _prompt_tensors(hidden: int) -> tuple[TensorContract, ...]:
    return (
        TensorContract("text_embedding", "float32", ("batch", "tokens", hidden), "from the text branch"),
        TensorContract("text_mask", "int64", ("batch", "tokens"), "1 for real tokens"),
        TensorContract("class_map", "float32", ("batch", "classes", "tokens"), "row c averages the tokens of class c"),
    )


def image_contract(hidden: int, *, raw_outputs: bool = False) -> GraphContract:
    """Return what the image graph takes and gives; `hidden` is the width of the text embedding."""
    return GraphContract(
        IMAGE_GRAPH,
        (*_FRAMES, *_prompt_tensors(hidden)),
        (*_CANDIDATES, *(RAW_OUTPUTS if raw_outputs else ())),
    )


def feature_tensors(channels: int, strides: Sequence[int]) -> tuple[TensorContract, ...]:
    """Return what passes from the backbone graph to the head graph, one map for each level.

    Args:
        channels: of the feature pyramid.
        strides: pixels per location of each level, powers of two. A side of a level is the canvas's, divided by the
            stride and rounded up.
    """
    return tuple(
        TensorContract(
            f"features_p{stride.bit_length() - 1}",
            "float32",
            ("batch", channels, f"height_{stride}", f"width_{stride}"),
            f"level of stride {stride}, up to where the text is needed",
        )
        for stride in strides
    )


def backbone_contract(channels: int, strides: Sequence[int]) -> GraphContract:
    """Return what the backbone graph takes and gives; the arguments are those of `feature_tensors`."""
    return GraphContract(BACKBONE_GRAPH, _FRAMES, feature_tensors(channels, strides))


def head_contract(hidden: int, channels: int, strides: Sequence[int], *, raw_outputs: bool = False) -> GraphContract:
    """Return what the head graph takes and gives: the features of `backbone_contract`, else as `image_contract`."""
    image = image_contract(hidden, raw_outputs=raw_outputs)
    return GraphContract(HEAD_GRAPH, (*feature_tensors(channels, strides), *image.inputs[1:]), image.outputs)


def text_inputs(input_ids: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Return the text graph's inputs for (T,) or (B, T) token ids that are all real."""
    ids = np.atleast_2d(input_ids)
    return {"input_ids": np.ascontiguousarray(ids), "attention_mask": np.ones_like(ids)}


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """One call of the image branch.

    Attributes:
        frames: (B, H, W, 3) uint8, BGR, H and W multiples of 32; or pictures in GPU memory and the canvas they go on.
        image_sizes: (B, 2) int64, height and width of each picture inside the canvas.
        text_embedding: (B, T, D) float32, from the text branch.
        class_map: (B, C, T) float32; row c averages the tokens of class c.
    """

    frames: NDArray[np.uint8] | DeviceCanvas
    image_sizes: NDArray[np.int64]
    text_embedding: NDArray[np.float32]
    class_map: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        frames: NDArray[np.uint8] | DeviceCanvas,
        image_sizes: NDArray[np.int64],
        text_embedding: NDArray[np.float32],
        class_map: NDArray[np.float32],
    ) -> ImageInputs:
        """Make the inputs of B frames that look for the same prompt: embedding (T, D) and class map (C, T)."""
        batch = len(image_sizes)

        def repeat(array: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.ascontiguousarray(np.broadcast_to(array, (batch, *array.shape)))

        return cls(frames, image_sizes, repeat(text_embedding), repeat(class_map))

    @property
    def text_mask(self) -> NDArray[np.int64]:
        """(B, T) int64 of ones: a prompt keeps its true length, so every token is real."""
        return np.ones(self.text_embedding.shape[:2], np.int64)

    def feed(self) -> dict[str, Any]:
        """Return the graph's inputs by name, in the contract's order."""
        return {
            "frames": self.frames,
            "image_sizes": self.image_sizes,
            "text_embedding": self.text_embedding,
            "text_mask": self.text_mask,
            "class_map": self.class_map,
        }

    def frame_feed(self) -> dict[str, Any]:
        """Return the backbone graph's inputs by name."""
        return {"frames": self.frames, "image_sizes": self.image_sizes}

    def prompt_feed(self) -> dict[str, Any]:
        """Return the head graph's inputs by name, without the features."""
        return {name: array for name, array in self.feed().items() if name != "frames"}

    def __len__(self) -> int:
        return len(self.image_sizes)

    def part(self, which: slice) -> ImageInputs:
        """Return some of the frames."""
        frames = self.frames[which] if isinstance(self.frames, np.ndarray) else self.frames.part(which)
        return ImageInputs(frames, self.image_sizes[which], self.text_embedding[which], self.class_map[which])


@dataclass(frozen=True, eq=False)
class Candidates:
    """What the image branch gives: K slots a frame, before NMS.

    Attributes:
        boxes: (B, K, 4) float32, x1 y1 x2 y2 in pixels of the resized picture.
        scores: (B, K) float32; a slot with score 0 is empty.
        labels: (B, K) int64, rows of the class map.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, outputs: Mapping[str, NDArray[Any]]) -> Candidates:
        """Take them from a graph's outputs by name."""
        return cls(outputs["boxes"], outputs["scores"], outputs["labels"].astype(np.int64, copy=False))

    @classmethod
    def joined(cls, parts: Sequence[Candidates], classes: Sequence[int]) -> Candidates:
        """Join the candidates of several prompts in the same frames.

        Args:
            parts: by prompt.
            classes: the number of classes of each; labels of a prompt follow those of the prompts before it.
        """
        firsts = np.cumsum([0, *classes])
        return cls(
            np.concatenate([part.boxes for part in parts], axis=1),
            np.concatenate([part.scores for part in parts], axis=1),
            np.concatenate([part.labels + first for part, first in zip(parts, firsts, strict=False)], axis=1),
        )

    def __len__(self) -> int:
        return len(self.scores)
