"""Where a frame's time goes: the runtime's own profile of the image graph, added up by block of the network."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.backends.openvino import Precision, compile_graph
from glip_deploy.bundle.contract import IMAGE_GRAPH, Stage
from glip_deploy.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.bundle.manifest import Bundle

__all__ = ["LAYOUT", "profile_image_branch", "profile_openvino", "stage_of", "sum_rows", "sum_stages"]

LAYOUT = "added by the runtime"
"""What is not in the graph as it was exported: changes of memory layout, mostly."""


def stage_of(name: str, stages: Mapping[str, Stage]) -> Stage | None:
    """Return the stage of a node of an optimized graph; None where it comes from no node of the original one.

    Runtimes name what they make of a node after that node, with an ending.

    Args:
        name: of the optimized node.
        stages: stage of every node of the original graph, by the node's name (`glip_export.stages.stages_of`).
    """
    return next((stages[name[:end]] for end in range(len(name), 0, -1) if name[:end] in stages), None)


def sum_stages(events: Iterable[Mapping[str, Any]], stages: Mapping[str, Stage]) -> dict[str, float]:
    """Add up the kernel times of an ONNX Runtime profile, in seconds per stage, and last `LAYOUT`.

    Args:
        events: the profile's JSON array; events other than the end of a node's kernel are passed over.
        stages: see `stage_of`.
    """
    suffix = "_kernel_time"
    microseconds = {str(stage): 0 for stage in Stage if stage in stages.values()} | {LAYOUT: 0}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(suffix):
            microseconds[stage_of(name.removesuffix(suffix), stages) or LAYOUT] += int(event["dur"])
    return {stage: value / 1e6 for stage, value in microseconds.items()}


def profile_image_branch(
    bundle: Bundle, feed: Mapping[str, NDArray[np.generic]], runs: int, threads: int | None = None
) -> dict[str, float]:
    """Run the image graph under ONNX Runtime's profiler; return seconds per stage, mean of `runs`.

    The first run, which reserves memory, is left out.

    Raises:
        BackendError: ONNX Runtime cannot load the graph, or its profile has an unknown form.
        BundleError: a node of the graph belongs to no stage.
    """
    from glip_export.stages import stages_of

    graph = bundle.path / IMAGE_GRAPH
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(graph, threads=threads, profile=Path(scratch) / "profile")
        for _ in range(runs + 1):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    if len(starts) != runs + 1:
        raise BackendError(f"ONNX Runtime profiled {len(starts)} runs of {runs + 1}; its profile format is not known")
    kept = [event for event in events if event.get("ts", 0) >= starts[1]]
    return {stage: seconds / runs for stage, seconds in sum_stages(kept, stages_of(graph)).items()}


def profile_openvino(
    bundle: Bundle,
    feed: Mapping[str, NDArray[np.generic]],
    runs: int,
    precision: Precision = Precision.F32,
    threads: int | None = None,
) -> dict[str, float]:
    """Run the image graph on OpenVINO, which counts the time of every operation; return seconds per stage, as above.

    Raises:
        GlipError: OpenVINO cannot load the graph.
        BundleError: a node of the graph belongs to no stage.
    """
    from glip_export.stages import stages_of

    graph = bundle.path / IMAGE_GRAPH
    stages = stages_of(graph)
    request = compile_graph(graph, precision, threads, profile=True).create_infer_request()
    request.infer(dict(feed))
    total: dict[str, float] = {}
    for _ in range(runs):
        request.infer(dict(feed))
        rows = ((row.node_name, row.node_type, row.real_time.total_seconds()) for row in request.profiling_info)
        for stage, seconds in sum_rows(rows, stages).items():
            total[stage] = total.get(stage, 0.0) + seconds / runs
    return total


def sum_rows(rows: Iterable[tuple[str, str, float]], stages: Mapping[str, Stage]) -> dict[str, float]:
    """Add up the times of an OpenVINO profile, in seconds per stage, and last `LAYOUT`.

    Deformable convolutions, which the backend converts itself, have none of the graph's names, and a change of memory
    layout has the name of the operation that it is made for: both are known by their type.

    Args:
        rows: name, type and seconds of each operation.
        stages: see `stage_of`.
    """
    seconds = {str(stage): 0.0 for stage in Stage if stage in stages.values()} | {LAYOUT: 0.0}
    for name, kind, taken in rows:
        stage = {"DeformableConvolution": Stage.DEFORMABLE, "Reorder": None}.get(kind, stage_of(name, stages))
        seconds[stage or LAYOUT] += taken
    return seconds
