"""What every fp32 island is worth (`glip_export.precision.ISLANDS`): what breaks where it is computed in fp16.

    python benchmarks/parity/island_evidence.py    GLIP-T, stand-in weights, 800x1344; GLIP-nano on its fixed scenes
    python benchmarks/parity/island_evidence.py --only nano

Every half-precision value is rounded (`rounded=True`), which cannot show sums that are kept in fp16, nor positions in
fp16: both are decided inside an engine's kernels. For those the values themselves are looked at.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from parity_data import ROOT, load_golden
from precision_table import OUTPUTS, exported, feed_of, mean_errors, session

from glip_deploy import Detector, load_image
from glip_deploy.frames.canvas import make_canvas
from glip_deploy.results.boxes import pairwise_iou

if TYPE_CHECKING:
    import onnx_ir
    from glip_export.precision import Island
    from numpy.typing import NDArray

    from glip_deploy import Detections

    Array = NDArray[Any]
    Arrays = dict[str, Array]

HALF_MAX, HALF_NORMAL = 65504.0, 2.0**-14
GOLDEN = "glip_T_od"
NANO = ROOT / "tests" / "data" / "nano"
PICTURE = ROOT / "export" / "glip_export" / "data" / "picture.jpg"


def feed_at_full_size() -> Arrays:
    """Return a picture of 800x1344 with the golden's text."""
    arrays, meta = load_golden(f"{GOLDEN}.npz")
    feed = feed_of(arrays, meta)
    picture = load_image(PICTURE)
    picture = picture[: round(picture.shape[1] * 800 / 1344)]
    seen = make_canvas([picture], color="rgb", shortest_side=800, longest_side=1344)
    assert seen.frames.shape == (1, 800, 1344, 3), seen.frames.shape
    return {**feed, "frames": seen.frames, "image_sizes": seen.image_sizes}


def variants() -> Iterator[tuple[str, tuple[Island, ...]]]:
    """Give every choice of islands with its name: all of them, each in turn given up, none."""
    from glip_export.precision import ISLANDS

    yield "all islands", ISLANDS
    for island in ISLANDS:
        yield f"without {island.name}", tuple(other for other in ISLANDS if other is not island)
    yield "no islands", ()


# -- values that decide what a kernel may keep in fp16 ---------------------------------------------------------------


def looked_at(graph: Path, feed: Arrays, folder: Path) -> None:
    """Print the sums, probabilities and positions of the fp32 graph that fp16 could not hold."""
    import onnx_ir as ir
    from glip_export.precision import ISLANDS

    model = ir.load(graph)
    islands = {island.name: island for island in ISLANDS}
    wanted: dict[str, list[tuple[onnx_ir.Node, onnx_ir.Value | None]]] = {
        "group norm": [],
        "pooling": [],
        "softmax": [],
        "sampling": [],
    }
    for node in model.graph:
        if islands["group norm"].holds(node):
            wanted["group norm"].append((node, node.inputs[0]))
        elif islands["pooling"].holds(node) and node.op_type == "ReduceMean":
            wanted["pooling"].append((node, node.inputs[0]))
        elif islands["softmax over locations"].holds(node):
            wanted["softmax"].append((node, node.outputs[0]))
        elif node.op_type == "DeformConv":
            wanted["sampling"].append((node, node.inputs[2]))
    for value in {v: None for pairs in wanted.values() for _, v in pairs}:
        assert value is not None
        value.dtype = value.dtype or ir.DataType.FLOAT
        if value not in model.graph.outputs:
            model.graph.outputs.append(value)
    runner = session(model, folder, "looked_at")

    def values(kind: str) -> Iterator[tuple[onnx_ir.Node, Array]]:
        found = runner.run([value.name for _, value in wanted[kind] if value is not None], feed)
        for (node, _), array in zip(wanted[kind], found, strict=True):
            yield node, array.astype(np.float64)

    squares = [np.square(a).reshape(*a.shape[:2], -1).sum(-1) for _, a in values("group norm")]
    over = np.concatenate([s.ravel() > HALF_MAX for s in squares])
    print(
        f"group norm: sums of squares reach {max(s.max() for s in squares):.3g},"
        f" {over.sum()} of {len(over)} groups pass {HALF_MAX:.0f}"
    )
    sums, counts = [], []
    for node, a in values("pooling"):
        given = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        axes = (2, 3) if given is None else tuple(int(axis) for axis in given.numpy().ravel())
        counts.append(int(np.prod([a.shape[axis] for axis in axes])))
        sums.append(np.abs(a).sum(axis=axes))
    over = np.concatenate([s.ravel() > HALF_MAX for s in sums])
    print(
        f"pooling: sums of up to {max(counts)} magnitudes reach {max(s.max() for s in sums):.3g},"
        f" {over.sum()} of {len(over)} pass {HALF_MAX:.0f}"
    )
    small = np.concatenate([p.ravel() for _, p in values("softmax")])
    print(
        f"softmax over locations: median probability {np.median(small):.2g}; {np.mean(small < HALF_NORMAL):.1%}"
        f" of {small.size} are subnormal in fp16, with on average"
        f" {np.mean(np.abs(small.astype(np.float16) - small) / small):.2%} relative error"
        f" ({np.mean(small.astype(np.float16) == 0):.1%} become zero); normal ones have"
        f" {np.mean((np.abs(small.astype(np.float16) - small) / small)[small >= HALF_NORMAL]):.3%}"
    )
    errors = []
    for node, offset in values("sampling"):
        errors.append(np.abs(rounded_positions(node, offset) - offset).ravel())
    every = np.concatenate(errors)
    print(f"sampling: positions in fp16 are off by up to {every.max():.3f} cells, {every.mean():.4f} on average")


def bases(node: onnx_ir.Node, offset: Array) -> Array:
    """Return where the taps of every location read without an offset: (1, 18, H, W), y before x, in input cells."""
    stride = int(node.attributes["strides"].as_ints()[0]) if "strides" in node.attributes else 1
    height, width = offset.shape[-2:]
    ys, xs = np.meshgrid(np.arange(height) * stride, np.arange(width) * stride, indexing="ij")
    taps = [(ys + ky - 1, xs + kx - 1) for ky in range(3) for kx in range(3)]
    return np.stack([axis for tap in taps for axis in tap])[None].astype(np.float32)


def rounded_positions(node: onnx_ir.Node, offset: Array) -> Array:
    """Return the offsets that sampling positions rounded to fp16 amount to."""
    base = bases(node, offset)
    rounded: Array = (base + offset).astype(np.float16).astype(np.float64)
    return rounded - base


def with_rounded_positions(model: onnx_ir.Model, shapes: dict[str | None, tuple[int, ...]]) -> onnx_ir.Model:
    """Let every deformable convolution read at positions rounded to fp16: all that is left without the island."""
    import onnx_ir as ir

    for i, node in enumerate([node for node in model.graph if node.op_type == "DeformConv"]):
        offset = node.inputs[2]
        base = bases(node, np.empty(shapes[node.name]))
        held = ir.Value(name=f"base_{i}", const_value=ir.tensor(base, name=f"base_{i}"))
        model.graph.register_initializer(held)
        at = ir.node("Add", [offset, held])
        low = ir.node("Cast", [at.outputs[0]], attributes={"to": int(ir.DataType.FLOAT16)})
        up = ir.node("Cast", [low.outputs[0]], attributes={"to": int(ir.DataType.FLOAT)})
        moved = ir.node("Sub", [up.outputs[0], held])
        for number, new in enumerate((at, low, up, moved)):
            new.outputs[0].name = f"position_{i}_{number}"
        model.graph.insert_before(node, [at, low, up, moved])
        node.replace_input_with(2, moved.outputs[0])
    return model


# -- outputs ---------------------------------------------------------------------------------------------------------


def boxes_of(found: Arrays, least: float) -> tuple[Array, Array, Array]:
    """Return boxes, labels and scores of the candidates with a score of `least` or more."""
    keep = found["scores"][0] >= least
    return found["boxes"][0][keep].astype(np.float64), found["labels"][0][keep], found["scores"][0][keep]


def shift(found: Arrays, expected: Arrays, least: float = 0.3) -> str:
    """Say how far boxes above a score have moved, in pixels of the canvas, and how many are no longer there."""
    boxes, labels, scores = boxes_of(expected, least)
    others, their_labels, their_scores = boxes_of(found, least * 0.8)
    moved, changed, lost = [], [], 0
    for box, label, score in zip(boxes, labels, scores, strict=True):
        distance = np.abs(others - box).max(axis=1) + np.where(their_labels == label, 0, np.inf)
        nearest = int(distance.argmin()) if len(distance) else -1
        if nearest < 0 or distance[nearest] > 8:
            lost += 1
            continue
        moved.append(distance[nearest])
        changed.append(abs(their_scores[nearest] - score))
    if not moved:
        return f"{lost} of {len(boxes)} lost"
    return f"{np.mean(moved):6.3f} px  {np.mean(changed):.4f}  {lost} of {len(boxes)} lost"


def full_size(folder: Path) -> None:
    """Print what GLIP-T with stand-in weights loses."""
    import onnx_ir as ir
    from glip_export.precision import round_weights, to_precision

    meta = load_golden(f"{GOLDEN}.npz")[1]
    graph = exported(meta["manifest"], meta["salt"], folder)
    feed = feed_at_full_size()
    looked_at(graph, feed, folder)

    def run(model: onnx_ir.Model) -> Arrays:
        runner = session(model, folder, "variant")
        names = [output.name for output in runner.get_outputs()]
        return dict(zip(names, runner.run(names, feed), strict=True))

    model = ir.load(graph)
    offsets = {node.name: node.inputs[2] for node in model.graph if node.op_type == "DeformConv"}
    for offset in offsets.values():
        assert offset is not None
        offset.dtype = ir.DataType.FLOAT
        if offset not in model.graph.outputs:
            model.graph.outputs.append(offset)
    seen = run(model)
    shapes = {name: seen[str(offset.name)].shape for name, offset in offsets.items() if offset is not None}
    expected = run(ir.load(graph))
    print(f"{'mean absolute error':<34}" + "".join(f"{name:>12}" for name in OUTPUTS) + "   boxes     scores")

    def show(label: str, found: Arrays) -> None:
        errors = mean_errors([found[name] for name in OUTPUTS], [expected[name] for name in OUTPUTS])
        row = "".join(f"{errors[name]:>12.2e}" for name in OUTPUTS)
        print(f"{label:<34}{row}   {shift(found, expected)}", flush=True)

    show("weights only", run(round_weights(ir.load(graph), "fp16")))
    for label, islands in variants():
        show(label, run(to_precision(ir.load(graph), "fp16", rounded=True, islands=islands)))
    lowered = to_precision(ir.load(graph), "fp16", rounded=True)
    show("positions in fp16", run(with_rounded_positions(lowered, shapes)))


def nano(folder: Path) -> None:
    """Print how many of GLIP-nano's boxes with a score of 0.3 come back: same label, IoU 0.95, score within 0.01."""
    from glip_export.bundle_writer import export_bundle
    from nano.subjects import rounded_copy

    bundle = export_bundle(ROOT / "examples" / "nano" / "glip_nano.pth", folder / "nano").path
    entries = json.loads((NANO / "scenes.json").read_text())

    def detections(path: Path, least: float) -> list[Detections]:
        with Detector.open(path, shortest_side=224, cache_dir=None) as detector:
            return [detector.detect(load_image(NANO / e["file"]), e["prompt"], least, color="rgb") for e in entries]

    full = detections(bundle, 0.3)
    for i, (label, islands) in enumerate(variants()):
        total, same, ious, scores = 0, 0, [], []
        for one, other in zip(
            full, detections(rounded_copy(bundle, "fp16", folder / f"v{i}", islands), 0.25), strict=True
        ):
            for box, kind, score in zip(one.boxes, one.labels, one.scores, strict=True):
                near = other.labels == kind
                total += 1
                if not near.any():
                    continue
                iou = pairwise_iou(box[None].astype(float), other.boxes[near].astype(float))[0]
                best = int(iou.argmax())
                change = abs(float(other.scores[near][best]) - float(score))
                ious.append(iou[best])
                scores.append(change)
                same += bool(iou[best] >= 0.95 and change <= 0.01)
        print(
            f"{label:<34}{same} of {total} found again, mean IoU {np.mean(ious):.5f},"
            f" worst {min(ious):.3f}, mean score difference {np.mean(scores):.5f}, worst {max(scores):.4f}",
            flush=True,
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("nano", "full"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "full":
            print("GLIP-nano, fixed scenes, fp16")
            nano(Path(folder))
        if args.only != "nano":
            print("GLIP-T, stand-in weights, 800x1344, 14 tokens, fp16")
            full_size(Path(folder))


if __name__ == "__main__":
    main()
