"""Run GLIP-nano on a picture, then on a video whose prompt changes halfway.

glip-export --model examples/nano/glip_nano.pth --output build/demo/glip_nano
python examples/nano/demo.py build/demo/glip_nano build/demo
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from glip_deploy import Detections, Detector, load_image
from glip_deploy.cli.app import run_main

MEDIA = Path(__file__).with_name("media")
SIDE = 224  # the shortest side it was trained with
PICTURE_PROMPT = [
    "dog", "red apple", "bicycle", "guitar", "penguin", "sunflower", "bus", "traffic light", "backpack",
]  # fmt: skip
VIDEO_PROMPTS = (["dog", "red apple", "pizza"], ["penguin", "bus", "guitar", "sunflower"])


def detect_on_picture(detector: Detector, source: Path, output: Path, threshold: float) -> None:
    """Detect twice, so that the second time shows what a cached prompt saves; write the annotated picture."""
    from PIL import Image

    from glip_deploy.results.drawing import annotate

    picture = load_image(source)
    for _ in range(2):
        start = time.perf_counter()
        prompt = detector.encode(PICTURE_PROMPT)
        encoded = time.perf_counter()
        found = detector.detect(picture, prompt, threshold, color="rgb")
        done = time.perf_counter()
        print(f"prompt {(encoded - start) * 1e3:6.1f} ms   frame {(done - encoded) * 1e3:6.1f} ms")
    for thing in found:
        x0, y0, x1, y1 = (round(float(side)) for side in thing.box)
        print(f"  {thing.score:.2f}  {thing.phrase:<12} ({x0}, {y0}) to ({x1}, {y1})")
    Image.fromarray(annotate(picture, found)).save(output)


def detect_on_video(detector: Detector, source: Path, output: Path, threshold: float) -> None:
    """Change what is looked for in the middle of the video: only the embedding changes."""
    from glip_deploy.video.base import Frame
    from glip_deploy.video.open import open_source
    from glip_deploy.video.pipeline import run as run_pipeline
    from glip_deploy.video.video_out import VideoSink

    early, late = (detector.encode(classes) for classes in VIDEO_PROMPTS)
    counts: dict[str, int] = {}

    def count(frame: Frame, found: Detections) -> None:
        for phrase in found.phrases:
            counts[phrase] = counts.get(phrase, 0) + 1

    with open_source(str(source)) as frames:
        half = (frames.frame_count or 0) // 2
        summary = run_pipeline(
            detector,
            frames,
            lambda frame: early if frame.index < half else late,
            [VideoSink(output, fps=frames.fps)],
            threshold=threshold,
            on_frame=count,
        )
    print(f"{summary.detected} frames, {summary.fps:.1f} a second; the prompt changed at frame {half}")
    print("  " + ", ".join(f"{name}: {times}" for name, times in counts.items()))


def run(bundle: Path, output: Path, threshold: float) -> int:
    """Detect on the picture and the video that come with the example."""
    output.mkdir(parents=True, exist_ok=True)
    with Detector.open(bundle, shortest_side=SIDE, cache_dir=None) as detector:
        detect_on_picture(detector, MEDIA / "scene.jpg", output / "nano_scene.png", threshold)
        detect_on_video(detector, MEDIA / "moving.mp4", output / "nano_moving.mp4", threshold)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path, help="folder for the annotated files")
    parser.add_argument("--threshold", type=float, default=0.6)
    args = parser.parse_args(argv)
    return run_main(lambda: run(args.bundle, args.output, args.threshold), "demo.py", extra="video")


if __name__ == "__main__":
    sys.exit(main())
