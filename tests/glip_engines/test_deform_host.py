"""The CUDA kernels' index and blending arithmetic, built as plain C++, against the goldens and against torch."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from engine_needs import needs
from glip_engines.compile import build_host_library
from glip_engines.compilers import find_host_compiler
from glip_engines.deform_abi import DataType, Layout, Level, ProblemStruct, Shape, problem
from glip_engines.rewriting.deformable import pack_weights
from glip_export.model.deform import deform_conv2d, flat_read
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_data import load_golden

DCN_CASES = [case["name"] for case in load_golden("unit_dcn.npz")[1]]


pytestmark = needs(find_host_compiler)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIP_DEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
        loaded = ctypes.CDLL(str(build_host_library()))
    loaded.glip_deform_host_problem_error.restype = ctypes.c_char_p
    loaded.glip_deform_host_packed_weight_bytes.restype = ctypes.c_ulonglong
    loaded.glip_deform_host_tile.restype = ctypes.c_char_p
    return loaded


def address(array):
    return array.ctypes.data


def run(library, levels, weight, bias, *, stride=1, layout=Layout.NCHW, tile=32, strides=(0, 0), logits=False):
    """levels: rows of (x, offset, mask or None, out_hw), NCHW; returns NCHW results."""
    batch = levels[0][0].shape[0]
    shape = Shape(
        weight.shape[1], weight.shape[0], batch, stride=stride, x_layout=layout, y_layout=layout, mask_logits=logits
    )
    kept, rows, results = [], [], []
    for x, offset, mask, out in levels:
        stored = x if layout is Layout.NCHW else np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        size = (batch, weight.shape[0], *out) if layout is Layout.NCHW else (batch, *out, weight.shape[0])
        y = np.full(size, np.nan, np.float32)
        kept.append(stored)
        rows.append(
            Level(
                address(stored),
                address(offset),
                mask if mask is None else address(mask),
                address(y),
                x.shape[2:],
                out,
                *strides,
            )
        )
        results.append(y)
    given = problem(shape, rows, 0, None if bias is None else address(bias))
    packed = np.full(library.glip_deform_host_packed_weight_bytes(ctypes.byref(given)) // 4, np.nan, np.float32)
    library.glip_deform_host_pack_weights(
        ctypes.byref(given), ctypes.c_void_p(address(weight)), ctypes.c_void_p(address(packed))
    )
    given.weight = address(packed)
    assert library.glip_deform_host_run(ctypes.byref(given), tile) == 0
    return [y if layout is Layout.NCHW else y.transpose(0, 3, 1, 2) for y in results]


def golden_case(name):
    arrays, meta = load_golden("unit_dcn.npz")
    case = next(item for item in meta if item["name"] == name)
    x, positions, weight, bias, out = (
        arrays[f"{name}_{part}"] for part in ("x", "offset_mask", "weight", "bias", "out")
    )
    offset = np.ascontiguousarray(positions[:, :18])
    mask = np.ascontiguousarray(1 / (1 + np.exp(-positions[:, 18:].astype(np.float64))), np.float32)
    return case, x, offset, mask, weight, bias, out


def relative_error(ours, golden):
    assert ours.shape == golden.shape
    return np.abs(ours - golden).max() / np.abs(golden).max()


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("name", DCN_CASES)
def test_goldens_flat_maps_read_in_place(library, name, layout):
    case, x, offset, mask, weight, bias, out = golden_case(name)
    strides = (offset[0].size, mask[0].size)
    level = (x, offset, mask, out.shape[2:])
    (ours,) = run(library, [level], weight, bias, stride=case["stride"], layout=layout, strides=strides)
    assert relative_error(ours, out) <= 2e-5


@pytest.mark.parametrize("name", [name for name in DCN_CASES if name.startswith("flat")])
def test_goldens_flat_maps_reshaped_first(library, name):
    case, x, offset, mask, weight, bias, out = golden_case(name)
    offset, mask = (flat_read(torch.from_numpy(a), *out.shape[2:]).contiguous().numpy() for a in (offset, mask))
    (ours,) = run(library, [(x, offset, mask, out.shape[2:])], weight, bias, stride=case["stride"])
    assert relative_error(ours, out) <= 2e-5


def test_levels_share_one_launch(library):
    names = ("same", "same_odd", "same_big_offsets")
    cases = [golden_case(name) for name in names]
    weight, bias = cases[0][4], cases[0][5]
    levels = [(x, offset, mask, out.shape[2:]) for _, x, offset, mask, _, _, out in cases]
    together = run(library, levels, weight, bias, tile=64)
    for level, ours in zip(levels, together, strict=True):
        expected = deform_conv2d(*(torch.from_numpy(a) for a in (*level[:3], weight, bias)))
        assert relative_error(ours, expected.numpy()) <= 2e-5


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.sampled_from([1, 2]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 40.0]),
    whole=st.booleans(),
    tile=st.sampled_from([1, 7, 64]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_against_torch(library, seed, batch, channels, size, stride, spread, whole, tile):
    """Any size, any offsets: fractions, whole pixels (corners of weight zero, borders exactly hit), far outside."""
    rng = np.random.default_rng(seed)
    out = tuple(-(-side // stride) for side in size)
    x = rng.standard_normal((batch, channels[0], *size)).astype(np.float32)
    offset = (spread * rng.standard_normal((batch, 18, *out))).astype(np.float32)
    if whole:
        offset = offset.round()
    mask = rng.random((batch, 9, *out)).astype(np.float32)
    weight = rng.standard_normal((channels[1], channels[0], 3, 3)).astype(np.float32)
    bias = rng.standard_normal(channels[1]).astype(np.float32)
    (ours,) = run(library, [(x, offset, mask, out)], weight, bias, stride=stride, tile=tile)
    tensors = [torch.from_numpy(array).double() for array in (x, offset, mask, weight, bias)]
    # float32 positions, as the kernel has them: only then do both read between the same pixels
    expected = _double_with_single_positions(*tensors, stride)
    assert np.abs(ours - expected).max() <= 2e-5 * max(1.0, np.abs(expected).max())
    single = deform_conv2d(*(torch.from_numpy(array) for array in (x, offset, mask, weight, bias)), stride).numpy()
    assert np.abs(ours - single).max() <= 2e-5 * max(1.0, np.abs(expected).max())


def _double_with_single_positions(x, offset, mask, weight, bias, stride):
    """deform_conv2d in float64, its offsets such that position plus offset is the rounded float32 sum."""
    rows = torch.arange(offset.shape[2], dtype=torch.float64)[:, None] * stride - 1
    columns = torch.arange(offset.shape[3], dtype=torch.float64)[None, :] * stride - 1
    exact = offset.clone()
    for tap in range(9):
        for axis, line, place in ((0, rows, tap // 3), (1, columns, tap % 3)):
            base = line + place
            exact[:, 2 * tap + axis] = (base + offset[:, 2 * tap + axis]).float().double() - base
    return deform_conv2d(x, exact, mask, weight, bias, stride).numpy()


def test_positions_that_are_not_numbers(library):
    x = np.ones((1, 8, 3, 3), np.float32)
    offset, mask = np.full((1, 18, 3, 3), np.nan, np.float32), np.ones((1, 9, 3, 3), np.float32)
    offset[:, ::2] = np.inf
    weight, bias = np.ones((2, 8, 3, 3), np.float32), np.array([1.5, -2], np.float32)
    (ours,) = run(library, [(x, offset, mask, (3, 3))], weight, bias)
    assert (ours[0, 0] == 1.5).all()
    assert (ours[0, 1] == -2).all()


@pytest.mark.parametrize(("channels", "out", "kernel"), [(32, 64, (3, 3)), (7, 3, (3, 3)), (40, 70, (1, 2))])
def test_weights_packed_into_a_graph_are_those_of_the_c_interface(library, channels, out, kernel):
    weight = np.random.default_rng(0).normal(size=(out, channels, *kernel)).astype(np.float32)
    given = problem(Shape(channels, out, kernel=kernel), [])
    packed = np.full(library.glip_deform_host_packed_weight_bytes(ctypes.byref(given)) // 4, np.nan, np.float32)
    library.glip_deform_host_pack_weights(
        ctypes.byref(given), ctypes.c_void_p(address(weight)), ctypes.c_void_p(address(packed))
    )
    ours = pack_weights(weight)
    assert np.array_equal(ours.ravel(), packed)
    assert ours.flags.c_contiguous
    half = pack_weights(weight.astype(np.float16))
    assert half.dtype == np.float16 and np.array_equal(half, ours.astype(np.float16))


def test_masks_before_their_sigmoid(library):
    _, x, offset, mask, weight, bias, out = golden_case("same")
    logits = np.log(mask / (1 - mask))
    (ours,) = run(library, [(x, offset, logits, out.shape[2:])], weight, bias, logits=True)
    assert relative_error(ours, out) <= 2e-5


def test_without_mask_and_bias(library):
    _, x, offset, mask, weight, bias, _ = golden_case("same")
    (ours,) = run(library, [(x, offset, None, x.shape[2:])], weight, None)
    tensors = [torch.from_numpy(a) for a in (x, offset, np.ones_like(mask), weight, np.zeros_like(bias))]
    assert relative_error(ours, deform_conv2d(*tensors).numpy()) <= 2e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_height": 4}, "9 taps"),
        ({"batch": 0}, "at least 1"),
        ({"stride_width": 0}, "strides"),
        ({"data_type": 7}, "fp32, fp16 or bf16"),
        ({"position_type": DataType.BF16}, "offset and mask"),
        ({"x_layout": Layout.NHWC, "in_channels": 12}, "multiple of 8"),
        ({"num_levels": 9}, "1 to 8 levels"),
    ],
)
def test_invalid_problems(library, change, message):
    given = problem(Shape(16, 16), [Level(0, 0, 0, 0, (4, 4), (4, 4))])
    assert library.glip_deform_host_problem_error(ctypes.byref(given)) is None
    for name, value in change.items():
        setattr(given, name, value)
    assert message in library.glip_deform_host_problem_error(ctypes.byref(given)).decode()
    assert library.glip_deform_host_run(ctypes.byref(given), 32) == -1


def test_a_large_level_gets_the_wide_tile_and_a_small_one_many_blocks(library):
    def chosen(size, capability, data_type=DataType.F16):
        given = problem(Shape(256, 256, data_type=data_type), [Level(0, 0, 0, 0, size, size)])
        sizes = (ctypes.c_int * 4)()
        return library.glip_deform_host_tile(ctypes.byref(given), capability, 132, sizes).decode(), list(sizes)

    assert chosen((100, 168), 90)[0] == "wide"
    assert chosen((7, 11), 90)[0] == "small"
    assert chosen((100, 168), 75)[0] == "medium"
    assert chosen((100, 168), 60)[0] == "scalar"
    assert chosen((100, 168), 75, DataType.BF16)[0] == "scalar"
    assert chosen((100, 168), 90, DataType.F32)[0] == "scalar"
    # what a block may have: 64 KB on 7.5, 99 KB on 8.6, 8.9 and 12.0
    assert chosen((100, 168), 89)[1][3] <= 99 * 1024
    assert chosen((100, 168), 75)[1][3] <= 64 * 1024


def test_structures_match_the_header(library):
    given = problem(Shape(8, 8), [Level(0, 0, 0, 0, (4, 4), (4, 4))])
    assert library.glip_deform_host_launch_argument(ctypes.byref(given), 32, None, None) % 8 == 0
    assert (
        ctypes.sizeof(ProblemStruct) == 18 * 4 + 8 * (8 * 8 + 4 * 4) + 2 * 8
    )  # seventeen integers, and four bytes until pointers may begin
