"""Checkpoints as users have them, and as they should not be."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from glip_export.checkpoints import build, derive_config, load_checkpoint, read_checkpoint
from parity_data import STAND_IN
from tiny_glip import VOCABULARY, tiny_config, tiny_content, tiny_model, tiny_state, write_tiny

from glip_deploy.errors import GlipError

LOGITS = "rpn.head.log_scale"


@pytest.fixture(scope="module")
def state():
    return tiny_state()


def error_of(path):
    with pytest.raises(GlipError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_a_written_model_comes_back(tiny_checkpoint):
    loaded = load_checkpoint(tiny_checkpoint)
    assert loaded.config == tiny_config()
    assert loaded.vocabulary == VOCABULARY
    expected = tiny_state()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert not loaded.model.training


@pytest.mark.parametrize("wrap", ["plain", "module prefix", "bare state dict"])
def test_forms_of_a_state_dict(tmp_path, state, wrap):
    if wrap == "module prefix":
        state = {f"module.{key}": value for key, value in state.items()}
    path = tmp_path / "m.pth"
    if wrap == "bare state dict":
        torch.save({**state}, path)
        file = read_checkpoint(path)
        assert file.vocabulary is None and file.facts == {}
        assert file.state.keys() == tiny_state().keys()
    else:
        assert load_checkpoint(write_tiny(path, state)).config == tiny_config()


def test_half_precision_weights_are_read_as_single(tmp_path, state):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    model = load_checkpoint(write_tiny(tmp_path / "half.pth", half)).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    key = "backbone.body.patch_embed.proj.weight"
    assert torch.equal(model.state_dict()[key], half[key].float())


def test_training_heads_and_buffers_are_ignored_and_listed(tmp_path, state):
    extra = {
        "rpn.head.cls_logits.weight": torch.zeros(2),
        "language_backbone.body.model.pooler.dense.weight": torch.zeros(2),
        "rpn.anchor_generator.cell_anchors.0": torch.tensor([[-28.0, -28.0, 35.0, 35.0]]),
        "roi_heads.mask.weight": torch.full((1,), float("nan")),
    }
    loaded = load_checkpoint(write_tiny(tmp_path / "m.pth", {**state, **extra}))
    assert set(extra) <= set(loaded.ignored)
    rebuilt = ("relative_position_index", "position_ids")
    assert all(key.endswith(rebuilt) or key in extra for key in loaded.ignored)


@pytest.mark.parametrize(
    ("manifest", "variant", "sizes"),
    [
        ("glip_A", "GLIP-T (A)", (96, 7, 6, False)),
        ("glip_B", "GLIP-T", (96, 7, 6, True)),
        ("glip_T", "GLIP-T", (96, 7, 6, True)),
        ("glip_L", "GLIP-L", (192, 12, 8, True)),
        ("glip_T_prompt", "GLIP-T, prompt-tuned", (96, 7, 6, True)),
    ],
)
def test_variants_are_recognised_from_names_and_shapes(manifest, variant, sizes):
    rows = json.loads((STAND_IN / "manifests" / f"{manifest}.json").read_text())["tensors"]
    state = {row["key"]: torch.empty(row["shape"], device="meta") for row in rows}
    config = derive_config(state)
    assert config.variant == variant
    assert (config.swin.embed_dim, config.swin.window, config.head.blocks, config.head.fusion) == sizes
    assert (config.bert.hidden, config.bert.layers, config.bert.heads) == (768, 12, 12)
    assert (config.tunable_tokens > 0) == ("prompt" in manifest)


def test_a_tuned_prompt_is_added_to_the_text(tmp_path):
    state = tiny_state(tunable_tokens=16)
    rows = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    state["rpn.tunable_linear.weight"] = rows
    tuned = load_checkpoint(write_tiny(tmp_path / "tuned.pth", state)).model
    assert tuned.config.tunable_tokens == 16
    plain = {key: value for key, value in state.items() if "tunable" not in key}
    model, _ = build(plain, derive_config(plain, {"bert_heads": 4}))
    ids = torch.tensor([[2, 40, 41, 3]])
    with torch.inference_mode():
        moved = tuned.encode_text(ids, torch.ones_like(ids)) - model.encode_text(ids, torch.ones_like(ids))
    torch.testing.assert_close(moved[0], rows[:4], atol=1e-6, rtol=0)


def test_missing_folder_and_empty(tmp_path):
    assert "does not exist" in error_of(tmp_path / "none.pth")
    assert "is a folder" in error_of(tmp_path)
    (tmp_path / "empty.pth").touch()
    assert "empty (0 bytes)" in error_of(tmp_path / "empty.pth")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_file(tmp_path, tiny_checkpoint, share):
    whole = tiny_checkpoint.read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "corrupt" in error_of(path)


@pytest.mark.parametrize("content", [b"\x00" * 4096, b"<!DOCTYPE html><html>404</html>", bytes(range(256)) * 9])
def test_not_a_checkpoint_at_all(tmp_path, content):
    path = tmp_path / "noise.pth"
    path.write_bytes(content)
    assert "corrupt" in error_of(path)


class _Program:
    """What a malicious pickle does: run something while it is read."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path, writer):
    path, trace = tmp_path / "evil.pth", tmp_path / "executed"
    content = {"model": _Program(trace)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    message = error_of(path)
    assert "nothing was executed" in message and "mkdir" in message
    assert not trace.exists()


def test_objects_in_a_pickle_are_refused(tmp_path):
    path = tmp_path / "object.pth"
    torch.save({"model": tiny_config()}, path)
    message = error_of(path)
    assert "nothing was executed" in message and "GlipConfig" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2, 3], "holds a list"),
        ({"model": [1]}, '"model" is a list'),
        ({"model": {}}, "not a GLIP"),
        ({"model": {"layer1.0.conv1.weight": torch.zeros(1)}}, "it starts with layer1.0.conv1.weight"),
        ({"glip_config": [12]}, '"glip_config" is a list'),
    ],
)
def test_other_contents(tmp_path, content, said):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    assert said in error_of(path)


def test_a_missing_tensor(tmp_path, state):
    key = "rpn.head.dyhead_tower.2.AttnConv.1.weight"
    message = error_of(write_tiny(tmp_path / "m.pth", {k: v for k, v in state.items() if k != key}))
    assert "1 tensors are missing" in message and key in message


def test_a_missing_tensor_that_sizes_are_read_from(tmp_path, state):
    key = "language_backbone.body.model.embeddings.position_embeddings.weight"
    message = error_of(write_tiny(tmp_path / "m.pth", {k: v for k, v in state.items() if k != key}))
    assert "incomplete" in message and key in message


def test_a_tensor_of_another_shape(tmp_path, state):
    key = "rpn.head.centerness.weight"
    message = error_of(write_tiny(tmp_path / "m.pth", {**state, key: torch.zeros(1, 7, 1, 1)}))
    assert f"{key} is (1, 7, 1, 1)" in message and "(1, 32, 1, 1)" in message


def test_an_unknown_tensor_where_it_would_matter(tmp_path, state):
    message = error_of(write_tiny(tmp_path / "m.pth", {**state, "backbone.body.absolute_pos_embed": torch.zeros(1)}))
    assert "no place for" in message and "absolute_pos_embed" in message


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_numbers(tmp_path, state, poison):
    value = state[LOGITS].clone().fill_(poison)
    message = error_of(write_tiny(tmp_path / "m.pth", {**state, LOGITS: value}))
    assert LOGITS in message and "NaN or infinite" in message


def test_other_anchors_are_refused(tmp_path, state):
    anchors = {"rpn.anchor_generator.cell_anchors.1": torch.tensor([[-10.0, -10.0, 20.0, 20.0]])}
    assert "anchors of level 1" in error_of(write_tiny(tmp_path / "m.pth", {**state, **anchors}))


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        (list(VOCABULARY[:-1]), f"has {len(VOCABULARY) - 1} entries"),
        ([*VOCABULARY[:-1], VOCABULARY[5]], "duplicate"),
        ([entry if entry != "[UNK]" else "unk" for entry in VOCABULARY], "lacks [UNK]"),
        ("abc", "not a list"),
        ([1, 2], "not a list of WordPiece entries"),
    ],
)
def test_vocabularies_that_cannot_be(tmp_path, vocabulary, said):
    assert said in error_of(write_tiny(tmp_path / "m.pth", vocabulary=vocabulary))


def test_heads_that_do_not_divide_the_width(tmp_path):
    assert "bert_heads = 5" in error_of(write_tiny(tmp_path / "m.pth", glip_config={"bert_heads": 5}))


def test_the_number_of_heads_is_taken_from_the_file(tmp_path):
    one = load_checkpoint(write_tiny(tmp_path / "one.pth", glip_config=None)).config
    assert (one.bert.heads, one.head.bert_heads) == (1, 1)
    assert tiny_content()["glip_config"] == {"bert_heads": 4}


def test_reading_leaves_the_file_alone(tiny_checkpoint):
    before = Path(tiny_checkpoint).read_bytes()
    load_checkpoint(tiny_checkpoint)
    assert tiny_checkpoint.read_bytes() == before


def test_tiny_model_is_seeded():
    first, second = tiny_model(3).state_dict(), tiny_model(3).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
