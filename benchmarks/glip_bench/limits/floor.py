"""The work that a graph needs for given shapes, and the time in which a machine can do it at best.

Multiply-adds and bytes are counted from the bundle's own ONNX graph, every size in it made a number first. Only
products count as arithmetic (matrix, convolution, deformable convolution); the rest is a few per cent of it.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glip_bench.limits.hardware import Hardware, measure_cpu
from glip_bench.subjects.profile import stage_of
from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.bundle.contract import IMAGE_GRAPH, Stage
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import BundleError, OptionError
from glip_deploy.frames.geometry import SIZE_DIVISOR
from glip_deploy.prompts.tokens import parse_prompt

if TYPE_CHECKING:
    import onnx

__all__ = ["Floor", "Shape", "Work", "by_stage", "count_image_branch", "describe_floor", "floor_of"]

SMALL = 64 << 20
"""Bytes below which weights are copied rather than linked."""
PRODUCTS = ("MatMul", "Gemm", "Conv", "DeformConv")


@dataclass(frozen=True)
class Shape:
    """Sizes of one run of the image branch, named as the axes of its graph."""

    height: int = 800
    width: int = 1344
    tokens: int = 16
    classes: int = 5
    batch: int = 1


@dataclass(frozen=True)
class Work:
    """One product."""

    stage: Stage
    name: str
    macs: int
    """Multiply-adds."""
    weights: int
    """Values of constant operands."""
    activations: int
    """Values read and written that are not constants."""


@dataclass(frozen=True)
class Floor:
    """Least time, in seconds, of one run."""

    arithmetic: float
    """All multiply-adds at the stated peak."""
    memory: float
    """Every weight read once, the frame read and nothing else: what even a single fused kernel must move."""
    by_product: float
    """Each product apart, its operands and result through device memory: the longer of its two times, summed."""

    @property
    def seconds(self) -> float:
        """The least time that any implementation needs."""
        return max(self.arithmetic, self.memory)


def count_image_branch(bundle: Bundle, shape: Shape) -> list[Work]:
    """Count the products of a bundle's image graph.

    Args:
        bundle: of any precision.
        shape: sides must be multiples of 32.

    Raises:
        OptionError: a side is no multiple of 32, or a size is below 1.
        BundleError: a node of the graph belongs to no stage.
    """
    from glip_export.stages import stages_of

    for side in (shape.height, shape.width):
        if side < SIZE_DIVISOR or side % SIZE_DIVISOR:
            raise OptionError(f"the network's input is {shape.width}x{shape.height}; both sides are multiples of 32")
    if min(shape.tokens, shape.classes, shape.batch) < 1:
        sizes = f"{shape.tokens}, {shape.classes}, {shape.batch}"
        raise OptionError(f"tokens, classes and batch are 1 or more, not {sizes}")
    graph = bundle.path / IMAGE_GRAPH
    return list(_products(_with_numbers(graph, asdict(shape)), stages_of(graph)))


def _with_numbers(path: Path, dimensions: Mapping[str, int]) -> onnx.GraphProto:
    """Return a graph with every axis a number: ONNX Runtime folds the arithmetic on sizes, ONNX infers the rest."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for value in model.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = dimensions[axis.dim_param]
    with tempfile.TemporaryDirectory() as scratch:
        fixed, folded, inferred = (Path(scratch) / name for name in ("fixed.onnx", "folded.onnx", "inferred.onnx"))
        tensors = model.graph.initializer
        for name in {e.value for tensor in tensors for e in tensor.external_data if e.key == "location"}:
            _link(path.parent / name, fixed.parent / name)  # the weights stay where they are
        onnx.save(model, str(fixed))
        open_session(fixed, folded=folded)
        onnx.shape_inference.infer_shapes_path(str(folded), str(inferred), data_prop=True)
        graph: onnx.GraphProto = onnx.load(str(inferred), load_external_data=False).graph
    return graph


def _link(source: Path, link: Path) -> None:
    """Make a hard link, because ONNX Runtime refuses data outside the model's folder; across disks, a copy.

    And a copy of what is small: while a file has two links, others cannot read it with the ONNX library.
    """
    if source.stat().st_size >= SMALL:
        try:
            os.link(source, link)
        except OSError:
            pass
        else:
            return
    shutil.copyfile(source, link)


def _products(graph: onnx.GraphProto, stages: Mapping[str, Stage]) -> Iterator[Work]:
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes = {
        value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    shapes.update(constants)
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        stage = stage_of(node.name, stages)
        if stage is None:
            raise BundleError(f"{node.op_type} {node.name} belongs to no stage of the network; export the bundle again")
        inputs = [shapes[name] for name in node.input if name]
        output = shapes[node.output[0]]
        yield Work(
            stage,
            node.name,
            _macs(node, inputs, output),
            sum(math.prod(shapes[name]) for name in node.input if name in constants),
            sum(math.prod(shapes[name]) for name in node.input if name and name not in constants) + math.prod(output),
        )


def _macs(node: onnx.NodeProto, inputs: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> int:
    if node.op_type == "MatMul":
        return math.prod(output) * inputs[0][-1]
    if node.op_type == "Gemm":
        transposed = next((a.i for a in node.attribute if a.name == "transA"), 0)
        return math.prod(output) * inputs[0][0 if transposed else 1]
    return math.prod(output) * math.prod(inputs[1][1:])  # weight (out, in / groups, kh, kw)


def floor_of(work: Sequence[Work], shape: Shape, machine: Hardware, precision: str = "fp16") -> Floor:
    """Return the least time of one run.

    Args:
        work: of `count_image_branch`.
        shape: the same.
        machine: a row of `HARDWARE`, or what `measure_cpu` gives.
        precision: "fp32", or a half precision.
    """
    size, flops = 4 if precision == "fp32" else 2, machine.flops(precision)
    frame = shape.batch * shape.height * shape.width * 3
    weights = sum(one.weights for one in work) * size
    return Floor(
        arithmetic=2 * sum(one.macs for one in work) / flops,
        memory=(weights + frame) / machine.bytes_per_second,
        by_product=sum(
            max(2 * one.macs / flops, (one.weights + one.activations) * size / machine.bytes_per_second) for one in work
        ),
    )


def by_stage(work: Iterable[Work]) -> dict[Stage, int]:
    """Return the multiply-adds of every block of the network that has any."""
    total = dict.fromkeys(Stage, 0)
    for one in work:
        total[one.stage] += one.macs
    return {stage: macs for stage, macs in total.items() if macs}


def describe_floor(path: Path, prompt: str, canvas: tuple[int, int], machine: Hardware | None = None) -> dict[str, Any]:
    """Count the work of one frame and return a result file's content.

    Args:
        path: a bundle.
        prompt: gives the numbers of tokens and classes.
        canvas: (height, width) of the network's input, in pixels.
        machine: a row of `HARDWARE`, in fp16; None to measure the processor at hand, in fp32.

    Raises:
        GlipError: a damaged bundle, a prompt that cannot be used, or whatever `count_image_branch` raises.
    """
    bundle = Bundle.open(path)
    parsed = parse_prompt(prompt, bundle.tokenizer(), max_tokens=bundle.max_tokens)
    shape = Shape(*canvas, tokens=len(parsed.input_ids), classes=len(parsed))
    work = count_image_branch(bundle, shape)
    precision = "fp32" if machine is None else "fp16"
    machine = machine or measure_cpu()
    floor = asdict(floor_of(work, shape, machine, precision))
    hardware = asdict(machine)
    del hardware["driver_names"]
    return {
        "kind": "floor",
        "variant": bundle.variant,
        "shape": asdict(shape),
        "gmac_by_stage": {stage.value: round(macs / 1e9, 3) for stage, macs in by_stage(work).items()},
        "weights": sum(one.weights for one in work),
        "hardware": hardware,
        "precision": precision,
        "floor_ms": {name: round(seconds * 1e3, 4) for name, seconds in floor.items()},
    }
