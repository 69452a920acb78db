"""Measure what an operation of our own could gain over OpenVINO's deformable convolution on a CPU.

    python benchmarks/kernels/deform_cpu.py --rounds 7 --json deform_cpu.json

Every deformable convolution of a block of GLIP's head is run in turn, in fp32, with random offsets, on one thread, as

* OpenVINO's node, converted from ONNX as the backend does it: the part that it has in OpenVINO's own profile, without
  what is added for bias and memory layout;
* the trial in `deform_cpu.cpp`, which samples into tiles and multiplies them, on AVX2 and FMA, bias and layout of the
  result included;
* the product alone, of samples that lie in memory already, by NumPy.

Processor time is counted, which other work on the machine disturbs less than the clock; with more threads the clock
shows that time divided by their number, at best.

Needs a C++ compiler, and a processor with AVX2 and FMA.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / room) for room in ("export", "engines", "benchmarks"))]

# Read when NumPy is imported.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
from glip_bench.machine.host import describe_machine, versions  # noqa: E402
from glip_engines.compilers import find_host_compiler, run  # noqa: E402

from glip_deploy.backends.openvino import compile_graph  # noqa: E402
from glip_deploy.cli.app import run_main  # noqa: E402
from glip_deploy.errors import OptionError  # noqa: E402
from glip_deploy.files import write_atomically  # noqa: E402

if TYPE_CHECKING:
    from numpy.typing import NDArray

SOURCE = Path(__file__).with_suffix(".cpp")
BLOCKS = {"GLIP-T": 6, "GLIP-L": 8}
CHANNELS = 256
STRIDES = (8, 16, 32, 64, 128)
WAYS = ("OpenVINO", "trial", "product alone")


@dataclass(frozen=True)
class Layer:
    """A 3x3 deformable convolution with padding 1: sizes of the map that is read and of the result."""

    branch: str
    height: int
    width: int
    out_height: int
    out_width: int
    stride: int
    channels: int = CHANNELS
    outputs: int = CHANNELS
    offset_groups: int = 1

    @property
    def macs(self) -> int:
        """Multiply-adds of the product."""
        return self.out_height * self.out_width * 9 * self.channels * self.outputs


def layers(height: int, width: int) -> list[Layer]:
    """Return the deformable convolutions of one block, for a canvas."""
    sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    own = [Layer("own level", *size, *size, 1) for size in sizes]
    below = [Layer("level below", *larger, *size, 2) for larger, size in itertools.pairwise(sizes)]
    above = [Layer("level above", *size, *size, 1) for size in sizes[1:]]
    return own + below + above


@dataclass
class Arrays:
    """What a layer takes, of one picture: x (C, H, W), weights (O, C, 3, 3), bias (O), offsets and masks."""

    x: NDArray[np.float32]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    offsets: NDArray[np.float32]
    mask: NDArray[np.float32]

    @classmethod
    def of(cls, layer: Layer, spread: float, seed: int = 0) -> Arrays:
        """Make random ones, offsets with a standard deviation of `spread` pixels."""
        rng = np.random.default_rng(seed)
        taps, size = 9 * layer.offset_groups, (layer.out_height, layer.out_width)
        x, weights, bias, offsets = (
            rng.normal(size=shape).astype(np.float32)
            for shape in (
                (layer.channels, layer.height, layer.width),
                (layer.outputs, layer.channels, 3, 3),
                (layer.outputs,),
                (2 * taps, *size),
            )
        )
        return cls(x, weights, bias, offsets * np.float32(spread), rng.random((taps, *size), np.float32))


class _Shape(ctypes.Structure):
    """`DeformShape` of deform_cpu.cpp."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("channels", "height", "width", "outputs", "out_height", "out_width", "kernel_height", "kernel_width"),
            *("stride_y", "stride_x", "dilation_y", "dilation_x", "pad_top", "pad_left", "offset_groups"),
        )
    ]


def _address(array: NDArray[np.float32]) -> ctypes.c_void_p:
    assert array.dtype == np.float32 and array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)


class Trial:
    """The trial, compiled.

    Raises:
        OptionError: this processor has no AVX2.
        MissingPackage: there is no compiler.
        EngineError: the compiler refuses the source.
    """

    def __init__(self) -> None:
        if not has_avx2():
            raise OptionError("the trial needs a processor with AVX2 and FMA; run it on another machine")
        with tempfile.TemporaryDirectory() as scratch:
            library = Path(scratch) / "deform_cpu.so"
            options = ["-O2", "-std=c++17", "-mavx2", "-mfma", "-shared", "-fPIC", "-pthread"]
            run([find_host_compiler(), *options, str(SOURCE), "-o", str(library)])
            self._library = ctypes.CDLL(str(library))
        self._library.deform_packed_size.restype = ctypes.c_size_t

    def prepare(self, layer: Layer, arrays: Arrays, threads: int) -> Callable[[], NDArray[np.float32]]:
        """Arrange weights and input; return a function that computes (O, out_height, out_width) in one place."""
        sizes = (layer.channels, layer.height, layer.width, layer.outputs, layer.out_height, layer.out_width, 3, 3)
        shape = _Shape(*sizes, layer.stride, layer.stride, 1, 1, 1, 1, layer.offset_groups)
        packed = np.zeros(self._library.deform_packed_size(ctypes.byref(shape)), np.float32)
        self._library.deform_pack(ctypes.byref(shape), _address(arrays.weights), _address(packed))
        x = np.ascontiguousarray(arrays.x.transpose(1, 2, 0))
        bias = np.zeros(-(-layer.outputs // 16) * 16, np.float32)
        bias[: layer.outputs] = arrays.bias
        out = np.empty((layer.outputs, layer.out_height, layer.out_width), np.float32)

        def compute() -> NDArray[np.float32]:
            given = (x, arrays.offsets, arrays.mask, packed, bias, out)
            self._library.deform(ctypes.byref(shape), *map(_address, given), ctypes.c_size_t(threads))
            return out

        return compute


def has_avx2() -> bool:
    """Whether this processor can run the trial."""
    info = Path("/proc/cpuinfo")
    flags = (
        next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.is_file() else ""
    )
    return {"avx2", "fma"} <= set(flags.split())


def onnx_model(layer: Layer, arrays: Arrays) -> bytes:
    """Return a graph of the layer alone, as it is in a bundle: its weights are constant, all else is an input."""
    from onnx import TensorProto, helper, numpy_helper

    size = [1, layer.out_height, layer.out_width]
    shapes = {
        "x": [1, *arrays.x.shape],
        "offsets": [1, *arrays.offsets.shape],
        "mask": [1, *arrays.mask.shape],
        "y": [1, layer.outputs, *size[1:]],
    }
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    attributes: dict[str, Any] = {"strides": [layer.stride] * 2, "pads": [1] * 4, "kernel_shape": [3, 3]}
    node = helper.make_node(
        "DeformConv", ["x", "w", "offsets", "b", "mask"], ["y"], offset_group=layer.offset_groups, **attributes
    )
    constants = [numpy_helper.from_array(arrays.weights, "w"), numpy_helper.from_array(arrays.bias, "b")]
    inputs = [values[name] for name in ("x", "offsets", "mask")]
    graph = helper.make_graph([node], "layer", inputs, [values["y"]], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


class OpenVINONode:
    """The layer on OpenVINO."""

    def __init__(self, layer: Layer, arrays: Arrays) -> None:
        compiled = compile_graph(onnx_model(layer, arrays), threads=1, profile=True)
        self._request = compiled.create_infer_request()
        self._feed = {"x": arrays.x[None], "offsets": arrays.offsets[None], "mask": arrays.mask[None]}

    def __call__(self) -> tuple[NDArray[np.float32], float]:
        """Return the result, and the seconds of processor time of the node."""
        start = time.process_time()
        self._request.infer(self._feed)
        spent = time.process_time() - start
        rows = [(row.node_type, row.real_time.total_seconds()) for row in self._request.profiling_info]
        share = dict(rows)["DeformableConvolution"] / sum(seconds for _, seconds in rows)
        return np.array(self._request.get_output_tensor().data[0]), spent * share


def measure(layer: Layer, trial: Trial, rounds: int, spread: float) -> dict[str, Any]:
    """Time a layer in every way, in turn, after one round that is not counted.

    Returns:
        Milliseconds by way, under "ms" the median and under "least_ms" the least, and the largest difference of the
        results of the first two, as a part of the largest value.
    """
    arrays = Arrays.of(layer, spread)
    node, compute = OpenVINONode(layer, arrays), trial.prepare(layer, arrays, threads=1)
    samples = np.ones((layer.out_height * layer.out_width, 9 * layer.channels), np.float32)
    weights = np.ascontiguousarray(arrays.weights.reshape(layer.outputs, -1).T)
    product = np.empty((len(samples), layer.outputs), np.float32)
    wanted = node()[0]
    difference = float(np.abs(wanted - compute()).max() / np.abs(wanted).max())
    np.matmul(samples, weights, out=product)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        seconds["OpenVINO"].append(node()[1])
        for way, action in (("trial", compute), ("product alone", lambda: np.matmul(samples, weights, out=product))):
            start = time.process_time()
            action()
            seconds[way].append(time.process_time() - start)
    ms = {way: round(statistics.median(values) * 1e3, 3) for way, values in seconds.items()}
    least = {way: round(min(values) * 1e3, 3) for way, values in seconds.items()}
    sizes = {"map": [layer.height, layer.width], "result": [layer.out_height, layer.out_width], "stride": layer.stride}
    work = {"gmac": round(layer.macs / 1e9, 3), "ms": ms, "least_ms": least}
    return {"branch": layer.branch, **sizes, **work, "difference": difference}


def command(arguments: argparse.Namespace) -> int:
    """Measure every layer, and print the sums of all blocks."""
    trial = Trial()
    rows = []
    print(f"{'':<28}{'GMAC':>8}" + "".join(f"{way:>16}" for way in WAYS) + "   ms")
    for layer in layers(*arguments.canvas):
        row = measure(layer, trial, arguments.rounds, arguments.spread)
        rows.append(row)
        name = f"{layer.branch}, {layer.out_height}x{layer.out_width}"
        print(f"{name:<28}{row['gmac']:>8.2f}" + "".join(f"{row['ms'][way]:>16.2f}" for way in WAYS), flush=True)
    blocks = BLOCKS[arguments.variant]
    gmac = blocks * sum(row["gmac"] for row in rows)
    frame = {}
    for key, what in (("ms", "medians"), ("least_ms", "least times")):
        frame[key] = {way: round(blocks * sum(row[key][way] for row in rows), 1) for way in WAYS}
        name = f"{blocks} blocks, {what}"
        print(f"{name:<28}{gmac:>8.2f}" + "".join(f"{frame[key][way]:>16.1f}" for way in WAYS))
    difference = max(row["difference"] for row in rows)
    print(f"largest difference between OpenVINO and the trial: {difference:.1e} of the largest value")
    if arguments.json is not None:
        result = {
            "what": "deformable convolution on a CPU",
            "machine": describe_machine(),
            "versions": versions(),
            "threads": 1,
            "variant": arguments.variant,
            "canvas": list(arguments.canvas),
            "spread": arguments.spread,
            "rounds": arguments.rounds,
            "frame": frame,
            "difference": difference,
            "layers": rows,
        }
        write_atomically(arguments.json, json.dumps(result, indent=1) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canvas", type=int, nargs=2, default=(800, 1344), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--variant", choices=BLOCKS, default="GLIP-T")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--spread", type=float, default=2.0, help="standard deviation of the offsets, pixels")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    return run_main(lambda: command(arguments), "deform_cpu.py", extra="openvino")


if __name__ == "__main__":
    sys.exit(main())
