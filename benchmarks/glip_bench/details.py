"""What is measured of the runtime itself, apart from any other subject: prompts, and resizing."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_bench.timing import measure_interleaved
from glip_deploy import image
from glip_deploy.detector import Detector

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_bench.subjects import Options

__all__ = ["crop_to", "time_prompts", "time_resizing"]

SECOND_PROMPT = ["forklift", "hard hat", "safety vest"]


def crop_to(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Crop a picture's middle to the proportions of `size` (height, width) and resize it to that."""
    height, width = picture.shape[:2]
    scale = min(height / size[0], width / size[1])
    crop_h, crop_w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    return image.resize(np.ascontiguousarray(picture[top : top + crop_h, left : left + crop_w]), size)


def time_prompts(options: Options, prompt: str | list[str]) -> dict[str, float]:
    """Time the text branch on ONNX Runtime: a first prompt (which loads the graph), a second one, both again.

    Returns:
        Milliseconds by row of the table.
    """
    ms = {}

    def timed(name: str, detector: Detector, text: str | list[str]) -> None:
        start = time.perf_counter()
        detector.encode(text)
        ms[name] = round((time.perf_counter() - start) * 1e3, 3)

    with tempfile.TemporaryDirectory() as cache:
        for verify in (True, False):
            with Detector.open(options.bundle, threads=options.threads, cache_dir=cache, verify=verify) as detector:
                if not verify:
                    timed("known from an earlier run (disk)", detector, prompt)
                    break
                timed("first prompt (loads the text branch)", detector, prompt)
                timed("second prompt", detector, SECOND_PROMPT)
                timed("first prompt again (memory)", detector, prompt)
    return ms


def time_resizing(picture: NDArray[np.uint8], options: Options, runs: int) -> list[dict[str, Any]]:
    """Time exact and fast resizing from common video sizes, and say how far the pixels differ.

    The picture is smaller than a video frame, and enlarging it would leave no detail to differ in: the difference is
    measured on the picture itself, shrunk by the same factor.
    """
    rows = []
    for height, width in ((720, 1280), (1080, 1920), (1440, 2560), (2160, 3840)):
        frame = crop_to(picture, (height, width))
        size = image.network_size(height, width, options.shortest_side, options.longest_side)
        timings = measure_interleaved(
            {method.value: partial(image.resize, frame, size, method) for method in image.Resize}, max(10, runs)
        )
        shrunk = (max(1, round(picture.shape[0] * size[0] / height)), max(1, round(picture.shape[1] * size[1] / width)))
        exact, fast = (image.resize(picture, shrunk, method).astype(np.int16) for method in image.Resize)
        rows.append(
            {
                "from": [height, width],
                "to": list(size),
                "ms": {name: timing.to_dict() for name, timing in timings.items()},
                "mean_difference_grey_levels": round(float(np.abs(exact - fast).mean()), 3),
            }
        )
    return rows
