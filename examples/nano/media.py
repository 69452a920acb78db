"""Make the picture and the video that the demo runs on (the results are in examples/nano/media).

    python examples/nano/media.py

Needs the font and the packages of requirements.txt; the demo itself does not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glip_deploy.cli.app import run_main

MEDIA = Path(__file__).with_name("media")
PICTURE_NAMES = (
    "dog", "red apple", "bus", "guitar", "penguin", "bicycle", "sunflower", "backpack", "pizza", "owl", "key",
    "red apple", "dog", "traffic light",
)  # fmt: skip
VIDEO_NAMES = ("dog", "red apple", "bus", "penguin", "guitar", "sunflower", "pizza", "red apple", "owl")
PICTURE_SIZE = (448, 576)
FRAME_SIZE = (336, 432)
FRAMES_PER_SECOND = 15


@dataclass(frozen=True)
class Moving:
    """A moving pictogram: position in pixels, velocity in pixels per second, tilt in degrees."""

    picture: Image.Image
    start: tuple[float, float]
    velocity: tuple[float, float]
    swing: float
    phase: float

    def draw(self, canvas: Image.Image, seconds: float) -> tuple[int, int, int, int]:
        """Paste it where it is at that time; it bounces off the edges. Return its box, x1 y1 x2 y2 in pixels."""
        tilt = self.swing * math.sin(2 * seconds + self.phase)
        sprite = self.picture.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
        room = (canvas.width - sprite.width, canvas.height - sprite.height)
        left, top = (
            _bounce(start + speed * seconds, edge)
            for start, speed, edge in zip(self.start, self.velocity, room, strict=True)
        )
        canvas.alpha_composite(sprite, (left, top))
        inside = sprite.getchannel("A").point([0] * 128 + [255] * 128).getbbox()
        assert inside is not None
        return left + inside[0], top + inside[1], left + inside[2] - 1, top + inside[3] - 1


def _bounce(position: float, room: int) -> int:
    """Fold a straight line into 0..room."""
    folded = position % (2 * room)
    return round(min(folded, 2 * room - folded))


def moving_frames(seed: int, seconds: float) -> tuple[list[NDArray[np.uint8]], list[list[tuple[int, int, int, int]]]]:
    """Return (H, W, 3) RGB frames of pictograms moving over a photograph that training never saw, and their boxes."""
    from nano.objects import pictogram
    from nano.scenes import photographs

    rng = np.random.default_rng(seed)
    height, width = FRAME_SIZE
    photograph = photographs(fresh=True)[2].convert("RGBA").resize((width, height), Image.Resampling.LANCZOS)
    things = []
    for name in VIDEO_NAMES:
        picture = pictogram(name)
        scale = rng.uniform(60, 110) / max(picture.size)
        speed, heading = rng.uniform(25, 70), rng.uniform(0, 2 * math.pi)
        things.append(
            Moving(
                picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS),
                (rng.uniform(0, width), rng.uniform(0, height)),
                (speed * math.cos(heading), speed * math.sin(heading)),
                rng.uniform(5, 25),
                rng.uniform(0, 2 * math.pi),
            )
        )
    frames, boxes = [], []
    for i in range(round(seconds * FRAMES_PER_SECOND)):
        canvas = photograph.copy()
        boxes.append([thing.draw(canvas, i / FRAMES_PER_SECOND) for thing in things])
        frames.append(np.asarray(canvas.convert("RGB")))
    return frames, boxes


def make(output: Path, seconds: float, seed: int, truth: Path | None) -> int:
    """Write the picture and the video to a folder, and the boxes in the video to a file."""
    from glip_deploy.results.detections import Detections
    from glip_deploy.video.base import Frame
    from glip_deploy.video.video_out import VideoSink
    from nano.scenes import SceneStyle, make_scene

    output.mkdir(parents=True, exist_ok=True)
    style = SceneStyle(smallest=80, largest=160, turned=0.0, overlap=0.12)
    scene = make_scene((seed,), PICTURE_NAMES, PICTURE_SIZE, fresh=True, style=style)
    Image.fromarray(scene.image).save(output / "scene.jpg", quality=90)
    frames, boxes = moving_frames(seed, seconds)
    if truth is not None:
        truth.write_text(json.dumps({"names": VIDEO_NAMES, "boxes": boxes}, separators=(",", ":")) + "\n")
    with VideoSink(output / "moving.mp4", fps=FRAMES_PER_SECOND) as sink:
        for i, frame in enumerate(frames):
            sink.write(Frame(frame, "moving", i), Detections.empty())
    print(output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=MEDIA)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--truth", type=Path, help="file for the true boxes of the video, as JSON")
    args = parser.parse_args(argv)
    return run_main(lambda: make(args.output, args.seconds, args.seed, args.truth), "media.py", extra="video")


if __name__ == "__main__":
    sys.exit(main())
