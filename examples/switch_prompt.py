"""Ask several prompts about a picture, twice each: an encoded prompt is switched at no cost.

python examples/switch_prompt.py street.jpg "person. car" "a man with a [green hat]" --model glip_t/
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter

from glip_deploy import Detector, GlipError, load_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("prompts", nargs="+", metavar="prompt")
    parser.add_argument("--model", default="glip_t/", help="bundle that glip-export wrote")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--shortest-side", type=int, default=800, help="pixels; 224 for GLIP-nano")
    args = parser.parse_args()

    picture = load_image(args.picture)
    # cache_dir=None: prompts are kept in memory only, so that every run of this example starts without any.
    with Detector.open(args.model, shortest_side=args.shortest_side, cache_dir=None) as detector:
        for text in args.prompts * 2:
            start = perf_counter()
            prompt = detector.encode(text)  # the first time, the text branch runs; then the embedding is known
            encoded = perf_counter()
            found = detector.detect(picture, prompt, args.threshold, color="rgb")
            done = perf_counter()
            times = f"prompt {(encoded - start) * 1e3:.1f} ms, frame {(done - encoded) * 1e3:.0f} ms"
            print(f"{text!r}: {times}: {', '.join(found.phrases) or 'nothing'}")


if __name__ == "__main__":
    try:
        main()
    except GlipError as error:
        sys.exit(f"switch_prompt: {error}")
