"""The plugin as TensorRT 10 and later use it: its interface called on a CPU, where the kernels are their host build."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from engine_needs import skip_without
from glip_engines.compile import plugin_sources
from glip_engines.compilers import cuda_headers, find_host_compiler, find_tensorrt_headers
from glip_engines.flavours import Dialect, Flavour
from glip_engines.rewriting import rewrite
from glip_engines.rewriting.deformable import PLUGIN_OPERATOR, pack_weights
from glip_export.model.deform import deform_conv2d

FLOAT, HALF, BF16, LINEAR, HWC8 = 0, 1, 7, 0, 2
SAME = {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1)}


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    skip_without(find_host_compiler, find_tensorrt_headers, cuda_headers)
    command = [find_host_compiler(), "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
    includes = [find_tensorrt_headers(), cuda_headers()]
    library = tmp_path_factory.mktemp("harness") / "libharness.so"
    source = Path(__file__).with_name("plugin_harness.cpp")
    command += [f"-I{plugin_sources()}", *(word for folder in includes for word in ("-isystem", str(folder)))]
    done = subprocess.run([*command, "-o", library, source, "-ldl"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.harness_create.restype = ctypes.c_void_p
    loaded.harness_timing_id.restype = ctypes.c_char_p
    return loaded


class Plugin:
    def __init__(self, harness, **attributes):
        self.harness = harness
        names = [name.encode() for name in attributes]
        arrays = [np.atleast_1d(np.asarray(value, np.int64)) for value in attributes.values()]
        self.pointer = ctypes.c_void_p(
            harness.harness_create(
                len(names),
                (ctypes.c_char_p * len(names))(*names),
                (ctypes.c_void_p * len(names))(*(array.ctypes.data for array in arrays)),
                (ctypes.c_int * len(names))(*(array.size for array in arrays)),
            )
        )

    def __del__(self):
        self.harness.harness_destroy(self.pointer)

    def accepts(self, types, formats, position):
        count = len(types)
        pointers = ((ctypes.c_int * count)(*types), (ctypes.c_int * count)(*formats))
        return bool(self.harness.harness_accepts(self.pointer, position, count - 1, *pointers))

    def run(self, inputs, shape):
        inputs = [np.ascontiguousarray(array, np.float32) for array in inputs]
        result = np.full(shape, np.nan, np.float32)
        dims = [np.asarray(array.shape, np.int64) for array in (*inputs, result)]
        status = self.harness.harness_run(
            self.pointer,
            len(inputs),
            (ctypes.c_int * len(dims))(*(len(sides) for sides in dims)),
            (ctypes.c_void_p * len(dims))(*(sides.ctypes.data for sides in dims)),
            (ctypes.c_void_p * len(inputs))(*(array.ctypes.data for array in inputs)),
            ctypes.c_void_p(result.ctypes.data),
        )
        return status, result


def case(channels=40, out=24, size=(7, 9), stride=1, batch=2):
    rng = np.random.default_rng(1)
    height, width = (-(-side // stride) for side in size)
    return (
        rng.normal(size=(batch, channels, *size)).astype(np.float32),
        rng.normal(size=(out, channels, 3, 3)).astype(np.float32),
        rng.normal(size=(batch, 18, height, width)).astype(np.float32),
        rng.normal(size=out).astype(np.float32),
        rng.random((batch, 9, height, width)).astype(np.float32),
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("inputs", [3, 4, 5])
def test_results(harness, stride, inputs):
    x, weight, offset, bias, mask = case(stride=stride)
    plugin = Plugin(harness, **SAME, out_channels=24, strides=(stride, stride))
    given = [x, pack_weights(weight), offset, bias, mask][:inputs]
    status, ours = plugin.run(given, (2, 24, *offset.shape[2:]))
    assert status == 0
    bias, mask = (bias if inputs > 3 else 0 * bias), (mask if inputs > 4 else 1 + 0 * mask)
    expected = deform_conv2d(*(torch.from_numpy(array) for array in (x, offset, mask, weight, bias)), stride).numpy()
    assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()


def test_nodes_of_a_whole_graph(harness, tiny_bundle):
    """Attributes and packed weights as the rewriting writes them: every node computes what DeformConv does."""
    original = ir.load(tiny_bundle / "image.onnx")
    before = {node.name: node for node in original.graph if node.op_type == "DeformConv"}
    weights = {name: node.inputs[1].const_value.numpy().copy() for name, node in before.items()}
    biases = {name: node.inputs[3].const_value.numpy().copy() for name, node in before.items()}
    model = rewrite(original, Dialect(Flavour.TENSORRT, "10.9", 80), precision="fp32", form="plugin", pinned={})
    nodes = [node for node in model.graph if node.op_type == PLUGIN_OPERATOR]
    assert len(nodes) == len(before) > 20
    for node in nodes:
        integers = {name: a.value for name, a in node.attributes.items() if not name.startswith("plugin_")}
        weight, stride = weights[node.name], integers["strides"][0]
        x, _, offset, _, mask = case(channels=weight.shape[1], out=len(weight), stride=stride, batch=1)
        given = [x, node.inputs[1].const_value.numpy(), offset, biases[node.name], mask]
        status, ours = Plugin(harness, **integers).run(given, (1, len(weight), *offset.shape[2:]))
        tensors = (torch.from_numpy(array) for array in (x, offset, mask, weight, biases[node.name]))
        expected = deform_conv2d(*tensors, stride).numpy()
        assert status == 0 and np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("weight", (24, 40, 3, 3), "W has shape 24x40x3x3; packed for X of shape 2x40x7x9 it is 9x64x64"),
        ("weight", (9, 32, 64), "W has shape 9x32x64; packed"),
        ("weight", (9, 64, 128), "W has shape 9x64x128; packed"),
        ("bias", (23,), "B has shape 23"),
        ("offset", (2, 17, 7, 9), "offset has shape 2x17x7x9"),
        ("mask", (2, 18, 7, 9), "mask has shape 2x18x7x9"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(harness, capfd, name, shape, words):
    x, weight, offset, bias, mask = case()
    given = {"x": x, "weight": pack_weights(weight), "offset": offset, "bias": bias, "mask": mask}
    given[name] = np.ones(shape, np.float32)
    status, result = Plugin(harness, **SAME, out_channels=24).run(list(given.values()), (2, 24, 7, 9))
    assert status == -1 and np.isnan(result).all()
    assert f"glip::ModulatedDeformConv: {words}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("types", "formats", "accepted"),
    [
        ([HALF, HALF, FLOAT, HALF, FLOAT, HALF], [LINEAR] * 6, True),
        ([HALF, HALF, FLOAT, HALF, FLOAT, HALF], [HWC8, LINEAR, LINEAR, LINEAR, LINEAR, HWC8], True),
        ([BF16, BF16, FLOAT, BF16, FLOAT, BF16], [LINEAR] * 6, True),
        ([FLOAT] * 6, [LINEAR] * 6, True),
        ([HALF, HALF, HALF, HALF, HALF, HALF], [LINEAR] * 6, False),  # TensorRT 8.6 would choose it: half positions
        ([HALF, HALF, FLOAT, HALF, HALF, HALF], [LINEAR] * 6, False),
        ([HALF, FLOAT, FLOAT, HALF, FLOAT, HALF], [LINEAR] * 6, False),
        ([HALF, HALF, FLOAT, HALF, FLOAT, FLOAT], [LINEAR] * 6, False),
        ([HALF, HALF, FLOAT, HALF, FLOAT, HALF], [LINEAR, HWC8, LINEAR, LINEAR, LINEAR, LINEAR], False),
        ([FLOAT] * 6, [HWC8] + [LINEAR] * 5, False),
    ],
)
def test_types_and_formats(harness, types, formats, accepted):
    plugin = Plugin(harness, **SAME, out_channels=24)
    assert all(plugin.accepts(types, formats, position) for position in range(6)) is accepted


def test_equal_layers_share_their_timings(harness):
    """By the id of the timing cache, to which TensorRT adds types and shapes; without one it times every layer."""

    def timing_id(**attributes):
        plugin = Plugin(harness, **{**SAME, "out_channels": 24, **attributes})
        return harness.harness_timing_id(plugin.pointer)

    assert timing_id() == timing_id() != b""
    others = [{"out_channels": 25}, {"strides": (2, 2)}, {"pads": (0, 1, 1, 1)}, {"dilations": (2, 2)}]
    assert len({timing_id(), *(timing_id(**other) for other in others)}) == 5


def test_a_logger_finder_is_never_called(harness, capfd):
    """Its table of functions moved in TensorRT 11, so a call that is right in 10 jumps to something else there."""
    harness.setLoggerFinder(ctypes.c_void_p(ctypes.addressof(ctypes.create_string_buffer(b"\xff" * 64))))
    assert Plugin(harness, **SAME, out_channels=0).pointer.value is None
    assert "node node: out_channels is 0; at least 1 is supported" in capfd.readouterr().err
