"""Find every phrase of a caption in a picture: all noun phrases, or those in brackets.

python examples/phrase_grounding.py street.jpg "A man with a green hat is walking." --model glip_t/
python examples/phrase_grounding.py street.jpg "a man with a [green hat]" --model glip_t/

The first form needs a tagger: pip install 'glip-deploy[captions]'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from glip_deploy import Detector, GlipError, load_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("caption")
    parser.add_argument("--model", default="glip_t/", help="bundle that glip-export wrote")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--shortest-side", type=int, default=800, help="pixels; 224 for GLIP-nano")
    args = parser.parse_args()

    picture = load_image(args.picture)
    with Detector.open(args.model, shortest_side=args.shortest_side) as detector:
        prompt = detector.encode(args.caption, phrases="whole")  # brackets count, if there are any
        found = detector.detect(picture, prompt, args.threshold, color="rgb")
    for label, phrase in enumerate(prompt.phrases):  # a phrase that occurs twice is two labels
        print(f"{phrase}:")
        for one in found[found.labels == label]:
            x1, y1, x2, y2 = one.box
            print(f"  {one.score:.2f} ({x1:.0f}, {y1:.0f}) to ({x2:.0f}, {y2:.0f})")


if __name__ == "__main__":
    try:
        main()
    except GlipError as error:
        sys.exit(f"phrase_grounding: {error}")
