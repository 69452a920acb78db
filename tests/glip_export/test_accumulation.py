"""The simulation of sums in fp16 that docs/internals/precision.md quotes."""

from __future__ import annotations

import accumulation
import numpy as np
import torch
from glip_export.model.deform import deform_conv2d
from glip_export.model.glip import Glip, ImageBranch
from tiny_glip import HIDDEN, tiny_config


def test_ways_of_summing():
    ones = np.ones((2, 4096), np.float16)
    errors = accumulation.rounded_sums(ones, ones)
    assert errors["fp32"] == errors["fp16 in steps"] == 0  # 4096 is a multiple of 16
    assert errors["fp16 one by one"] == 0.5  # fp16 ends counting at 2048
    large = accumulation.rounded_sums(40 * ones, 40 * ones)
    assert large["fp16 in steps"] == np.inf


def test_every_product_of_a_model_is_seen():
    torch.manual_seed(0)
    watcher = accumulation.Watch()
    model = Glip(tiny_config(), deform=watcher.deform(deform_conv2d)).eval()
    frames = torch.randint(0, 256, (1, 96, 128, 3), dtype=torch.uint8)
    sizes, mask = torch.tensor([[96, 128]]), torch.ones(1, 8, dtype=torch.int64)
    inputs = (frames, sizes, torch.randn(1, 8, HIDDEN), mask, torch.eye(8)[None])
    rows = accumulation.watch(model, watcher, lambda: ImageBranch(model)(*inputs))
    channels = model.config.head.channels
    assert rows["deformable convolution", 9 * channels].count == 13 * model.config.head.blocks
    locations = sum(-(-96 // s) * -(-128 // s) for s in (8, 16, 32, 64, 128))
    assert rows["fusion", locations].count == model.config.head.blocks
    assert all(0 <= row.worst("fp32") < 2**-10 for row in rows.values())
    assert rows["fusion", locations].worst("fp16 one by one") > 2 * rows["fusion", locations].worst("fp32")
    assert "| fusion |" in accumulation.as_markdown(accumulation.grouped(rows))
