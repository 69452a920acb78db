"""What tests give to a backend, and how they read its errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_glip import HIDDEN

from glip_deploy import GlipError
from glip_deploy.bundle import ImageInputs

IDS = np.array([2, 40, 41, 3], np.int64)


def feed(batch: int = 1, height: int = 64, width: int = 96, tokens: int = 4, classes: int = 2) -> ImageInputs:
    """One call of the image branch, with random pixels and a random embedding."""
    rng = np.random.default_rng(0)
    return ImageInputs(
        rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8),
        np.array([[height, width]] * batch, np.int64),
        rng.normal(size=(batch, tokens, HIDDEN)).astype(np.float32),
        np.full((batch, classes, tokens), 1 / tokens, np.float32),
    )


def error_of(function: Callable[..., object], *arguments: Any, kind: type[GlipError] = GlipError) -> str:
    """Return the message of the error that a call raises: of this class, and a single line."""
    with pytest.raises(kind) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)
