"""The tokenizer that goes into a bundle: BERT's WordPiece, without a hub."""

from __future__ import annotations

import json

import pytest
from glip_export.tokenizer import SPECIAL_TOKENS, bert_base_vocabulary, build_tokenizer
from parity_data import load_golden
from tiny_glip import VOCABULARY
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_the_vocabulary_is_that_of_bert_base(tokenizer):
    entries = bert_base_vocabulary()
    assert len(entries) == len(set(entries)) == tokenizer.get_vocab_size() == 30522
    ids = {entry: tokenizer.token_to_id(entry) for entry in SPECIAL_TOKENS}
    assert ids == {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}


@pytest.mark.parametrize("name", ["glip_T_od.npz", "glip_A_od.npz", "glip_T_few.npz"])
def test_captions_become_the_official_ids(tokenizer, name):
    arrays, meta = load_golden(name)
    assert tokenizer.encode(meta["caption"]).ids == arrays["input_ids"][0, : meta["num_tokens"]].tolist()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Traffic LIGHT", ["traffic", "light"]),
        ("café", ["cafe"]),  # accents go, as in the uncased model
        ("person.dog", ["person", ".", "dog"]),
        ("hair drier", ["hair", "dr", "##ier"]),
        ("犬猫", ["犬", "[UNK]"]),  # ideographs stand alone
        ("🐕", ["[UNK]"]),
        ("", []),
    ],
)
def test_words(tokenizer, text, tokens):
    assert tokenizer.encode(text).tokens == ["[CLS]", *tokens, "[SEP]"]


def test_offsets_point_into_the_text(tokenizer):
    encoding = tokenizer.encode("a red  car")
    spans = [encoding.offsets[i] for i in range(1, 4)]
    assert spans == [(0, 1), (2, 5), (7, 10)]


def test_nothing_is_cut_or_padded(tokenizer):
    assert len(tokenizer.encode("dog " * 400).ids) == 402
    assert tokenizer.padding is None and tokenizer.truncation is None


def test_a_custom_vocabulary():
    own = build_tokenizer(VOCABULARY)
    assert own.get_vocab_size() == len(VOCABULARY)
    assert own.encode("dog zebra").tokens == ["[CLS]", "dog", "z", "##e", "##b", "##r", "##a", "[SEP]"]
    assert own.encode("dog").ids == [VOCABULARY.index(token) for token in ("[CLS]", "dog", "[SEP]")]


def test_the_bundle_holds_this_tokenizer(tiny_bundle):
    path = tiny_bundle / "tokenizer.json"
    json.loads(path.read_text(encoding="utf-8"))
    text = "a man with a green hat. Zebra"
    assert Tokenizer.from_file(str(path)).encode(text).ids == build_tokenizer(VOCABULARY).encode(text).ids
