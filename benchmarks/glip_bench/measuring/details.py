"""What is measured apart from the rounds: prompts, resizing, reading and drawing, and the hardware's limit."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_bench.limits.floor import Shape, count_image_branch, floor_of
from glip_bench.limits.hardware import hardware_of, measure_cpu
from glip_bench.measuring.frames import crop_to
from glip_bench.measuring.timing import Timing, measure, measure_interleaved
from glip_bench.subjects.base import Piece, SubjectName
from glip_deploy.detector import Detector
from glip_deploy.errors import OptionError
from glip_deploy.frames import Resize, network_size, resize
from glip_deploy.video.open import open_source

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_bench.limits.hardware import Hardware
    from glip_bench.subjects.base import Options
    from glip_deploy.bundle.manifest import Bundle
    from glip_deploy.results.detections import Detections

__all__ = ["add_floors", "time_ends", "time_prompts", "time_resizing"]

SECOND_PROMPT = ["forklift", "hard hat", "safety vest"]


def time_prompts(options: Options, prompt: str | list[str]) -> dict[str, float]:
    """Time the text branch on ONNX Runtime: a first prompt (which loads the graph), a second one, the first again.

    Returns:
        Milliseconds by row of the table.
    """
    ms = {}

    def timed(name: str, detector: Detector, text: str | list[str]) -> None:
        start = time.perf_counter()
        detector.encode(text)
        ms[name] = round((time.perf_counter() - start) * 1e3, 3)

    with tempfile.TemporaryDirectory() as cache:
        # Verified and unverified bundles do not share a cache.
        opened = partial(Detector.open, options.bundle, threads=options.threads, cache_dir=cache, verify=False)
        with opened() as detector:
            timed("first prompt (loads the text branch)", detector, prompt)
            timed("second prompt", detector, SECOND_PROMPT)
            timed("first prompt again (memory)", detector, prompt)
        with opened() as detector:
            timed("known from an earlier run (disk)", detector, prompt)
    return ms


def time_resizing(picture: NDArray[np.uint8], options: Options, runs: int) -> list[dict[str, Any]]:
    """Time exact and fast resizing from common video sizes, and measure how far the pixels differ.

    The picture is smaller than a video frame, and enlarging it would leave no detail to differ in: the difference is
    measured on the picture itself, shrunk by the same factor.

    Args:
        picture: (H, W, 3) uint8.
        options: the sides of the network.
        runs: timed runs of each method; at least ten are done.
    """
    rows = []
    for height, width in ((720, 1280), (1080, 1920), (1440, 2560), (2160, 3840)):
        frame = crop_to(picture, (height, width))
        size = network_size(height, width, options.shortest_side, options.longest_side)
        methods = (Resize.EXACT, Resize.FAST)
        timings = measure_interleaved(
            {method.value: partial(resize, frame, size, method) for method in methods}, max(10, runs)
        )
        shrunk = (max(1, round(picture.shape[0] * size[0] / height)), max(1, round(picture.shape[1] * size[1] / width)))
        exact, fast = (resize(picture, shrunk, method).astype(np.int16) for method in methods)
        rows.append(
            {
                "from": [height, width],
                "to": list(size),
                "ms": {name: timing.to_dict() for name, timing in timings.items()},
                "mean_difference_grey_levels": round(float(np.abs(exact - fast).mean()), 3),
            }
        )
    return rows


def time_ends(spec: str, frame: NDArray[np.uint8], found: Detections, runs: int) -> dict[str, Any]:
    """Time both ends of a program around the detector: reading a frame of the source, and drawing the boxes on one.

    Args:
        spec: the source; up to 32 frames of it are read, at its own size.
        frame: (H, W, 3) uint8 RGB, to draw on.
        found: what to draw.
        runs: of drawing.

    Returns:
        {"decode": {..., "size"} (milliseconds a frame), "draw": {..., "boxes"}}.
    """
    from glip_deploy.results.drawing import annotate

    seconds, size = [], [0, 0]
    with open_source(spec, max_frames=32) as source:
        start = time.perf_counter()
        for read in source:
            seconds.append(time.perf_counter() - start)
            size = [int(side) for side in read.image.shape[:2]]
            start = time.perf_counter()
    draw = measure(lambda: annotate(frame, found), max(3, runs))
    return {
        "decode": {**Timing.of(seconds).to_dict(), "size": size},
        "draw": {**draw.to_dict(), "boxes": len(found)},
    }


def add_floors(result: dict[str, Any], bundle: Bundle) -> None:
    """Add to each subject of a result how far from its hardware's limit it is: facts["floor"].

    The work is counted from the bundle's graph, that of the official form from its modules; the image branch's time
    (and the text branch's, where a subject runs it every frame) is compared with it. On a CPU the limit is measured.
    Where the GPU's limits are not known, result["no_floor"] says so.
    """
    height, width = result["shape"]["network"]
    shape = Shape(height, width, result["shape"]["tokens"], result["shape"]["classes"])
    work = count_image_branch(bundle, shape)
    cpu: Hardware | None = None
    for name, facts in result["subjects"].items():
        if SubjectName(name).is_yardstick:  # its work is not counted
            continue
        if facts.get("device") in (None, "cpu"):
            machine = cpu = cpu or measure_cpu()
        else:
            try:
                machine = hardware_of(result["gpus"][0]["name"] if result["gpus"] else "an unnamed GPU")
            except OptionError as error:
                result["no_floor"] = str(error)
                continue
        precision = "fp32" if facts.get("precision") == "fp32" else "fp16"
        flops = machine.flops(precision)
        pieces: Mapping[str, Any] = facts["pieces_ms"]
        spent = sum(pieces[piece]["median"] for piece in (Piece.TEXT, Piece.IMAGE) if piece in pieces)
        macs, seconds = sum(one.macs for one in work), floor_of(work, shape, machine, precision).seconds
        if name == SubjectName.TORCH_OFFICIAL:
            macs = _official_macs(bundle, height, width)
            seconds = 2 * macs / flops
        facts["floor"] = {
            "hardware": machine.name,
            "precision": precision,
            "flops": flops,
            "bytes_per_second": machine.bytes_per_second,
            "gmac": round(macs / 1e9, 2),
            "floor_ms": round(seconds * 1e3, 3),
            "share": round(seconds * 1e3 / spent, 4),
        }


def _official_macs(bundle: Bundle, height: int, width: int) -> int:
    import msgspec
    from glip_export.model.config import GlipConfig

    from glip_bench.subjects.official_form import official_macs

    config = msgspec.convert(bundle.manifest.config, GlipConfig, from_attributes=True)
    return sum(official_macs(config, height, width).values())
