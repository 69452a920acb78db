"""Go on with supervision: filter, count and draw detections with its tools.

pip install 'glip-deploy[supervision]'
python examples/to_supervision.py street.jpg --model glip_t/ --prompt "person. car" --output supervised.png
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

from glip_deploy import Detector, GlipError, load_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--model", default="glip_t/", help="bundle that glip-export wrote")
    parser.add_argument("--prompt", default="person. car. traffic light")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--least-area", type=float, default=0.0, metavar="SHARE", help="of the picture")
    parser.add_argument("--shortest-side", type=int, default=800, help="pixels; 224 for GLIP-nano")
    parser.add_argument("--output", type=Path, default=Path("supervised.png"))
    args = parser.parse_args()

    picture = load_image(args.picture)
    with Detector.open(args.model, shortest_side=args.shortest_side) as detector:
        detections = detector.detect(picture, args.prompt, args.threshold, color="rgb").to_supervision()

    import supervision

    large = detections[detections.area >= args.least_area * picture.shape[0] * picture.shape[1]]
    for name, count in sorted(Counter(large.data["class_name"].tolist()).items()):
        print(f"{count} {name}")
    annotated = supervision.BoxAnnotator().annotate(Image.fromarray(picture), large)
    supervision.LabelAnnotator().annotate(annotated, large).save(args.output)


if __name__ == "__main__":
    try:
        main()
    except (GlipError, OSError, ValueError) as error:  # the last two are Pillow's, where it cannot save
        sys.exit(f"to_supervision: {error}")
