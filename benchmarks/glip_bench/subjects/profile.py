"""Where a frame's time goes: ONNX Runtime's own profile of the image graph, summed by block of the network."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.bundle.contract import IMAGE_GRAPH
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Stage", "profile_image_branch", "stage_of", "sum_stages"]

_TOWER = re.compile(r"/head/dyhead_tower\.(\d+)(/.*)?")


class Stage(StrEnum):
    """A block of the image branch, in the order it runs."""

    SWIN = "Swin"
    FPN = "FPN"
    FUSION = "fusion"
    TEXT_LAYERS = "BERT layers of the head"
    DEFORM = "DyConv: deformable convolutions"
    DYCONV = "DyConv: offsets, norms, DyReLU"
    PREDICTION = "box and token scores"
    REST = "normalise, decode, top 1000, layout"


def stage_of(node: str, fusion: bool) -> Stage:
    """Tell the stage from a node's name, which carries the path of the module it was traced from.

    Args:
        node: for instance "/head/dyhead_tower.2/DyConv.1/DeformConv".
        fusion: the tower repeats (fusion, BERT layer, DyConv); without it, DyConv alone.
    """
    if "/backbone/body" in node:
        return Stage.SWIN
    if "/backbone" in node:
        return Stage.FPN
    found = _TOWER.search(node)
    if found is not None:
        kind = int(found.group(1)) % 3 if fusion else 2
        if kind < 2:
            return (Stage.FUSION, Stage.TEXT_LAYERS)[kind]
        return Stage.DEFORM if "/DeformConv" in node else Stage.DYCONV
    return Stage.PREDICTION if "/head/" in node else Stage.REST


def sum_stages(events: Iterable[Mapping[str, Any]], fusion: bool) -> dict[Stage, float]:
    """Sum the kernel times of an ONNX Runtime profile, in seconds per stage.

    Args:
        events: the profile's JSON array; events other than node kernels are passed over.
        fusion: see `stage_of`.
    """
    suffix = "_kernel_time"
    microseconds: Counter[Stage] = Counter()
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(suffix):
            microseconds[stage_of(name.removesuffix(suffix), fusion)] += int(event["dur"])
    return {stage: microseconds[stage] / 1e6 for stage in Stage}


def profile_image_branch(
    bundle: Bundle, feed: Mapping[str, NDArray[np.generic]], runs: int, threads: int | None = None
) -> dict[Stage, float]:
    """Run the image graph under ONNX Runtime's profiler; return seconds per stage, mean of `runs`.

    The first, unprofitable run (allocation, warm-up) is profiled apart and thrown away.
    """
    fusion = bool(bundle.manifest["config"]["head"]["fusion"])
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(bundle.path / IMAGE_GRAPH, threads=threads, profile=Path(scratch) / "profile")
        for _ in range(runs + 1):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    if len(starts) != runs + 1:
        raise GlipError(f"ONNX Runtime profiled {len(starts)} runs of {runs + 1}; its profile format is not known")
    kept = [event for event in events if event.get("ts", 0) >= starts[1]]
    return {stage: seconds / runs for stage, seconds in sum_stages(kept, fusion).items()}
