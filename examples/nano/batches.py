"""Training batches: scenes, a prompt, and what the losses need. Batch i is a function of (seed, i) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from glip_export.model.config import HeadConfig
from glip_export.tokenizer import build_tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from glip_deploy.prompts.tokens import Prompt, parse_prompt
from nano.losses import Anchors, assign, make_anchors
from nano.model import SIDE
from nano.scenes import Scene, SceneStyle, caption_of, make_scene

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Batch", "Batches", "token_map"]

SIZES = ((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE), (SIDE, 288), (288, SIDE))
CAPTION_SHARE = 0.25
CLASSES = (8, 31)
THINGS = (5, 12)
CROWDED = (13, 19)
CROWDED_STYLE = SceneStyle(smallest=20, largest=72)


@dataclass(frozen=True)
class Batch:
    """B pictures and their prompt; boxes are padded to the largest count G with zeros."""

    images: Tensor
    """(B, H, W, 3) uint8 BGR."""
    ids: Tensor
    """(P, T) int64; P is 1 where all pictures share a class list, else B."""
    mask: Tensor
    """(P, T) int64."""
    boxes: Tensor
    """(B, G, 4) float32 xyxy."""
    names: Tensor
    """(B, G) int64 index in the training names, -1 for padding."""
    tokens: Tensor
    """(B, G, T) float32, 1 where a token names the object; all zero for an object the prompt does not name."""
    classes: Tensor
    """(P, C, T) float32, rows averaging the tokens of each class of the prompt; all-zero rows are padding."""
    labels: Tensor
    """(B, G) int64 class of every object in its prompt, -1 where the prompt does not name it."""
    matched: Tensor
    """(B, N) int64 object of every anchor, -1 for background."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.images.shape[1], self.images.shape[2]


class Batches(Dataset[Batch]):
    """All batches of a training run, by number.

    Up to number `crowded_until`, scenes are crowded and prompts do not matter: what stage 1 of training wants.
    """

    def __init__(
        self,
        names: Sequence[str],
        vocabulary: Sequence[str],
        seed: int,
        batch_size: int,
        sizes: Sequence[tuple[int, int]] = SIZES,
        style: SceneStyle | None = None,
        caption_share: float = CAPTION_SHARE,
        crowded_until: int = 0,
    ) -> None:
        self.names, self.vocabulary, self.seed, self.batch_size = tuple(names), tuple(vocabulary), seed, batch_size
        self.sizes, self.style, self.caption_share = sizes, style, caption_share
        self.crowded_until = crowded_until
        self.anchors: dict[tuple[int, int], Anchors] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the vocabulary; made in each worker process, because it does not travel between them."""
        return build_tokenizer(self.vocabulary)

    def __getitem__(self, number: int) -> Batch:
        rng = np.random.default_rng([self.seed, number])
        size = self.sizes[int(rng.integers(len(self.sizes)))]
        crowded = number < self.crowded_until
        captioned = not crowded and rng.random() < self.caption_share
        # One class list for the whole batch: it is encoded once, which makes long lists affordable.
        classes = [str(name) for name in rng.permutation(self.names)[: int(rng.integers(*CLASSES))]]
        scenes, prompts = [], []
        for i in range(self.batch_size):
            seed = (self.seed, number, i)
            # About a third of what a picture shows is not asked for, and must be told apart from what is.
            unasked = [str(name) for name in rng.permutation(self.names)[: len(classes) // 2]]
            pool = self.names if captioned or crowded else [*classes, *unasked]
            wanted = int(rng.integers(*(CROWDED if crowded else THINGS)))
            style = CROWDED_STYLE if crowded else self.style
            scene = make_scene(seed, _repeated(rng, pool, wanted), size, style=style)
            scenes.append(scene)
            if captioned:
                described = caption_of(scene, seed)
                prompts.append(parse_prompt(described[0] if described else classes[:3], self.tokenizer))
        if not captioned:
            prompts = [parse_prompt(classes, self.tokenizer)]
        return self._collate(scenes, prompts, size)

    def _collate(self, scenes: list[Scene], prompts: list[Prompt], size: tuple[int, int]) -> Batch:
        if size not in self.anchors:
            self.anchors[size] = make_anchors(*size, HeadConfig().strides)
        longest = max(len(prompt.input_ids) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt.input_ids)] = torch.from_numpy(prompt.input_ids.copy())
            mask[i, : len(prompt.input_ids)] = 1
        most = max(1, *(len(scene.things) for scene in scenes))
        index = {name: i for i, name in enumerate(self.names)}
        boxes = torch.zeros(len(scenes), most, 4)
        names = torch.full((len(scenes), most), -1)
        tokens = torch.zeros(len(scenes), most, longest)
        classes = torch.zeros(len(prompts), max(len(prompt) for prompt in prompts), longest)
        for i, prompt in enumerate(prompts):
            classes[i, : len(prompt), : len(prompt.input_ids)] = torch.from_numpy(prompt.class_map.copy())
        labels = torch.full((len(scenes), most), -1)
        matched = []
        for i, scene in enumerate(scenes):
            prompt = prompts[i if len(prompts) > 1 else 0]
            named = token_map(scene, prompt)
            tokens[i, : len(scene.things), : named.shape[1]] = named
            for j, thing in enumerate(scene.things):
                boxes[i, j] = torch.tensor(thing.box, dtype=torch.float32)
                names[i, j] = index[thing.name]
                if thing.name in prompt.phrases:
                    labels[i, j] = prompt.phrases.index(thing.name)
            # What the caption does not name is background: nothing may point there.
            asked = named.any(dim=1).nonzero()[:, 0]
            owner = assign(self.anchors[size], boxes[i, asked])
            matched.append(torch.where(owner >= 0, asked[owner.clamp(min=0)], owner) if len(asked) else owner)
        images = torch.from_numpy(np.stack([scene.image[..., ::-1] for scene in scenes]))
        return Batch(images, ids, mask, boxes, names, tokens, classes, labels, torch.stack(matched))


def token_map(scene: Scene, prompt: Prompt) -> Tensor:
    """Return (things, T) float32, 1 where a token of the prompt names the thing."""
    out = torch.zeros(len(scene.things), len(prompt.input_ids))
    spans = dict(zip(prompt.phrases, prompt.token_spans, strict=True))
    for i, thing in enumerate(scene.things):
        out[i, list(spans.get(thing.name, ()))] = 1
    return out


def _repeated(rng: np.random.Generator, pool: Sequence[str], wanted: int) -> list[str]:
    """Return `wanted` names, some of them more than once."""
    out: list[str] = []
    while len(out) < wanted:
        out += [str(rng.choice(pool))] * int(rng.choice([1, 1, 1, 1, 2, 3]))
    return out[:wanted]
