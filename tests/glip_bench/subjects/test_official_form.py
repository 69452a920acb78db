"""The official form: the counts of the official code at full size, and the numbers of our form."""

import numpy as np
import pytest
import torch
from glip_bench.subjects.official_form import PADDED, official_form, official_macs
from glip_export.model.config import GlipConfig, HeadConfig, SwinConfig
from glip_export.model.glip import Glip
from selection import slow
from tiny_glip import tiny_model

# Counted from the official code: GMAC at 800x1344 with 256 tokens.
KNOWN_T = {"Swin": 99.1, "FPN": 14.7, "BERT": 23.0, "fusion": 430.0, "text layers": 11.5, "DyConv": 127.3}
KNOWN_TOTAL = {"GLIP-T": 707, "GLIP-L": 1612}


@pytest.mark.parametrize("variant", ["GLIP-T", pytest.param("GLIP-L", marks=slow)])
def test_the_official_form_has_the_known_counts(variant):
    config = GlipConfig()
    if variant == "GLIP-L":
        swin = SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48), 12, (768, 1536, 3072, 6144))
        config = GlipConfig(swin=swin, head=HeadConfig(blocks=8))
    assert config.variant == variant
    counts = official_macs(config)
    assert sum(counts.values()) / 1e9 == pytest.approx(KNOWN_TOTAL[variant], rel=0.02)
    if variant == "GLIP-T":
        for block, gmac in KNOWN_T.items():
            assert counts[block] / 1e9 == pytest.approx(gmac, rel=0.02), block


def test_the_official_form_finds_the_same():
    model = tiny_model()
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 96, 128, 3), dtype=np.uint8))
    sizes, ids = torch.tensor([[96, 120]]), torch.tensor([[2, 40, 41, 9, 3]])
    class_map = torch.tensor([[[0, 0.5, 0.5, 0, 0], [0, 0, 0, 1.0, 0]]])
    mask, official = torch.ones_like(ids), official_form(model)
    padded = [torch.nn.functional.pad(tensor, (0, PADDED - 5)) for tensor in (ids, mask, class_map)]
    with torch.inference_mode():
        text = official.encode_text(*padded[:2])
        theirs = official(frames, sizes, text, *padded[1:])
        ours = model(frames, sizes, model.encode_text(ids, mask), mask, class_map)
    assert (ours.scores > 0).sum() > 10
    torch.testing.assert_close(theirs.scores, ours.scores, atol=1e-4, rtol=0)
    # It shares weights, and leaves the model it was made from as it was.
    assert {p.data_ptr() for p in official.parameters()} == {p.data_ptr() for p in model.parameters()}
    own, other = (form.rpn.head.dyhead_tower[0].b_attn.attn for form in (model, official))
    assert type(own) is not type(other) and isinstance(official, Glip) and PADDED == 256
