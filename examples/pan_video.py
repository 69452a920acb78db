"""Write a short video that pans over a photograph: something to run a video loop on, made offline.

python examples/pan_video.py street.jpg pan.mp4 --frames 12 --size 96 64
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 320), metavar=("W", "H"))
    args = parser.parse_args()

    import av
    import numpy as np

    from glip_deploy import load_image

    picture = load_image(args.picture)
    width, height = args.size
    room_y, room_x = picture.shape[0] - height, picture.shape[1] - width
    if room_y < 0 or room_x < 0:
        parser.error(f"{args.picture} is {picture.shape[1]}x{picture.shape[0]}, smaller than {width}x{height}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(args.output), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(args.frames):
            t = i / max(1, args.frames - 1)
            y, x = round(room_y * t), round(room_x * t)
            crop = np.ascontiguousarray(picture[y : y + height, x : x + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(crop, format="rgb24")))
        container.mux(stream.encode())
    print(args.output)
    return 0


if __name__ == "__main__":
    from glip_deploy import GlipError

    try:
        sys.exit(main())
    except GlipError as error:
        sys.exit(f"pan_video: {error}")
