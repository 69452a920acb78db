"""Detect in a picture that is in GPU memory already, as a hardware decoder leaves it: it stays there.

glip-build glip_t/                                       # engines for this machine's GPU, once
python examples/gpu_frame.py street.jpg --model glip_t/ --prompt "person. car"

Needs an NVIDIA GPU, TensorRT and CuPy. Any object with a `__cuda_array_interface__` will do in place of CuPy's array:
those of PyTorch, PyCUDA and Numba have one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from glip_deploy import Detector, GlipError, load_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--model", default="glip_t/", help="bundle with engines that glip-build made")
    parser.add_argument("--prompt", default="person. car. traffic light")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--shortest-side", type=int, default=800, help="pixels; 224 for GLIP-nano")
    args = parser.parse_args()

    picture = load_image(args.picture)
    with Detector.open(args.model, backend="tensorrt", shortest_side=args.shortest_side) as detector:
        import cupy

        frame = cupy.asarray(picture)  # here a copy; a decoder's frame is in GPU memory from the start
        found = detector.detect(frame, args.prompt, args.threshold, color="rgb")
    for one in found:
        x1, y1, x2, y2 = one.box
        print(f"{one.score:.2f} {one.phrase} ({x1:.0f}, {y1:.0f}) to ({x2:.0f}, {y2:.0f})")


if __name__ == "__main__":
    try:
        main()
    except GlipError as error:
        sys.exit(f"gpu_frame: {error}")
    except ImportError as error:
        sys.exit(f"gpu_frame: {error}; pip install cupy-cuda13x, or cupy-cuda12x for CUDA 12")
