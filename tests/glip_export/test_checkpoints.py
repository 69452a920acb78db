"""Checkpoints as users have them, and as they should not be."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
from pathlib import Path

import pytest
import torch
from glip_export.checkpoints import build, derive_config, load_checkpoint, read_checkpoint
from parity_data import STAND_IN
from tiny_glip import VOCABULARY, error_of, tiny_config, tiny_content, tiny_model, tiny_state, write_tiny

from glip_deploy.errors import CheckpointError

LOGITS = "rpn.head.log_scale"


@pytest.fixture(scope="module")
def state():
    return tiny_state()


def test_a_written_model_comes_back(tiny_checkpoint):
    loaded = load_checkpoint(tiny_checkpoint)
    assert loaded.config == tiny_config()
    assert loaded.vocabulary == VOCABULARY
    expected = tiny_state()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert not loaded.model.training


@pytest.mark.parametrize("wrap", ["plain", "module prefix"])
def test_forms_of_a_state_dict(tmp_path, state, wrap):
    if wrap == "module prefix":
        state = {f"module.{key}": value for key, value in state.items()}
    loaded = load_checkpoint(write_tiny(tmp_path / "m.pth", state))
    assert loaded.config == tiny_config()
    assert not any(key.startswith("module.") for key in loaded.ignored)


def test_a_bare_state_dict(tmp_path, state):
    path = tmp_path / "bare.pth"
    torch.save({**state}, path)
    file = read_checkpoint(path)
    assert file.vocabulary is None and file.facts == {}
    loaded = load_checkpoint(path)
    found = loaded.model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in found)


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
def test_variants_are_recognized_from_names_and_shapes(manifest, variant, sizes):
    rows = json.loads((STAND_IN / "manifests" / f"{manifest}.json").read_text())["tensors"]
    state = {row["key"]: torch.empty(row["shape"], device="meta") for row in rows}
    config = derive_config(state)
    assert config.variant == variant
    assert (config.swin.embed_dim, config.swin.window, config.head.blocks, config.head.fusion) == sizes
    assert (config.bert.hidden, config.bert.layers, config.bert.heads) == (768, 12, 12)
    assert config.tunable_tokens == (1000 if "prompt" in manifest else 0)
    assert config.swin.depths == ((2, 2, 18, 2) if manifest == "glip_L" else (2, 2, 6, 2))
    assert config.swin.num_heads == ((6, 12, 24, 48) if manifest == "glip_L" else (3, 6, 12, 24))
    assert (config.bert.vocabulary, config.bert.positions, config.input.max_tokens) == (30522, 512, 256)
    assert (config.head.channels, config.head.fusion_dim) == (256, 2048)


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


@pytest.mark.parametrize("heads", [5, 0, -4, "many", None, 2.0, float("nan"), float("inf"), True, [4]])
def test_numbers_of_heads_that_cannot_be(tmp_path, heads):
    message = error_of(write_tiny(tmp_path / "m.pth", glip_config={"bert_heads": heads}))
    assert f"bert_heads = {heads!r}" in message and "divisor of the text width 32" in message


SIZES = (
    "backbone.body.patch_embed.proj.weight",
    "backbone.body.layers.0.blocks.0.attn.relative_position_bias_table",
    "backbone.body.layers.3.blocks.0.attn.relative_position_bias_table",
    "backbone.body.layers.1.blocks.0.mlp.fc1.weight",
    "language_backbone.body.model.embeddings.word_embeddings.weight",
    "language_backbone.body.model.embeddings.position_embeddings.weight",
    "language_backbone.body.model.encoder.layer.0.intermediate.dense.weight",
    "rpn.head.bbox_pred.weight",
    "rpn.head.dyhead_tower.0.b_attn.attn.v_proj.weight",
    "rpn.head.dyhead_tower.1.intermediate.dense.weight",
    "rpn.head.dyhead_tower.2.relu.fc.0.weight",
)


@pytest.mark.parametrize("key", SIZES)
def test_tensors_that_sizes_are_read_from_may_have_any_shape(state, key):
    """Each is one clear error: no shape makes the reading itself fail."""
    true = tuple(state[key].shape)
    for shape in ((), (7,), (0,), (*true, 2), tuple(0 for _ in true), tuple(size + 1 for size in true)):
        changed = {**state, key: torch.zeros(shape)}
        with pytest.raises(CheckpointError) as caught:
            build(changed, derive_config(changed, {"bert_heads": 4}, "m.pth"), "m.pth")
        assert "checkpoint m.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_another_number_of_stages(state):
    three = {key: value for key, value in state.items() if ".layers.3." not in key}
    with pytest.raises(CheckpointError, match="has 3 stages, GLIP's has 4"):
        derive_config(three, {"bert_heads": 4})


def test_channels_that_do_not_divide(state):
    changed = {**state, "rpn.head.bbox_pred.weight": torch.zeros(4, 40, 3, 3)}
    with pytest.raises(CheckpointError, match="channels of the head, 40, cannot be divided by the 16 groups"):
        derive_config(changed, {"bert_heads": 4})


@pytest.mark.parametrize(
    ("convert", "said"),
    [
        (lambda value: value.to_sparse(), "is sparse_coo"),
        (lambda value: value.to(torch.complex64), "is complex64"),
        (lambda value: value.to(torch.int8), "is int8"),
        (lambda value: value.double() * 1e300, "NaN or infinite"),  # too large for single precision
    ],
)
def test_weights_of_other_kinds(state, convert, said):
    key = "rpn.head.centerness.weight"
    changed = {**state, key: convert(state[key])}
    with pytest.raises(CheckpointError) as caught:
        build(changed, tiny_config())
    assert said in str(caught.value) and key in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about kinds of tensors
@pytest.mark.parametrize("kind", ["meta", "sparse", "csr", "nested", "expanded", "quantized"])
@pytest.mark.parametrize(
    "key",
    [
        "rpn.head.centerness.weight",
        "rpn.head.bbox_pred.weight",
        "rpn.head.dyhead_tower.2.relu.fc.0.weight",
        "backbone.body.layers.0.blocks.0.attn.relative_position_bias_table",
        "rpn.anchor_generator.cell_anchors.0",
    ],
)
def test_tensors_that_are_no_plain_arrays(tmp_path, state, key, kind):
    """Whether the file can be read at all is torch's decision; either way it is one line."""
    plain = state.get(key, torch.tensor([[-28.0, -28.0, 35.0, 35.0]]))
    value = {
        "meta": lambda: plain.to("meta"),
        "sparse": plain.to_sparse,
        "csr": lambda: plain.flatten(1).to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor([plain, plain]),
        "expanded": lambda: torch.zeros(1).expand(plain.shape),
        "quantized": lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
    }[kind]()
    changed = {**state, key: value}
    with pytest.raises(CheckpointError) as caught:
        build(changed, derive_config(changed, {"bert_heads": 4}, "m.pth"), "m.pth")
    assert "checkpoint m.pth" in str(caught.value) and key in str(caught.value)
    assert "m.pth" in error_of(write_tiny(tmp_path / "m.pth", changed))


@pytest.mark.parametrize(
    "name",
    [
        "backbone.body.layers.0.blocks.99999.norm1.weight",
        "backbone.body.layers.0.blocks.3.norm1.weight",
        "backbone.body.layers.99999.blocks.0.norm1.weight",
        "language_backbone.body.model.encoder.layer.99999.output.dense.bias",
        "rpn.head.dyhead_tower.99999.offset.weight",
        f"rpn.head.dyhead_tower.{'9' * 5000}.offset.weight",
    ],
)
def test_one_name_with_a_large_number_is_an_error_at_once(tmp_path, state, name):
    """The number of layers used to be the largest number in a name, and building 100,000 of them took hours."""
    started = time.monotonic()
    message = error_of(write_tiny(tmp_path / "m.pth", {**state, name: torch.zeros(1)}))
    assert name[:40] in message
    assert time.monotonic() - started < 20


def test_a_window_too_large_to_be_one(state):
    """A table of a few megabytes would ask for an index of 31 GB."""
    table = "backbone.body.layers.{}.blocks.{}.attn.relative_position_bias_table"
    changed = {
        **state,
        **{table.format(i, j): torch.zeros(999**2, 2**i) for i in range(4) for j in range(2)},
    }
    with pytest.raises(CheckpointError, match=r"checkpoint m\.pth: the Swin window is 500.*up to 32; GLIP"):
        build(changed, derive_config(changed, {"bert_heads": 4}, "m.pth"), "m.pth")


def test_any_failure_of_the_reader_is_one_line(tmp_path, tiny_checkpoint, monkeypatch):
    """Damaged files have made torch.load raise these, among others."""
    for error in (AssertionError(), struct.error("unpack requires a buffer of 8 bytes"), NotImplementedError("x\ny")):
        monkeypatch.setattr(torch, "load", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        assert "cannot be read: truncated or corrupt" in error_of(tiny_checkpoint)


@pytest.mark.parametrize("what", ["a long name", "a folder that may not be read"])
def test_paths_that_cannot_be_looked_at(tmp_path, monkeypatch, what):
    path = tmp_path / ("x" * 300) if what == "a long name" else tmp_path / "m.pth"
    if what != "a long name":

        def refuse(self, **_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "stat", refuse)  # tests may run as root, who may read everything
    assert ("File name too long" if what == "a long name" else "Permission denied") in error_of(path)


@pytest.mark.parametrize(("rows", "limit"), [(64, 64), (1000, 256)])
def test_a_prompt_is_no_longer_than_the_tuned_rows(state, rows, limit):
    tuned = {**state, "rpn.tunable_linear.weight": torch.zeros(rows, 32)}
    assert derive_config(tuned, {"bert_heads": 4}).input.max_tokens == limit


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
