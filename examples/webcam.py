"""Watch a camera, and look for something else as soon as a new prompt is typed.

python examples/webcam.py --model glip_t/ --prompt "person. cup"       # a window (pip install opencv-python); q ends it
python examples/webcam.py --model glip_t/ --source yard.mp4 --headless    # a line per frame, of any video or stream

Type a prompt and Enter while it runs: it is encoded once, beside the video, and nothing else changes. Of a camera or a
stream only the newest frame is taken, so that boxes never lag behind; of a file, every frame.
"""

from __future__ import annotations

import argparse
import sys
from threading import Thread

from glip_deploy import Detector, EncodedPrompt, GlipError
from glip_deploy.results.drawing import annotate
from glip_deploy.video import detect_stream, open_source


def listen(detector: Detector, wanted: list[EncodedPrompt]) -> None:
    """Put what is typed into `wanted`; a prompt that cannot be used is reported, and the one before stays."""
    for line in sys.stdin:
        try:
            wanted[0] = detector.encode(line.strip())
        except GlipError as error:
            print(f"webcam: {error}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="glip_t/", help="bundle that glip-export wrote")
    parser.add_argument("--source", default="0", help="camera number, video file or address")
    parser.add_argument("--prompt", default="person. cup", help="what to look for at first")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--shortest-side", type=int, default=800, help="pixels; 224 for GLIP-nano")
    parser.add_argument("--headless", action="store_true", help="no window")
    args = parser.parse_args()
    if not args.headless:
        import cv2

    with Detector.open(args.model, shortest_side=args.shortest_side) as detector:
        wanted = [detector.encode(args.prompt)]
        Thread(target=listen, args=(detector, wanted), daemon=True).start()
        with open_source(args.source) as source:
            for frame, found in detect_stream(detector, source, lambda _: wanted[0], threshold=args.threshold):
                print(f"frame {frame.index}: {', '.join(found.phrases) or 'nothing'}", flush=True)
                if not args.headless:
                    cv2.imshow("GLIP", annotate(frame.image, found)[:, :, ::-1])  # OpenCV wants BGR
                    if cv2.waitKey(1) == ord("q"):
                        break


if __name__ == "__main__":
    try:
        main()
    except GlipError as error:
        sys.exit(f"webcam: {error}")
    except ImportError as error:
        sys.exit(f"webcam: {error}; pip install opencv-python for a window, or use --headless")
    except KeyboardInterrupt:
        sys.exit(130)
