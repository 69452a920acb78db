"""The calls of the deformable convolution, and the least time for them."""

from collections import Counter

import pytest
import torch
from glip_bench.limits.hardware import HARDWARE
from glip_export.model.config import GlipConfig
from glip_export.model.dyhead import DyConv
from glip_export.model.fpn import level_sizes
from glip_export.model.glip import Glip
from kernels.floors import LAYERS, calls, floor_of, total_floor


@pytest.mark.parametrize("size", [(800, 1344), (480, 640), (96, 160)])
def test_the_shapes_are_those_the_model_calls(size):
    seen = Counter()

    def note(x, offset, mask, weight, bias, stride=1):
        seen[tuple(x.shape[2:]), tuple(offset.shape[2:]), stride] += 1
        return x.new_empty(x.shape[0], weight.shape[0], *offset.shape[2:])

    with torch.device("meta"):
        model = Glip(GlipConfig(), deform=note)
        features = model.backbone(torch.empty(1, *size, 3))
        convolve = next(module for module in model.modules() if isinstance(module, DyConv))
        convolve(features, level_sizes(features))
    expected = Counter()
    for call in calls(*size):
        expected[call.size, call.out, call.stride] += call.times
    assert seen == expected and sum(expected.values()) == 13
    assert LAYERS["GLIP-T"] == sum(isinstance(module, DyConv) for module in model.modules())


def test_the_work_is_the_known_count():
    """127.3 GMAC of DyConv, the convolutions that make offsets and masks included."""
    pixels = sum(call.out[0] * call.out[1] for call in calls() if call.stride == 1)
    offsets = pixels * 27 * 256 * 9
    layer = sum(call.macs * call.times for call in calls())
    assert 6 * (layer + offsets) / 1e9 == pytest.approx(127.3, rel=2e-3)


def test_a_floor_is_the_longer_of_its_two_times():
    first = calls()[0]
    assert (first.out, first.stride, first.times) == ((100, 168), 1, 1)
    floor = floor_of(first, HARDWARE["H200"])
    assert floor.arithmetic == pytest.approx(2 * 16800 * 256 * 256 * 9 / 989e12)
    values, positions = (16800 * 512 + 256 * (2304 + 1)) * 2, 16800 * 27 * 4
    assert floor.bytes == pytest.approx((values + positions) / 4.8e12)
    assert floor.seconds == max(floor.arithmetic, floor.bytes)
    assert total_floor(calls(), HARDWARE["P100"]) > total_floor(calls(), HARDWARE["V100"])
