"""Checkpoints under other names than the official ones, and families that are refused by name."""

from __future__ import annotations

import json
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from glip_export.bundle_writer import export_bundle
from glip_export.checkpoint_forms import to_official
from glip_export.checkpoints import derive_config, load_checkpoint
from glip_export.model.swin import PatchMerging, relative_position_index
from mmdetection_form import mmdetection_state, unfold_order
from parity_data import STAND_IN
from selection import slow
from tiny_glip import error_of, tiny_config, tiny_content, tiny_state, write_tiny
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def state():
    return tiny_state()


def same(found, expected):
    """Bit for bit: the same names in the same order, kinds and values."""
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    return True


def write_mmdetection(path, state, **entries):
    """A file as mmdetection fine-tunes and publishes it: "state_dict" and "meta"."""
    meta = {
        "epoch": 12,
        "iter": 100,
        "seed": 1,
        "cfg": "model = dict(type='GLIP')",
        "dataset_meta": {"classes": ("a",)},
    }
    content = {**tiny_content(), "meta": meta, "state_dict": state, **entries}
    del content["model"]
    torch.save(content, path)
    return path


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("options", [{}, {"fusion": False}, {"tunable_tokens": 16}], ids=str)
def test_there_and_back_gives_the_same_tensors(newer, options):
    official = tiny_state(**options)
    other = mmdetection_state(official, newer=newer)
    assert not set(other) & set(official)
    assert any("dyconvs" in key for key in other) is newer
    same(to_official(other), official)


@pytest.mark.parametrize("name", ["glip_A", "glip_T", "glip_L", "glip_T_prompt"])
def test_every_tensor_of_the_released_models_has_a_name_there(name):
    """Names of full size, with few values: what merging reorders has its own width, all else is a number."""
    rows = json.loads((STAND_IN / "manifests" / f"{name}.json").read_text())["tensors"]
    official = {}
    for i, row in enumerate(rows):
        merging = "downsample" in row["key"]
        official[row["key"]] = torch.arange(row["shape"][-1])[None] * 1.0 if merging else torch.tensor(float(i))
    other = mmdetection_state(official)
    roots = {key.split(".")[0] for key in other}
    assert roots == {"backbone", "neck", "language_model", "bbox_head"}
    same(to_official(other), official)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_kinds_of_numbers_are_kept(state, dtype):
    official = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    same(to_official(mmdetection_state(official)), official)


def test_the_official_form_is_left_as_it_is(state):
    assert same(to_official(state), state)
    assert all(to_official(state)[key] is value for key, value in state.items())


def test_patch_merging_there_computes_the_same():
    """mmdetection merges with `nn.Unfold`; its weights in our order must give what ours give."""
    torch.manual_seed(0)
    merging = PatchMerging(6)
    for parameter in merging.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, 8, 6)
    unfolded = F.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)
    normed = F.layer_norm(unfolded, (24,), unfold_order(merging.norm.weight), unfold_order(merging.norm.bias))
    theirs = F.linear(normed, unfold_order(merging.reduction.weight)).view(2, 2, 4, 12)
    ours = merging(x, 2, 2, 4)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(F.linear(unfolded, merging.reduction.weight).view(2, 2, 4, 12), ours, atol=0.1)


@pytest.mark.parametrize("window", [2, 7, 12])
def test_relative_positions_there_are_the_same(window):
    """mmdetection adds the positions and reverses the order of one; the table of biases needs no change."""
    position = (torch.arange(window)[:, None] * (2 * window - 1) + torch.arange(window)).flatten()
    assert torch.equal((position[None] + position[:, None]).flip(1), relative_position_index(window))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("newer", [False, True])
def test_a_fine_tuned_file_is_read(tmp_path, state, newer, legacy):
    path = write_mmdetection(tmp_path / "tuned.pth", mmdetection_state(state, newer=newer))
    if legacy:  # what tools/model_converters/publish_model.py writes
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    loaded = load_checkpoint(path)
    assert loaded.config == tiny_config()
    same(loaded.model.state_dict(), state)


def test_a_zero_shot_file_is_read(tmp_path, state):
    """A bare state dict; anchors may still be there, the unused classifier not."""
    other = mmdetection_state(state)
    other["bbox_head.anchor_generator.cell_anchors.0"] = torch.tensor([[-28.0, -28.0, 35.0, 35.0]])
    torch.save(other, tmp_path / "zero.pth")
    loaded = load_checkpoint(tmp_path / "zero.pth")
    same(loaded.model.state_dict(), state)
    assert "rpn.anchor_generator.cell_anchors.0" in loaded.ignored


def test_other_anchors_are_refused_there_too(tmp_path, state):
    other = mmdetection_state(state)
    other["bbox_head.anchor_generator.cell_anchors.0"] = torch.zeros(1, 4)
    assert "anchors of level 0" in error_of(write_mmdetection(tmp_path / "m.pth", other))


@pytest.mark.parametrize("prefix", ["module.", "language_model."])
def test_prefixes_that_may_be_there_or_not(tmp_path, state, prefix):
    other = mmdetection_state(state)
    if prefix == "module.":
        other = {f"module.{key}": value for key, value in other.items()}
    else:
        other = {key.removeprefix(prefix): value for key, value in other.items()}
    same(load_checkpoint(write_mmdetection(tmp_path / "m.pth", other)).model.state_dict(), state)


@pytest.mark.parametrize("form", ["official", "mmdetection"])
def test_a_linear_probed_file_of_a_training(tmp_path, state, form):
    """The same keys with other values in the head, beside the optimizer's state; "model" or "state_dict"."""
    probed = dict(state)
    for key in ("bbox_pred.weight", "centerness.bias", "dot_product_projection_text.weight", "bias_lang"):
        probed[f"rpn.head.{key}"] = state[f"rpn.head.{key}"] + 1
    optimizer = torch.optim.AdamW([torch.zeros(3)]).state_dict()
    if form == "official":
        path = write_tiny(tmp_path / "m.pth", probed, optimizer=optimizer, iteration=500, scheduler={"last_epoch": 3})
    else:
        path = write_mmdetection(tmp_path / "m.pth", mmdetection_state(probed), optimizer=optimizer)
    same(load_checkpoint(path).model.state_dict(), probed)


@pytest.mark.parametrize("key", ["rpn.tunable_linear.weight", "tunable_linear.weight", "module.tunable_linear.weight"])
def test_a_tuned_prompt_where_official_code_has_it_and_where_desco_has_it(tmp_path, key):
    official = tiny_state(tunable_tokens=16)
    official["rpn.tunable_linear.weight"] = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    moved = dict(official)
    moved[key] = moved.pop("rpn.tunable_linear.weight")
    model = load_checkpoint(write_tiny(tmp_path / "m.pth", moved)).model
    assert model.config.tunable_tokens == 16
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in official.items())


def test_two_names_of_one_tensor(tmp_path, state):
    other = mmdetection_state(state)
    key = next(key for key in other if ".attnconv." in key)
    other[key.replace("attnconv", "AttnConv")] = other[key] + 1
    assert "AttnConv" in (message := error_of(write_mmdetection(tmp_path / "m.pth", other)))
    assert "keep one of them" in message


@pytest.mark.parametrize("key", ["neck.fpn_convs.5.conv.weight", "backbone.stages.0.blocks.0.attn.w_msa.gate"])
def test_an_unknown_tensor_there_where_it_would_matter(tmp_path, state, key):
    other = {**mmdetection_state(state), key: torch.zeros(1)}
    assert "no place for" in error_of(write_mmdetection(tmp_path / "m.pth", other))


@pytest.mark.parametrize("shape", [(), (7,), (0,), (64, 128, 1), (128, 62)])
@pytest.mark.parametrize("leaf", ["reduction.weight", "norm.weight"])
def test_patch_merging_of_any_shape_is_one_error(tmp_path, state, shape, leaf):
    other = mmdetection_state(state)
    other[f"backbone.stages.1.downsample.{leaf}"] = torch.zeros(shape)
    message = error_of(write_mmdetection(tmp_path / "m.pth", other))
    assert f"backbone.body.layers.1.downsample.{leaf} is {shape}" in message


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about kinds of tensors
@pytest.mark.parametrize("kind", ["sparse", "expanded"])
def test_patch_merging_that_is_no_plain_array(tmp_path, state, kind):
    other = mmdetection_state(state)
    key = "backbone.stages.1.downsample.reduction.weight"
    other[key] = other[key].to_sparse() if kind == "sparse" else torch.zeros(1).expand(1 << 20, 1 << 20)
    assert kind in error_of(write_mmdetection(tmp_path / "m.pth", other))


def test_a_raw_training_file_says_how_to_strip_it(tmp_path, state, monkeypatch):
    """mmengine keeps its log as objects of its own, which must not be unpickled."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    buffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    module.HistoryBuffer = buffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    log = {"message_hub": {"log_scalars": {"train/lr": buffer()}}}
    path = write_mmdetection(tmp_path / "epoch_12.pth", mmdetection_state(state), **log)
    message = error_of(path)
    assert "HistoryBuffer" in message and "nothing was executed" in message and "publish_model.py" in message
    stripped = {key: value for key, value in torch.load(path, weights_only=False).items() if key != "message_hub"}
    torch.save(stripped, path)
    same(load_checkpoint(path).model.state_dict(), state)


def test_other_objects_keep_their_own_message(tmp_path):
    path = tmp_path / "m.pth"
    path.write_bytes(pickle.dumps({"model": tiny_config()}, protocol=2))
    assert "publish_model" not in error_of(path)


FAMILIES = {
    "FIBER": ["fusion_backbone.backbone.body.patch_embed.proj.weight", "rpn.head.bbox_pred.weight"],
    "DesCo-FIBER": ["module.fusion_backbone.language_backbone.body.model.embeddings.word_embeddings.weight"],
    "fuses text": ["backbone.body.layers.2.blocks.9.attn.qkv_text_i2t.weight", "rpn.head.log_scale"],
    "Grounding DINO": ["feat_map.weight", "bert.embeddings.word_embeddings.weight", "transformer.level_embed"],
    "transformer decoder": ["text_feat_map.weight", "backbone.patch_embed.projection.weight"],
    "is Grounding DINO": ["model.text_projection.weight", "model.text_backbone.encoder.layer.0.output.dense.bias"],
    "Swin backbone alone": ["backbone.patch_embed.projection.weight", "backbone.norm3.weight"],
    "no detection head": ["patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight", "norm.weight", "head.weight"],
}


@pytest.mark.parametrize("said", FAMILIES)
@pytest.mark.parametrize("entry", ["model", "state_dict", None])
def test_unsupported_families_are_refused_by_name(tmp_path, said, entry):
    content = {key: torch.zeros(2, 2) for key in FAMILIES[said]}
    torch.save(content if entry is None else {entry: content}, tmp_path / "other.pth")
    message = error_of(tmp_path / "other.pth")
    assert said in message and "supported are GLIP-T (A)" in message


def test_a_glip_is_no_family(state):
    assert derive_config(state, {"bert_heads": 4}) == tiny_config()


@pytest.mark.parametrize("content", [{"state_dict": [1]}, {"state_dict": 3, "meta": {}}])
def test_a_state_dict_that_is_none(tmp_path, content):
    torch.save(content, tmp_path / "m.pth")
    assert '"state_dict" is a' in error_of(tmp_path / "m.pth")


def files_of(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items()}


NANO = ROOT / "examples" / "nano" / "glip_nano.pth"


def in_mmdetections_form(source, path):
    """The same checkpoint with its tensors renamed, reordered and in "state_dict"."""
    content = torch.load(source, weights_only=True)
    content["state_dict"] = mmdetection_state(content.pop("model"))
    torch.save(content, path)
    return path


def test_glip_nano_in_both_forms_is_the_same_model(tmp_path):
    official, other = load_checkpoint(NANO), load_checkpoint(in_mmdetections_form(NANO, tmp_path / "nano.pth"))
    assert (other.config, other.vocabulary) == (official.config, official.vocabulary)
    same(other.model.state_dict(), official.model.state_dict())


@pytest.mark.parametrize("which", [pytest.param(which, marks=slow) for which in ("tiny", "nano")])
def test_both_forms_export_to_the_same_bundle(tmp_path, request, which):
    """Graphs, weights and tokenizer, byte for byte."""
    source = NANO if which == "nano" else request.getfixturevalue("tiny_checkpoint")
    export_bundle(in_mmdetections_form(source, tmp_path / "other.pth"), tmp_path / "bundle")
    assert files_of(tmp_path / "bundle") == files_of(request.getfixturevalue(f"{which}_bundle"))
