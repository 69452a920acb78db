"""Everything between a frame and its boxes, timed piece by piece on one backend."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_bench.machine import describe_machine, versions
from glip_bench.memory import peak_resident_bytes
from glip_bench.stages import profile_image_branch
from glip_bench.timing import measure_interleaved
from glip_deploy import image
from glip_deploy.detections import select
from glip_deploy.detector import Detector, EncodedPrompt
from glip_deploy.prompt import thresholds

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SCHEMA", "Settings", "crop_to", "run"]

SCHEMA = 1
SECOND_PROMPT = ["forklift", "hard hat", "safety vest"]


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    bundle: Path
    picture: Path
    prompt: str | list[str]
    frame_size: tuple[int, int] = (960, 1600)
    """(height, width) of the frame, in pixels; 960x1600 is resized to 800x1333, a canvas of 800x1344."""
    shortest_side: int = 800
    longest_side: int | None = 1333
    threshold: float = 0.5
    runs: int = 7
    threads: int | None = None


def crop_to(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Crop a picture's middle to the proportions of `size` (height, width) and resize it to that."""
    height, width = picture.shape[:2]
    scale = min(height / size[0], width / size[1])
    crop_h, crop_w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    return image.resize(np.ascontiguousarray(picture[top : top + crop_h, left : left + crop_w]), size)


def run(settings: Settings, on_step: Callable[[str], None] = lambda step: None) -> dict[str, Any]:
    """Measure and return a result file's content.

    Raises:
        GlipError: whatever `Detector` raises for its arguments; an unreadable picture.
    """
    on_step("open the bundle")
    frame = crop_to(image.load_image(settings.picture), settings.frame_size)

    def open_detector(verify: bool) -> Detector:
        return Detector.open(
            settings.bundle,
            shortest_side=settings.shortest_side,
            longest_side=settings.longest_side,
            threads=settings.threads,
            cache_dir=cache,
            verify=verify,
        )

    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        detector = open_detector(verify=True)
        opened = time.perf_counter() - start
        on_step("encode prompts")
        prompts, encoded = _prompts(detector, settings)
        again = open_detector(verify=False)
        start = time.perf_counter()
        again.encode(settings.prompt)
        prompts["known from an earlier run (disk)"] = time.perf_counter() - start
        again.close()
    on_step("first frame")
    start = time.perf_counter()
    detections = detector.detect(frame, encoded, settings.threshold, color="rgb")
    first = time.perf_counter() - start
    on_step(f"detection, {settings.runs} frames")
    pieces, feed = _pieces(detector, frame, encoded, settings)
    timings = measure_interleaved(pieces, settings.runs)
    detector.close()
    on_step("image branch by stage")
    stages = profile_image_branch(detector.bundle, feed, max(2, settings.runs // 2), settings.threads)
    on_step("resizing")
    resizing = _resizing(settings)
    on_step("peak memory")
    peak = peak_resident_bytes(
        settings.bundle,
        settings.prompt,
        settings.frame_size,
        settings.shortest_side,
        settings.longest_side,
        settings.threads,
    )
    canvas = feed["frames"].shape
    return {
        "schema": SCHEMA,
        "kind": "detection",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "versions": versions(),
        "subject": {
            "backend": "onnxruntime-cpu",
            "variant": detector.bundle.variant,
            "precision": detector.bundle.manifest.get("precision"),
            "checkpoint_sha256": detector.bundle.manifest["checkpoint"]["sha256"],
            "threads": settings.threads,
        },
        "shape": {
            "batch": 1,
            "frame": list(settings.frame_size),
            "network": [int(canvas[1]), int(canvas[2])],
            "tokens": int(feed["text_embedding"].shape[1]),
            "classes": int(feed["class_map"].shape[1]),
        },
        "open_seconds": round(opened, 3),
        "first_frame_seconds": round(first, 3),
        "detections": len(detections),
        "prompt_ms": {name: round(seconds * 1e3, 3) for name, seconds in prompts.items()},
        "frame_ms": {name: timing.to_dict() for name, timing in timings.items()},
        "image_branch_stage_ms": {stage.value: round(seconds * 1e3, 3) for stage, seconds in stages.items()},
        "resize": resizing,
        "peak_resident_bytes": peak,
    }


def _prompts(detector: Detector, settings: Settings) -> tuple[dict[str, float], EncodedPrompt]:
    """Time the text branch: a first prompt (which loads the graph), a second one, both again."""
    seconds = {}

    def timed(name: str, text: str | list[str]) -> EncodedPrompt:
        start = time.perf_counter()
        result = detector.encode(text)
        seconds[name] = time.perf_counter() - start
        return result

    encoded = timed("first prompt (loads the text branch)", settings.prompt)
    timed("second prompt", SECOND_PROMPT)
    timed("first prompt again (memory)", settings.prompt)
    return seconds, encoded


def _pieces(
    detector: Detector, frame: NDArray[np.uint8], encoded: EncodedPrompt, settings: Settings
) -> tuple[dict[str, Callable[[], object]], dict[str, NDArray[Any]]]:
    """Make one callable per piece of a frame's way, and the arrays that the image branch is given."""
    content = image.canvas(
        [frame], color="rgb", shortest_side=settings.shortest_side, longest_side=settings.longest_side
    )
    feed: dict[str, NDArray[Any]] = {
        "frames": content.frames,
        "image_sizes": content.image_sizes,
        "text_embedding": np.ascontiguousarray(encoded.embedding)[None],
        "text_mask": np.ones((1, encoded.embedding.shape[0]), np.int64),
        "class_map": np.ascontiguousarray(encoded.prompt.class_map)[None],
    }
    backend = detector.backend
    boxes, scores, labels = backend.detect(**feed)
    limits = thresholds(encoded.prompt, settings.threshold)
    sizes = [tuple(int(v) for v in sides[0]) for sides in (content.image_sizes, content.original_sizes)]

    def suppress() -> object:
        return select(
            boxes[0],
            scores[0],
            labels[0],
            thresholds=limits,
            phrases=encoded.phrases,
            image_size=(sizes[0][0], sizes[0][1]),
            original_size=(sizes[1][0], sizes[1][1]),
        )

    return {
        "resize and canvas": lambda: image.canvas(
            [frame], color="rgb", shortest_side=settings.shortest_side, longest_side=settings.longest_side
        ),
        "image branch": lambda: backend.detect(**feed),
        "threshold and NMS": suppress,
        "whole frame": lambda: detector.detect(frame, encoded, settings.threshold, color="rgb"),
    }, feed


def _resizing(settings: Settings) -> list[dict[str, Any]]:
    """Time exact and fast resizing from common video sizes, and say how far the pixels differ.

    The picture is smaller than a video frame, and enlarging it would leave no detail to differ in: the difference is
    measured on the picture itself, shrunk by the same factor.
    """
    picture = image.load_image(settings.picture)
    rows = []
    for height, width in ((720, 1280), (1080, 1920), (1440, 2560), (2160, 3840)):
        frame = crop_to(picture, (height, width))
        size = image.network_size(height, width, settings.shortest_side, settings.longest_side)
        timings = measure_interleaved(
            {method.value: partial(image.resize, frame, size, method) for method in image.Resize},
            max(10, settings.runs),
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
