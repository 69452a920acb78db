"""The counts behind the floor: exact on a tiny graph, and those of the official code at full size."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from glip_bench.cli import main
from glip_bench.limits.floor import (
    HARDWARE,
    Hardware,
    Shape,
    by_stage,
    count_image_branch,
    floor_of,
    hardware,
    measure_cpu,
)
from glip_bench.subjects.official_form import PADDED, OfficialForm, official_macs
from glip_bench.subjects.profile import Stage
from glip_export.model.config import GlipConfig, HeadConfig, SwinConfig
from glip_export.model.glip import Glip
from tiny_glip import tiny_config, tiny_model

from glip_deploy import Bundle, GlipError

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
    assert all(stages[stage] > 0 for stage in Stage if stage is not Stage.REST)
    channels, levels = 32, [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
    locations = [h * w for h, w in levels]
    # Own level; from below (stride 2): outputs of every level but the first; from above: of every level but the last.
    taps = 9 * channels * channels * (sum(locations) + sum(locations[1:]) * 2)
    assert stages[Stage.DEFORM] == 2 * taps


def test_fusion_grows_with_tokens_and_swin_does_not(tiny_bundle, work):
    more = by_stage(count_image_branch(Bundle.open(tiny_bundle), replace(SHAPE, tokens=12)))
    less = by_stage(work)
    assert more[Stage.SWIN] == less[Stage.SWIN]
    assert less[Stage.FUSION] < more[Stage.FUSION] <= 2.2 * less[Stage.FUSION]


def test_a_batch_is_so_many_times_the_work(tiny_bundle, work):
    pair = by_stage(count_image_branch(Bundle.open(tiny_bundle), replace(SHAPE, batch=2)))
    for stage, macs in by_stage(work).items():
        assert pair[stage] == pytest.approx(2 * macs, rel=0.02), stage


# Counted from the official code: GMAC at 800x1344 with 256 tokens.
KNOWN_T = {Stage.SWIN: 99.1, Stage.FPN: 14.7, "BERT": 23.0, Stage.FUSION: 430.0, Stage.TEXT_LAYERS: 11.5}
KNOWN_TOTAL = {"GLIP-T": 707, "GLIP-L": 1612}


@pytest.mark.parametrize("variant", KNOWN_TOTAL)
def test_the_official_form_has_the_known_counts(variant):
    config = GlipConfig()
    if variant == "GLIP-L":
        swin = SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48), 12, (768, 1536, 3072, 6144))
        config = GlipConfig(swin=swin, head=HeadConfig(blocks=8))
    assert config.variant == variant
    counts = official_macs(config)
    assert sum(counts.values()) / 1e9 == pytest.approx(KNOWN_TOTAL[variant], rel=0.02)
    if variant == "GLIP-T":
        for stage, gmac in KNOWN_T.items():
            assert counts[stage] / 1e9 == pytest.approx(gmac, rel=0.02), stage
        assert counts[Stage.DYCONV] / 1e9 == pytest.approx(127.3, rel=0.02)


def test_the_official_form_finds_the_same():
    model = tiny_model()
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 96, 128, 3), dtype=np.uint8))
    sizes, ids = torch.tensor([[96, 120]]), torch.tensor([2, 40, 41, 9, 3])
    class_map = torch.tensor([[0, 0.5, 0.5, 0, 0], [0, 0, 0, 1.0, 0]])
    official = OfficialForm(model)
    with torch.inference_mode():
        theirs = official.detect(frames, sizes, ids, class_map)
        text = model.encode_text(ids[None], torch.ones(1, 5, dtype=torch.int64))
        ours = model(frames, sizes, text, torch.ones(1, 5, dtype=torch.int64), class_map[None])
    assert (ours.scores > 0).sum() > 10
    torch.testing.assert_close(theirs.scores, ours.scores, atol=1e-4, rtol=0)
    # It shares weights, and leaves the model it was made from as it was.
    assert {p.data_ptr() for p in official.model.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert type(model.rpn.head.dyhead_tower[0].b_attn.attn) is not type(
        official.model.rpn.head.dyhead_tower[0].b_attn.attn
    )
    assert PADDED == 256 and isinstance(official.model, Glip)


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


@pytest.mark.parametrize("name", ["rtx 4090", "RTX-4090", "RTX4090"])
def test_a_gpu_is_known_in_any_spelling(name):
    assert hardware(name).name == "RTX 4090"


def test_an_unknown_gpu_lists_the_known(tiny_bundle, capsys):
    assert main(["--model", str(tiny_bundle), "--floor", "B9000"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert '"B9000" is not known' in line and all(name in line for name in HARDWARE)


def test_sizes_are_checked(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(GlipError, match="both sides are multiples of 32"):
        count_image_branch(bundle, replace(SHAPE, width=100))
    with pytest.raises(GlipError, match="1 or more"):
        count_image_branch(bundle, replace(SHAPE, tokens=0))


def test_the_command_says_all_of_it(tiny_bundle, tmp_path, capsys):
    file = tmp_path / "floor.json"
    arguments = ["--frame", "120x90", "--shortest-side", "96", "--prompt", "person. dog"]
    assert main(["--model", str(tiny_bundle), *arguments, "--floor", "h200", "--json", str(file)]) == 0
    shown, result = capsys.readouterr().out, json.loads(file.read_text())
    assert result["shape"] == {"height": 96, "width": 128, "tokens": 5, "classes": 2, "batch": 1}
    assert "H200, fp16: 989 TFLOP/s, 4.8e+03 GB/s" in shown and "fusion" in shown
    assert result["floor_ms"]["by_product"] >= result["floor_ms"]["arithmetic"] > 0
    assert list(tiny_bundle.glob(".*")) == []


def test_the_cpu_is_measured():
    cpu = measure_cpu(0.05)
    assert cpu.half_flops == cpu.single_flops > 1e9 and cpu.bytes_per_second > 1e8
    assert math.isfinite(cpu.single_flops)
