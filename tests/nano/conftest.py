"""Makes `nano` (in examples/) importable, and skips where its ingredients are not installed."""

import sys
from pathlib import Path

import pytest

from glip_deploy.errors import GlipError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


@pytest.fixture(scope="session")
def ingredients() -> None:
    """The font and the photographs."""
    from nano.objects import pictogram
    from nano.scenes import photographs

    try:
        pictogram("red apple"), photographs(fresh=True), photographs(fresh=False)
    except GlipError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def text_encoder(ingredients: None) -> None:
    from nano.text import pretrained_text_encoder

    try:
        pretrained_text_encoder(1, ("[PAD]",))
    except GlipError as error:
        pytest.skip(str(error))
