"""Pictures and a video for `glip-batch`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from batch_runs import write_pictures, write_video


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a folder of pictures."""
    write_pictures(tmp_path / "photos")
    return tmp_path


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of pictures and a video; do not change it."""
    folder = tmp_path_factory.mktemp("mixed")
    write_pictures(folder / "media")
    write_video(folder / "media" / "v.mp4")
    return folder
