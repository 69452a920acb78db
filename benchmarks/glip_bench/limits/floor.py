"""The floor: the work a graph needs for given shapes, and the time in which a machine can do it at best.

Multiply-adds and bytes are counted from the bundle's own ONNX graph, every size in it made a number first. Only
products count as arithmetic (matrix, convolution, deformable convolution); the rest is a few per cent of it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_bench.subjects.profile import Stage, stage_of
from glip_deploy.backends.onnxruntime import open_session
from glip_deploy.bundle.contract import IMAGE_GRAPH
from glip_deploy.bundle.manifest import Bundle
from glip_deploy.errors import GlipError

if TYPE_CHECKING:
    import onnx

__all__ = [
    "HARDWARE",
    "Floor",
    "Hardware",
    "Shape",
    "Work",
    "count_image_branch",
    "floor_of",
    "hardware",
    "hardware_of",
    "measure_cpu",
]

MATRIX, CONVOLUTION, DEFORMABLE = ("MatMul", "Gemm"), ("Conv",), ("DeformConv",)
PRODUCTS = (*MATRIX, *CONVOLUTION, *DEFORMABLE)


@dataclass(frozen=True)
class Hardware:
    """What the maker states, dense (no structured sparsity)."""

    name: str
    half_flops: float
    """fp16 operations a second with fp32 sums, on tensor cores where there are any; a multiply-add is two."""
    single_flops: float
    """fp32, not TF32."""
    bytes_per_second: float
    """Of device memory."""


HARDWARE = {
    name: Hardware(name, half * 1e12, single * 1e12, gigabytes * 1e9)
    for name, half, single, gigabytes in (
        ("P100", 21.2, 10.6, 732),  # SXM2; no tensor cores
        ("V100", 125, 15.7, 900),  # SXM2
        ("T4", 65, 8.1, 320),
        ("A100", 312, 19.5, 2039),  # SXM, 80 GB
        ("L4", 121, 30.3, 300),
        ("RTX 4090", 165.2, 82.6, 1008),
        ("H100", 989, 67, 3350),  # SXM
        ("H200", 989, 67, 4800),
        ("Orin AGX", 42.5, 5.3, 204.8),  # 64 GB, GPU alone
    )
}


@dataclass(frozen=True)
class Shape:
    """Sizes of one run of the image branch."""

    height: int = 800
    width: int = 1344
    tokens: int = 16
    classes: int = 5
    batch: int = 1

    @property
    def dimensions(self) -> dict[str, int]:
        """By the names of the graph's axes."""
        return {
            "batch": self.batch,
            "height": self.height,
            "width": self.width,
            "tokens": self.tokens,
            "classes": self.classes,
        }


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
    """Values read and written that are no constants."""


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
        """No version can be faster."""
        return max(self.arithmetic, self.memory)


def hardware(name: str) -> Hardware:
    """Return a GPU by name, in any spelling of case, spaces and hyphens.

    Raises:
        GlipError: not in the table; the names are listed.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    for item in HARDWARE.values():
        if plain(item.name) == plain(name):
            return item
    raise GlipError(f'"{name}" is not known; known are {", ".join(HARDWARE)}, and "cpu" for the machine at hand')


def hardware_of(gpu: str) -> Hardware | None:
    """Return the row for a GPU by its driver's name ("NVIDIA A100-SXM4-80GB"), None where the table has none."""
    return next((item for name, item in HARDWARE.items() if name in gpu), None)


def count_image_branch(bundle: Bundle, shape: Shape) -> list[Work]:
    """Count the products of a bundle's image graph.

    Args:
        bundle: of any precision.
        shape: sides must be multiples of 32.

    Raises:
        GlipError: a side is no multiple of 32, or a size is below 1.
    """
    for side in (shape.height, shape.width):
        if side < 32 or side % 32:
            raise GlipError(f"the network's input is {shape.width}x{shape.height}; both sides are multiples of 32")
    if min(shape.tokens, shape.classes, shape.batch) < 1:
        raise GlipError(f"tokens, classes and batch are 1 or more, not {shape.tokens}, {shape.classes}, {shape.batch}")
    fusion = bool(bundle.manifest["config"]["head"]["fusion"])
    graph = _with_numbers(bundle.path / IMAGE_GRAPH, shape.dimensions)
    return list(_products(graph, fusion))


def _with_numbers(path: Path, dimensions: Mapping[str, int]) -> onnx.GraphProto:
    """Return the graph with every axis a number: ONNX Runtime folds the arithmetic on sizes, ONNX infers the rest."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for value in model.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = dimensions[axis.dim_param]
    with tempfile.TemporaryDirectory() as scratch:
        fixed, folded, inferred = (Path(scratch) / name for name in ("fixed.onnx", "folded.onnx", "inferred.onnx"))
        for tensor in model.graph.initializer:  # the weights stay where they are
            for entry in tensor.external_data:
                if entry.key == "location":
                    source = path.parent / entry.value
                    link = fixed.parent / entry.value
                    if not link.exists():
                        _link(source, link)
        onnx.save(model, str(fixed))
        open_session(fixed, folded=folded)
        onnx.shape_inference.infer_shapes_path(str(folded), str(inferred), data_prop=True)
        graph: onnx.GraphProto = onnx.load(str(inferred), load_external_data=False).graph
    return graph


def _link(source: Path, link: Path) -> None:
    """A hard link (ONNX Runtime refuses data outside the model's folder), or a copy across disks."""
    import os
    import shutil

    try:
        os.link(source, link)
    except OSError:
        shutil.copyfile(source, link)


def _products(graph: onnx.GraphProto, fusion: bool) -> Iterable[Work]:
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes = {
        value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    shapes.update(constants)
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        inputs = [shapes[name] for name in node.input if name]
        output = shapes[node.output[0]]
        yield Work(
            stage_of(node.name, fusion),
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
        machine: a row of HARDWARE, or `measure_cpu()`.
        precision: "fp32", or a half precision.
    """
    size = 4 if precision == "fp32" else 2
    flops = machine.single_flops if precision == "fp32" else machine.half_flops
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
    """Multiply-adds per block of the network."""
    total = dict.fromkeys(Stage, 0)
    for one in work:
        total[one.stage] += one.macs
    return total


def measure_cpu(seconds: float = 0.5) -> Hardware:
    """Measure the processor at hand: a 2048-wide fp32 product, and a copy of 256 MB.

    The best of several rounds each; a copy reads and writes, so both directions count. Half precision is taken to be
    no faster than single, as in ONNX Runtime's CPU provider.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.random((2048, 2048), np.float32) for _ in range(2))
    out = np.empty_like(a)
    source = np.zeros(1 << 26, np.float32)
    target = np.zeros_like(source)
    product = _best(lambda: np.matmul(a, b, out=out), seconds)
    copy = _best(lambda: np.copyto(target, source), seconds)
    flops = 2 * 2048**3 / product
    return Hardware("cpu", flops, flops, 2 * source.nbytes / copy)


def _best(action: Any, seconds: float) -> float:
    action()
    best, end = math.inf, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        action()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best
