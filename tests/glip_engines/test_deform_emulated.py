"""The source of the CUDA kernels, run on a CPU thread by thread (`engines/plugin/host/emulate.h`).

Fragments, shared memory, pipelines and edges are those of the kernels; what instructions do is taken from PTX's manual.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from engine_needs import needs
from glip_engines.compile import build_host_library
from glip_engines.compilers import find_host_compiler
from glip_engines.deform_abi import DataType, Layout, Level, Shape, problem
from glip_export.model.deform import deform_conv2d, flat_read
from parity_data import load_golden

pytestmark = needs(find_host_compiler)

CASES = {case["name"]: case for case in load_golden("unit_dcn.npz")[1]}
FEW = ("same_odd", "stride2_odd", "flat_up_batch2", "flat_up_one")
TYPES = {DataType.F32: torch.float32, DataType.F16: torch.float16, DataType.BF16: torch.bfloat16}
# Against float64 on rounded inputs: half a unit in the last place of the result (2^-11, 2^-8), and some for samples.
# fp16 on 6.0 also sums sixteen products in fp16.
TOLERANCE = {DataType.F32: 1e-5, DataType.F16: 1e-3, DataType.BF16: 8e-3}
TOLERANCE_60 = 2e-3
WIDE, MEDIUM, SMALL = 0, 1, 2
KERNELS = [
    (capability, data, tile)
    for capability in (800, 750, 700, 610, 600)
    for data in DataType
    for tile in (
        (WIDE, MEDIUM, SMALL)
        if capability >= 800 and data is not DataType.F32
        else (MEDIUM, SMALL)
        if capability >= 700 and data is DataType.F16
        else (WIDE,)  # ordinary units, which have one tile
    )
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """By the capability they emulate, built when first asked for."""
    built = {}
    cache = tmp_path_factory.mktemp("cache")

    def library(capability):
        if capability not in built:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("GLIP_DEPLOY_CACHE", str(cache))
                path = build_host_library("host/deform_emulated.cpp", [f"GLIP_DEFORM_EMULATED={capability}"])
            built[capability] = ctypes.CDLL(str(path))
        return built[capability]

    return library


def emulate(
    library,
    levels,
    weight,
    bias,
    *,
    data,
    tile,
    stride=1,
    layout=Layout.NCHW,
    position=DataType.F32,
    backwards=False,
    eager=False,
    logits=False,
):
    """levels: rows of (x, offset, mask or None) in NCHW, positions as large as the output or read flat; y NCHW float64.

    Returns results and what float64 makes of the same rounded inputs.
    """
    kind, rows, kept, results, expected = TYPES[data], [], [], [], []
    weight, bias = weight.to(kind).contiguous(), bias.to(kind)
    batch = levels[0][0].shape[0]
    last = layout is Layout.NHWC
    strides = (0, 0)
    for x, offset, mask, out in levels:
        x = x.to(kind)  # noqa: PLW2901
        offset = offset.to(TYPES[position]).contiguous()  # noqa: PLW2901
        mask = mask.to(TYPES[position]).contiguous()  # noqa: PLW2901
        flat = [flat_read(a.double(), *out) for a in (offset, mask)]
        shares = flat[1].sigmoid() if logits else flat[1]
        expected.append(deform_conv2d(x.double(), flat[0], shares, weight.double(), bias.double(), stride))
        stored = x.permute(0, 2, 3, 1).contiguous() if last else x.contiguous()
        size = (batch, *out, len(weight)) if last else (batch, len(weight), *out)
        y = torch.full(size, float("nan"), dtype=kind)
        strides = (offset[0].numel(), mask[0].numel())
        pointers = (stored.data_ptr(), offset.data_ptr(), mask.data_ptr(), y.data_ptr())
        rows.append(Level(*pointers, tuple(x.shape[2:]), out, *strides))
        kept.append((stored, offset, mask))
        results.append(y)
    shape = Shape(weight.shape[1], len(weight), batch, stride=stride, data_type=data, position_type=position)
    given = problem(shape, rows, 0, bias.data_ptr())
    given.x_layout = given.y_layout = layout
    given.mask_logits = logits
    pointer = ctypes.c_void_p(weight.data_ptr())
    assert library.glip_deform_emulate(ctypes.byref(given), pointer, tile, int(backwards), int(eager)) == 0
    return [(y.permute(0, 3, 1, 2) if last else y).double() for y in results], expected


def worst(results, expected):
    return max(float((y - e).abs().max() / e.abs().max()) for y, e in zip(results, expected, strict=True))


def golden(name):
    arrays, _ = load_golden("unit_dcn.npz")
    parts = ("x", "offset_mask", "weight", "bias", "out")
    x, positions, weight, bias, out = (torch.from_numpy(arrays[f"{name}_{part}"]) for part in parts)
    return (x, positions[:, :18], positions[:, 18:].sigmoid(), tuple(out.shape[2:])), weight, bias, out


def tolerance(capability, data):
    return TOLERANCE_60 if capability == 600 and data is DataType.F16 else TOLERANCE[data]


@pytest.mark.parametrize(("capability", "data", "tile"), KERNELS)
def test_every_kernel_on_goldens(libraries, capability, data, tile):
    for i, name in enumerate(FEW):
        level, weight, bias, out = golden(name)
        results, expected = emulate(
            libraries(capability),
            [level],
            weight,
            bias,
            data=data,
            tile=tile,
            stride=CASES[name]["stride"],
            layout=Layout(i % 2),
            backwards=i // 2 % 2 == 1,
            eager=i % 2 == 1,
        )
        assert worst(results, expected) <= tolerance(capability, data), name
        if data is DataType.F32:
            assert worst(results, [out.double()]) <= 2e-5, name


@pytest.mark.parametrize("name", CASES)
def test_tensor_cores_on_all_goldens(libraries, name):
    level, weight, bias, _ = golden(name)
    kernel = {"data": DataType.F16, "tile": MEDIUM, "stride": CASES[name]["stride"]}
    results, expected = emulate(libraries(800), [level], weight, bias, **kernel)
    assert worst(results, expected) <= TOLERANCE[DataType.F16]


def random_levels(sizes, channels, batch, stride, spread=2.0):
    rng = np.random.default_rng(7)
    levels = []
    for height, width in sizes:
        out = (-(-height // stride), -(-width // stride))
        x = rng.standard_normal((batch, channels, height, width))
        offset = spread * rng.standard_normal((batch, 18, *out))
        mask = rng.random((batch, 9, *out))
        levels.append((*(torch.from_numpy(a).float() for a in (x, offset, mask)), out))
    return levels


def random_weights(outputs, inputs):
    rng = np.random.default_rng(8)
    weight = rng.standard_normal((outputs, inputs, 3, 3)) / (9 * inputs) ** 0.5
    return torch.from_numpy(weight).float(), torch.from_numpy(rng.standard_normal(outputs)).float()


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(
    ("capability", "data", "tile", "channels"),
    [
        (800, DataType.F16, WIDE, (40, 264)),
        (800, DataType.BF16, MEDIUM, (72, 136)),
        (800, DataType.F16, SMALL, (64, 72)),
        (750, DataType.F16, MEDIUM, (40, 136)),
        (700, DataType.F16, SMALL, (40, 72)),
        (600, DataType.F16, WIDE, (40, 72)),
        (600, DataType.F32, WIDE, (40, 72)),
    ],
)
def test_levels_of_any_size_in_one_launch(libraries, capability, data, tile, channels, layout):
    """More channels than a tile, more levels than one, several images, tiles that span them, edges everywhere."""
    levels = random_levels([(9, 11), (5, 6), (1, 1), (3, 2)], channels[0], 2, 1)
    weights = random_weights(channels[1], channels[0])
    results, expected = emulate(libraries(capability), levels, *weights, data=data, tile=tile, layout=layout)
    assert worst(results, expected) <= tolerance(capability, data)


@pytest.mark.parametrize(
    ("channels", "layout"), [((3, 5), Layout.NCHW), ((20, 24), Layout.NCHW), ((24, 20), Layout.NHWC)]
)
def test_channels_that_are_no_multiple_of_a_vector(libraries, channels, layout):
    levels = random_levels([(7, 9)], channels[0], 2, 2)
    weights = random_weights(channels[1], channels[0])
    for capability, data in ((800, DataType.F16), (600, DataType.F32)):
        kernel = {"data": data, "tile": SMALL, "stride": 2, "layout": layout}
        results, expected = emulate(libraries(capability), levels, *weights, **kernel)
        assert worst(results, expected) <= TOLERANCE[data]


@pytest.mark.parametrize("data", [DataType.F16, DataType.BF16])
def test_positions_of_the_data_type(libraries, data):
    levels = random_levels([(6, 7)], 8, 1, 1)
    weights = random_weights(8, 8)
    results, expected = emulate(libraries(800), levels, *weights, data=data, tile=SMALL, position=data)
    assert worst(results, expected) <= TOLERANCE[data]


@pytest.mark.parametrize(("capability", "data"), [(800, DataType.F16), (600, DataType.F32)])
def test_masks_before_their_sigmoid(libraries, capability, data):
    levels = [(x, offset, 8 * mask - 4, out) for x, offset, mask, out in random_levels([(6, 7), (3, 4)], 8, 2, 1)]
    kernel = {"data": data, "tile": SMALL, "layout": Layout.NHWC, "logits": True}
    results, expected = emulate(libraries(capability), levels, *random_weights(8, 8), **kernel)
    assert worst(results, expected) <= TOLERANCE[data]


def test_threads_in_any_order_copies_early_or_late(libraries):
    levels = random_levels([(9, 8)], 72, 1, 1)
    weights = random_weights(64, 72)
    outcomes = [
        emulate(libraries(800), levels, *weights, data=DataType.F16, tile=MEDIUM, backwards=back, eager=eager)[0][0]
        for back in (False, True)
        for eager in (False, True)
    ]
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)
