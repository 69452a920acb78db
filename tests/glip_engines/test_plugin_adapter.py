"""The plugin as TensorRT 10 and later use it: its interface called on a CPU, where the kernels are their host build."""

from __future__ import annotations

import ctypes

import numpy as np
import onnx_ir as ir
import pytest
from glip_engines.flavours import Dialect, Flavour
from glip_engines.rewriting import rewrite
from glip_engines.rewriting.deformable import pack_weights
from parity_data import load_golden
from plugin_execution import (
    Plugin,
    by_plugin,
    by_torch,
    expected_shape,
    feeds_for,
    integers,
    plugin_nodes,
    run_with_plugin,
)

from glip_deploy.backends.onnxruntime import open_session

FLOAT, HALF, BF16, LINEAR, HWC8 = 0, 1, 7, 0, 2
SAME = {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1), "out_channels": 24}
NEW = Dialect(Flavour.TENSORRT, "10.9", 80)
PYRAMID = ((9, 14), (5, 7), (3, 4), (2, 2), (1, 1))


def case(sizes=PYRAMID, channels=40, out=24, batch=2):
    rng = np.random.default_rng(1)
    return [
        rng.normal(size=(batch, sum(height * width for height, width in sizes), channels)).astype(np.float32),
        pack_weights(rng.normal(size=(out, channels, 3, 3)).astype(np.float32)),
        rng.normal(size=out).astype(np.float32),
        *(rng.normal(size=(batch, 27, *size)).astype(np.float32) for size in sizes),
    ]


@pytest.mark.parametrize(("reads", "stride"), [(0, 1), (-1, 2), (1, 1)])
@pytest.mark.parametrize("sizes", [PYRAMID, PYRAMID[:2], ((1, 1), (1, 1))], ids=str)
def test_results(harness, reads, stride, sizes):
    inputs, attributes = case(sizes), {**SAME, "reads": reads, "strides": (stride, stride)}
    status, ours = Plugin(harness, **attributes).run(inputs, expected_shape(inputs, **attributes))
    assert status == 0
    expected = by_torch(inputs, **attributes)
    assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", [case["name"] for case in load_golden("unit_dcn.npz")[1]])
def test_the_official_kernel(harness, name):
    """Every reference case as two levels, of which one is the case's: the other branch of a flat read, for instance."""
    arrays, meta = load_golden("unit_dcn.npz")
    stride = next(item["stride"] for item in meta if item["name"] == name)
    x, maps, weight, bias, out = (arrays[f"{name}_{part}"] for part in ("x", "offset_mask", "weight", "bias", "out"))
    out_channels = -(-len(bias) // 8) * 8  # the plugin takes multiples of 8
    channels = -(-x.shape[1] // 8) * 8
    weight = np.pad(weight, [(0, out_channels - len(weight)), (0, channels - x.shape[1]), (0, 0), (0, 0)])
    tokens = np.pad(x, [(0, 0), (0, channels - x.shape[1]), (0, 0), (0, 0)])
    tokens = tokens.reshape(len(x), channels, -1).transpose(0, 2, 1)
    other = np.zeros((len(x), 27, *x.shape[2:]), np.float32)
    reads = 0 if maps.shape[2:] == x.shape[2:] and stride == 1 else 1 if stride == 1 else -1
    if reads == 0:
        sizes, levels = [maps], [tokens]
    else:  # the level that is read has no positions of its own that matter, the other no features
        blank = np.zeros((len(x), maps.shape[2] * maps.shape[3], channels), np.float32)
        sizes, levels = ([maps, other], [blank, tokens]) if reads == 1 else ([other, maps], [tokens, blank])
    inputs = [np.concatenate(levels, axis=1), pack_weights(weight), np.pad(bias, (0, out_channels - len(bias))), *sizes]
    attributes = {**SAME, "out_channels": out_channels, "reads": reads, "strides": (stride, stride)}
    status, ours = Plugin(harness, **attributes).run(inputs, expected_shape(inputs, **attributes))
    assert status == 0
    ours = ours.transpose(0, 2, 1).reshape(len(x), out_channels, *out.shape[2:])[:, : out.shape[1]]
    assert np.abs(ours - out).max() <= 2e-5 * np.abs(out).max()


@pytest.mark.parametrize(("size", "batch"), [((96, 64), 2), ((32, 32), 1)], ids=str)
def test_a_whole_graph(harness, tiny_bundle, size, batch):
    """The rewritten graph, its plugin nodes run by the plugin, detects what the bundle's own graph does."""
    model = rewrite(ir.load(tiny_bundle / "image.onnx"), NEW, precision="fp32", form="plugin", pinned={})
    ir.external_data.load_to_model(model)
    assert len(plugin_nodes(model)) == 6
    feeds = feeds_for(size, batch)
    boxes, scores, labels = run_with_plugin(model, feeds, by_plugin(harness))
    expected = open_session(tiny_bundle / "image.onnx", threads=1).run(None, feeds)
    assert (expected[1] > 0.05).sum() > 10
    np.testing.assert_allclose(scores, expected[1], atol=2e-6)
    detected = expected[1] > 0
    np.testing.assert_allclose(boxes[detected], expected[0][detected], atol=2e-3)
    assert np.array_equal(labels[detected], expected[2][detected])


@pytest.mark.parametrize("node", range(6))
def test_nodes_of_a_whole_graph(harness, tiny_bundle, node):
    """Attributes and packed weights as the rewriting writes them: every node computes three levels' DeformConvs."""
    model = rewrite(ir.load(tiny_bundle / "image.onnx"), NEW, precision="fp32", form="plugin", pinned={})
    written = plugin_nodes(model)[node]
    attributes = integers(written)
    weight, bias = (written.inputs[i].const_value.numpy() for i in (1, 2))
    x, _, _, *maps = case(channels=32, batch=1)
    inputs = [x, weight, bias, *maps]
    status, ours = Plugin(harness, **attributes).run(inputs, expected_shape(inputs, **attributes))
    expected = by_torch(inputs, **attributes)
    assert status == 0 and np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("index", "shape", "words"),
    [
        (0, (2, 9, 14, 40), "X has shape 2x9x14x40, not (batch, locations, channels)"),
        (0, (2, 178, 39), "X has 39 channels; multiples of 8"),
        (0, (2, 177, 40), "X has 177 locations; the maps have 178"),
        (1, (24, 40, 3, 3), "W has shape 24x40x3x3; packed for X of shape 2x178x40 it is 9x64x64"),
        (1, (9, 32, 64), "W has shape 9x32x64; packed"),
        (1, (9, 64, 128), "W has shape 9x64x128; packed"),
        (2, (23,), "B has shape 23"),
        (3, (2, 18, 9, 14), "map 0 has shape 2x18x9x14; it is (batch, 3 x taps, height, width)"),
        (4, (1, 27, 5, 7), "map 1 has shape 1x27x5x7"),
        (5, (2, 27, 3, 5), "X has 178 locations; the maps have 181"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(harness, capfd, index, shape, words):
    inputs = case()
    inputs[index] = np.ones(shape, np.float32)
    status, result = Plugin(harness, **SAME).run(inputs, (2, 4, 24))
    assert status == -1 and np.isnan(result).all()
    assert f"glip::ModulatedDeformConv: {words}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        ({"reads": -1}, PYRAMID, "level 1 convolves a side of 9, whose result is not the 5 of the smaller map"),
        ({"reads": 1, "strides": (2, 2)}, PYRAMID, "level 0 convolves a side of 5"),
        ({"pads": (0, 0, 0, 0)}, PYRAMID, "level 0 convolves a side of 9"),
        ({"reads": 1}, PYRAMID[:1], "there is one level, which has no neighbor to read"),
    ],
)
def test_levels_that_do_not_fit_are_refused(harness, capfd, changes, sizes, words):
    status, result = Plugin(harness, **{**SAME, **changes}).run(case(sizes), (2, 4, 24))
    assert status == -1 and np.isnan(result).all()
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("types", "formats", "accepted"),
    [
        ([HALF, HALF, HALF, FLOAT, FLOAT, HALF], [LINEAR] * 6, True),
        ([BF16, BF16, BF16, FLOAT, FLOAT, BF16], [LINEAR] * 6, True),
        ([FLOAT] * 6, [LINEAR] * 6, True),
        ([HALF] * 6, [LINEAR] * 6, False),  # TensorRT 8.6 would choose it: half positions
        ([HALF, HALF, HALF, FLOAT, HALF, HALF], [LINEAR] * 6, False),
        ([HALF, FLOAT, HALF, FLOAT, FLOAT, HALF], [LINEAR] * 6, False),
        ([HALF, HALF, HALF, FLOAT, FLOAT, FLOAT], [LINEAR] * 6, False),
        ([HALF, HALF, HALF, FLOAT, FLOAT, HALF], [HWC8] + [LINEAR] * 5, False),
        ([HALF, HALF, HALF, FLOAT, FLOAT, HALF], [LINEAR] * 5 + [HWC8], False),
    ],
)
def test_types_and_formats(harness, types, formats, accepted):
    plugin = Plugin(harness, **SAME)
    assert all(plugin.accepts(types, formats, position) for position in range(6)) is accepted


def test_equal_layers_share_their_timings(harness):
    """By the id of the timing cache, to which TensorRT adds types and shapes; without one it times every layer."""

    def timing_id(**attributes):
        plugin = Plugin(harness, **{**SAME, **attributes})
        return harness.harness_timing_id(plugin.pointer)

    assert timing_id() == timing_id() != b""
    others = [{"out_channels": 32}, {"strides": (2, 2)}, {"pads": (0, 1, 1, 1)}, {"dilations": (2, 2)}, {"reads": 1}]
    assert len({timing_id(), *(timing_id(**other) for other in others)}) == 6


def test_a_logger_finder_is_never_called(harness, capfd):
    """Its table of functions moved in TensorRT 11, so a call that is right in 10 jumps to something else there."""
    harness.setLoggerFinder(ctypes.c_void_p(ctypes.addressof(ctypes.create_string_buffer(b"\xff" * 64))))
    assert Plugin(harness, **{**SAME, "out_channels": 0}).pointer.value is None
    assert "node node: out_channels is 0; multiples of 8 are supported" in capfd.readouterr().err
