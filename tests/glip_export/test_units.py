"""Every block of the model against the official code's outputs for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glip_export.model.bert import BertLayer, attention_bias
from glip_export.model.config import GlipConfig, HeadConfig, SwinConfig
from glip_export.model.deform import deform_conv2d, flat_read
from glip_export.model.dyhead import DyConv, DyReLU
from glip_export.model.fpn import level_sizes
from glip_export.model.fusion import VlFuse
from glip_export.model.head import decode
from glip_export.model.swin import Swin
from parity_data import load_golden, stand_in_weights
from selection import slow

DCN_CASES = [case["name"] for case in load_golden("unit_dcn.npz")[1]]
HEAD = GlipConfig().head


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def tensors(arrays, *names):
    return [torch.from_numpy(arrays[name]) for name in names]


def relative_error(ours, golden):
    return np.abs(ours.numpy() - golden).max() / np.abs(golden).max()


def absolute_error(ours, golden):
    assert ours.shape == golden.shape
    return np.abs(ours.numpy() - golden).max()


def fill(module, manifest, prefix):
    module.load_state_dict(stand_in_weights(manifest, prefix), strict=True)
    return module.eval()


@pytest.mark.parametrize("name", DCN_CASES)
def test_deformable_convolution(name):
    arrays, meta = load_golden("unit_dcn.npz")
    case = next(item for item in meta if item["name"] == name)
    names = [f"{name}_{part}" for part in ("x", "offset_mask", "weight", "bias")]
    x, offset_mask, weight, bias = tensors(arrays, *names)
    height, width = case["out_hw"]
    offset = flat_read(offset_mask[:, :18], height, width)
    mask = flat_read(offset_mask[:, 18:].sigmoid(), height, width)
    if case["offset_hw"] == case["out_hw"]:
        assert torch.equal(offset, offset_mask[:, :18])
    golden = arrays[f"{name}_out"]
    assert relative_error(deform_conv2d(x, offset, mask, weight, bias, case["stride"]), golden) <= 2e-5


@pytest.mark.parametrize("stride", [1, 2])
def test_deform_conv_without_numbers_has_the_shape_and_the_products_of_the_real_one(stride):
    from torch.utils.flop_counter import FlopCounterMode

    height, width = 7, 10
    shapes = [
        (2, 3, height, width),
        *((2, n, -(-height // stride), -(-width // stride)) for n in (18, 9)),
        (5, 3, 3, 3),
    ]
    counted = []
    for device in ("cpu", "meta"):
        *tensors, bias = (torch.zeros(shape, device=device) for shape in (*shapes, (5,)))
        with FlopCounterMode(display=False) as counter:
            result = deform_conv2d(*tensors, bias, stride)
        counted.append((result.shape, result.dtype, counter.get_total_flops()))
    assert counted[0] == counted[1]
    assert counted[0][2] > 0


def test_flat_read_is_neither_a_crop_nor_a_resize():
    values = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    read = flat_read(values, 2, 3)
    assert read.shape == (2, 3, 2, 3)
    assert read[1].flatten().tolist() == values[1].flatten()[:18].tolist()
    assert not torch.equal(read, values[:, :, :2, :3])


def test_dyrelu():
    arrays, meta = load_golden("unit_dyrelu.npz")
    module = fill(DyReLU(256, 64), meta["weights"], meta["prefix"])
    assert relative_error(module(torch.from_numpy(arrays["x"])), arrays["out"]) <= 2e-5


def test_dyconv():
    arrays, meta = load_golden("unit_dyconv.npz")
    module = fill(DyConv(HEAD, 64), meta["weights"], meta["prefix"])
    maps = tensors(arrays, *(f"in{i}" for i in range(5)))
    outputs = module(maps, level_sizes(maps))
    for i, output in enumerate(outputs):
        assert absolute_error(output, arrays[f"out{i}"]) <= 1e-4


def test_fusion():
    arrays, meta = load_golden("unit_fuse.npz")
    module = fill(VlFuse(HEAD, 768).b_attn, meta["weights"], meta["prefix"])
    fuse = VlFuse(HEAD, 768)
    fuse.b_attn = module
    hidden, mask = tensors(arrays, "hidden", "mask")
    maps = tensors(arrays, *(f"in{i}" for i in range(5)))
    maps, text = fuse(maps, level_sizes(maps), hidden, mask)
    for i, output in enumerate(maps):
        assert absolute_error(output, arrays[f"out{i}"]) <= 1e-4
    kept = arrays["mask"][0].astype(bool)
    assert absolute_error(text[:, kept], arrays["hidden_out"][:, kept]) <= 1e-4


def direct_fusion(attn, v, l, mask):  # noqa: E741
    """The published form: every visual token projected to 2048 channels, text padded and masked."""
    heads, dim = attn.heads, attn.head_dim

    def split(x):
        return x.view(x.shape[0], -1, heads, dim).transpose(1, 2)

    query, key = split(attn.v_proj(v)) * dim**-0.5, split(attn.l_proj(l))
    value_v, value_l = split(attn.values_v_proj(v)), split(attn.values_l_proj(l))
    scores = query @ key.transpose(-1, -2)
    masked = scores.masked_fill(mask[:, None, None, :] == 0, -9e15)
    dv = (masked.softmax(-1) @ value_l).transpose(1, 2).flatten(2)
    dl = (scores.transpose(-1, -2).softmax(-1) @ value_v).transpose(1, 2).flatten(2)
    return attn.out_v_proj(dv), attn.out_l_proj(dl)


@pytest.mark.parametrize("tokens", [2, 7, 24])
def test_absorbed_trimmed_fusion_is_the_direct_padded_one(tokens):
    torch.manual_seed(tokens)
    attn = VlFuse(HeadConfig(channels=32, fusion_dim=128, fusion_heads=4), 48).b_attn.attn
    v, text = torch.randn(2, 77, 32), torch.randn(2, tokens, 48)
    padded = torch.cat([text, torch.randn(2, 32 - tokens, 48)], dim=1)
    mask = (torch.arange(32) < tokens).long().expand(2, -1)
    dv, dl = attn(v, text, mask[:, :tokens])
    direct_v, direct_l = direct_fusion(attn, v, padded, mask)
    torch.testing.assert_close(dv, direct_v, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dl, direct_l[:, :tokens], atol=1e-5, rtol=1e-5)


def test_bert_layer_of_the_head():
    arrays, meta = load_golden("unit_bertlayer.npz")
    module = fill(BertLayer(768, meta["heads"], 3072, clamped=True), meta["weights"], meta["prefix"])
    hidden, mask = tensors(arrays, "hidden", "mask")
    kept = arrays["mask"][0].astype(bool)
    output = module(hidden, attention_bias(mask, hidden.dtype))
    assert absolute_error(output[:, kept], arrays["out"][:, kept]) <= 1e-4


@pytest.mark.parametrize(
    ("golden", "config"),
    [
        ("unit_swin_T.npz", SwinConfig()),
        pytest.param(
            "unit_swin_L.npz",
            SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48), 12, (768, 1536, 3072, 6144)),
            marks=slow,  # test_goldens.py has all of GLIP-L
        ),
    ],
)
def test_swin(golden, config):
    arrays, meta = load_golden(golden)
    module = fill(Swin(config), meta["weights"], meta["prefix"])
    outputs = module(torch.from_numpy(arrays["x"]).permute(0, 2, 3, 1))
    for output, stage in zip(outputs, ("stage3", "stage4", "stage5"), strict=True):
        assert absolute_error(output, arrays[stage]) <= 1e-4


def test_decode():
    arrays, _ = load_golden("unit_decode.npz")
    anchors = arrays["anchors"].astype(np.float64)
    stride = 16
    np.testing.assert_array_equal(anchors[:, 2:] - anchors[:, :2] + 1, 8 * stride)  # all are of P4
    x = torch.from_numpy((anchors[:, 0] + 3.5 * stride) / stride).float()
    y = torch.from_numpy((anchors[:, 1] + 3.5 * stride) / stride).float()
    boxes = decode(torch.from_numpy(arrays["deltas"]), x, y, stride)
    assert len(boxes) == 200
    assert relative_error(boxes, arrays["boxes"]) <= 2e-5


def test_anchors_are_where_decode_puts_them():
    arrays, _ = load_golden("unit_anchors.npz")
    checked = 0
    for name, golden in arrays.items():
        size, level = name.split("_level")
        stride = 8 * 2 ** int(level)
        columns = -(-int(size.split("x")[1]) // stride)
        index = torch.arange(len(golden))
        boxes = decode(torch.zeros(len(golden), 4), (index % columns).float(), (index // columns).float(), stride)
        assert relative_error(boxes, golden) <= 2e-5, name
        checked += 1
    assert checked == len(arrays) > 10
