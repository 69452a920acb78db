"""Watch two cameras at once, in two threads: the weights and the prompt's embedding are there once.

python examples/two_cameras.py rtsp://camera/stream yard.mp4 --model glip_t/ --prompt "person. hard hat"
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event

from glip_deploy import Detector, EncodedPrompt, GlipError
from glip_deploy.video import detect_stream, open_source


def watch(detector: Detector, prompt: EncodedPrompt, name: str, threshold: float, stop: Event) -> None:
    with detector, open_source(name) as source:
        for frame, found in detect_stream(detector, source, prompt, threshold=threshold):
            print(f"{source.name} frame {frame.index}: {', '.join(found.phrases) or 'nothing'}\n", end="", flush=True)
            if stop.is_set():
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs=2, metavar="source", help="camera number, video file or address")
    parser.add_argument("--model", default="glip_t/", help="bundle that glip-export wrote")
    parser.add_argument("--prompt", default="person. car")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--shortest-side", type=int, default=800, help="pixels; 224 for GLIP-nano")
    args = parser.parse_args()

    stop = Event()
    with Detector.open(args.model, shortest_side=args.shortest_side) as detector, ThreadPoolExecutor() as pool:
        prompt = detector.encode(args.prompt)  # once, for both
        detectors = detector, detector.clone()  # with TensorRT, each has a CUDA stream and buffers of its own
        pairs = zip(detectors, args.sources, strict=True)
        watching = [pool.submit(watch, one, prompt, name, args.threshold, stop) for one, name in pairs]
        try:
            wait(watching, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # after Ctrl-C, or where one camera fails, the other ends too
        for done in watching:
            done.result()


if __name__ == "__main__":
    try:
        main()
    except GlipError as error:
        sys.exit(f"two_cameras: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
