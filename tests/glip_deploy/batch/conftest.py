"""Pictures and a video for `glip-batch`, which differ, so that results that are mixed up are noticed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

PICTURES = 9
FRAMES = 40


def noise(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture of large random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((height // 6, width // 8, 1), np.uint8))


def write_pictures(folder: Path, count: int = PICTURES, first: int = 1) -> None:
    """Pictures 1.png, 2.png and so on."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for number in range(first, first + count):
        Image.fromarray(noise(number)).save(folder / f"{number}.png")


def write_video(path: Path, frames: int = FRAMES) -> None:
    """A video whose frames differ."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for seed in range(frames):
            for packet in stream.encode(av.VideoFrame.from_ndarray(noise(seed // 4), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


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
