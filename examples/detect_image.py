"""Find things in a picture: print every box, and write an annotated copy.

python examples/detect_image.py street.jpg --model glip_t/ --prompt "person. traffic light" --output found.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from glip_deploy import Detector, GlipError, load_image
from glip_deploy.results.drawing import annotate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--model", default="glip_t/", help="bundle that glip-export wrote")
    parser.add_argument("--prompt", default="person. car. traffic light")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--shortest-side", type=int, default=800, help="pixels; 224 for GLIP-nano")
    parser.add_argument("--output", type=Path, default=Path("found.png"))
    args = parser.parse_args()

    picture = load_image(args.picture)  # (H, W, 3) uint8 RGB
    with Detector.open(args.model, shortest_side=args.shortest_side) as detector:
        found = detector.detect(picture, args.prompt, args.threshold, color="rgb")
    for one in found:
        x1, y1, x2, y2 = one.box  # pixels of the picture
        print(f"{one.score:.2f} {one.phrase} ({x1:.0f}, {y1:.0f}) to ({x2:.0f}, {y2:.0f})")
    Image.fromarray(annotate(picture, found)).save(args.output)


if __name__ == "__main__":
    try:
        main()
    except (GlipError, OSError, ValueError) as error:  # the last two are Pillow's, where it cannot save
        sys.exit(f"detect_image: {error}")
