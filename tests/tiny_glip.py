"""A GLIP of the same architecture, tiny by configuration: exports in seconds, with seeded weights that detect."""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glip_export.model.config import GlipConfig
    from glip_export.model.glip import Glip

CLASSES = ("person", "red car", "dog")
WORDS = ("person", "red", "car", "dog", "cat", "a", "man", "with", "green", "hat", "and", "the", "traffic", "light")
VOCABULARY = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *string.ascii_lowercase, *string.digits,
    *(f"##{letter}" for letter in string.ascii_lowercase), *(word for word in WORDS if len(word) > 1),
)  # fmt: skip
HIDDEN = 32


def tiny_config(tunable_tokens: int = 0, fusion: bool = True) -> GlipConfig:
    from glip_export.model.config import BertConfig, GlipConfig, HeadConfig, SwinConfig

    return GlipConfig(
        swin=SwinConfig(16, (2, 2, 2, 2), (1, 2, 4, 8), 7, (64, 128, 256, 512)),
        bert=BertConfig(HIDDEN, 2, 4, 64, len(VOCABULARY), 256),
        head=HeadConfig(channels=32, blocks=2, fusion=fusion, fusion_dim=64, bert_heads=4, bert_intermediate=64),
        tunable_tokens=tunable_tokens,
    )


def tiny_model(seed: int = 0, **options: Any) -> Glip:
    """Random weights, spread so that scores lie on both sides of the thresholds."""
    import torch
    from glip_export.model.glip import Glip

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Glip(tiny_config(**options), squeeze=8).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.endswith("offset.bias"):
                parameter.normal_(0, 0.5)
            elif name.endswith(("gamma_v", "gamma_l")):
                parameter.fill_(0.5)
        head = model.rpn.head
        head.bias0.fill_(-1.0)
        head.log_scale.fill_(-2.0)
        head.bbox_pred.weight.normal_(0, 0.2)
    return model


def tiny_state(seed: int = 0, **options: Any) -> dict[str, Any]:
    return dict(tiny_model(seed, **options).state_dict())


def tiny_content(state: dict[str, Any] | None = None, **entries: Any) -> dict[str, Any]:
    """What goes into a `.pth`; `entries` replace or add top-level ones, None removes."""
    content = {
        "model": tiny_state() if state is None else state,
        "glip_config": {"bert_heads": 4},
        "vocabulary": list(VOCABULARY),
        **entries,
    }
    return {key: value for key, value in content.items() if value is not None}


def write_tiny(path: Path, state: dict[str, Any] | None = None, **entries: Any) -> Path:
    import torch

    torch.save(tiny_content(state, **entries), path)
    return path


def error_of(checkpoint: Path) -> str:
    """The message, of one line, with which a checkpoint is refused."""
    import pytest
    from glip_export.checkpoints import load_checkpoint

    from glip_deploy.errors import CheckpointError

    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message
