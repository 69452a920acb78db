"""The counts behind the floor are exact on a tiny graph."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from glip_bench.cli import main
from glip_bench.limits.floor import Shape, by_stage, count_image_branch, floor_of
from glip_bench.limits.hardware import HARDWARE, Hardware
from tiny_glip import tiny_config, tiny_model

from glip_deploy import Bundle
from glip_deploy.bundle.contract import Stage
from glip_deploy.errors import BundleError, OptionError

SHAPE = Shape(height=96, width=128, tokens=6, classes=2)


@pytest.fixture(scope="module")
def work(tiny_bundle):
    return count_image_branch(Bundle.open(tiny_bundle), SHAPE)


def test_every_product_is_counted(work):
    """Against torch's own counter on the same model; the patch embedding's and all other products are in both."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model()
    frames = torch.zeros(1, SHAPE.height, SHAPE.width, 3, dtype=torch.uint8)
    text = torch.randn(1, SHAPE.tokens, tiny_config().bert.hidden)
    ones = torch.ones(1, SHAPE.tokens, dtype=torch.int64)
    classes = torch.full((1, SHAPE.classes, SHAPE.tokens), 1 / SHAPE.tokens)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(frames, torch.tensor([[SHAPE.height, SHAPE.width]]), text, ones, classes)
    ours = sum(one.macs for one in work)
    assert ours == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def test_the_stages_add_up(work):
    stages = by_stage(work)
    assert sum(stages.values()) == sum(one.macs for one in work)
    assert set(stages) == {
        Stage.BACKBONE,
        Stage.FPN,
        Stage.FUSION,
        Stage.TEXT_LAYERS,
        Stage.OFFSETS,
        Stage.DEFORMABLE,
        Stage.DYHEAD,
        Stage.PREDICTION,
        Stage.SELECTION,
    }
    channels, levels = 32, [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
    locations = [h * w for h, w in levels]
    # Own level; from below (stride 2): outputs of every level but the first; from above: of every level but the last.
    taps = 9 * channels * channels * (sum(locations) + sum(locations[1:]) * 2)
    assert stages[Stage.DEFORMABLE] == 2 * taps


def test_fusion_grows_with_tokens_and_the_backbone_does_not(tiny_bundle, work):
    more = by_stage(count_image_branch(Bundle.open(tiny_bundle), replace(SHAPE, tokens=12)))
    less = by_stage(work)
    assert more[Stage.BACKBONE] == less[Stage.BACKBONE]
    assert less[Stage.FUSION] < more[Stage.FUSION] <= 2.2 * less[Stage.FUSION]


def test_a_batch_is_so_many_times_the_work(tiny_bundle, work):
    pair = by_stage(count_image_branch(Bundle.open(tiny_bundle), replace(SHAPE, batch=2)))
    for stage, macs in by_stage(work).items():
        assert pair[stage] == pytest.approx(2 * macs, rel=0.02), stage


def test_a_floor_is_arithmetic_or_memory(work):
    slow_sums = floor_of(work, SHAPE, Hardware("x", 1e6, 1e6, 1e18))
    assert slow_sums.seconds == slow_sums.arithmetic == pytest.approx(2 * sum(one.macs for one in work) / 1e6)
    slow_memory = floor_of(work, SHAPE, Hardware("x", 1e18, 1e18, 1e3))
    weights = sum(one.weights for one in work)
    assert slow_memory.seconds == slow_memory.memory == pytest.approx((2 * weights + 96 * 128 * 3) / 1e3)
    for floor in (slow_sums, slow_memory):
        assert floor.by_product >= 0.99 * floor.arithmetic
    single = floor_of(work, SHAPE, HARDWARE["A100"], "fp32")
    assert single.arithmetic == pytest.approx(floor_of(work, SHAPE, HARDWARE["A100"]).arithmetic * 312 / 19.5)


def test_an_unknown_gpu_lists_the_known(tiny_bundle, capsys):
    assert main(["floor", "B9000", "--model", str(tiny_bundle)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert '"B9000" is not known' in line and all(name in line for name in HARDWARE)


def test_sizes_are_checked(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(OptionError, match="both sides are multiples of 32"):
        count_image_branch(bundle, replace(SHAPE, width=100))
    with pytest.raises(OptionError, match="1 or more"):
        count_image_branch(bundle, replace(SHAPE, tokens=0))


def test_the_command_says_all_of_it(tiny_bundle, tmp_path, capsys):
    file = tmp_path / "floor.json"
    arguments = ["--frame", "120x90", "--shortest-side", "96", "--prompt", "person. dog"]
    assert main(["floor", "h200", "--model", str(tiny_bundle), *arguments, "--json", str(file)]) == 0
    shown, result = capsys.readouterr().out, json.loads(file.read_text())
    assert result["shape"] == {"height": 96, "width": 128, "tokens": 5, "classes": 2, "batch": 1}
    assert "H200, fp16: 989 TFLOP/s, 4.8e+03 GB/s" in shown and "fusion" in shown
    assert result["floor_ms"]["by_product"] >= result["floor_ms"]["arithmetic"] > 0
    assert list(tiny_bundle.glob(".*")) == []


def test_a_product_of_no_stage_is_refused(tiny_bundle, monkeypatch):
    monkeypatch.setattr("glip_export.stages.stages_of", lambda path: {})
    with pytest.raises(BundleError, match="belongs to no stage of the network"):
        count_image_branch(Bundle.open(tiny_bundle), SHAPE)
