"""Noun phrases of captions, and which captions are read for them."""

import time
import types
from contextlib import suppress

import pytest
from glip_export.tokenizer import build_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from glip_deploy.errors import MissingPackage, OptionError, PromptError
from glip_deploy.prompts import phrases as module
from glip_deploy.prompts.phrases import find_phrases, is_plain_name
from glip_deploy.prompts.syntax import Caption, mark
from glip_deploy.prompts.tokens import parse_prompt

WOMAN = "A tattooed woman with a green dress and yellow backpack holding a water bottle is walking across the street."
WOMAN_PHRASES = ["A tattooed woman", "a green dress", "yellow backpack", "a water bottle", "the street"]


@pytest.fixture(autouse=True)
def textblob_alone(monkeypatch):
    """What the tests expect is what TextBlob's tags give, whatever else this machine has."""
    monkeypatch.setattr(module, "SPACY_MODELS", ())
    module._tagger.cache_clear()
    yield
    module._tagger.cache_clear()


@pytest.fixture
def no_tagger(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)


def found(text):
    return [text[start:end] for start, end in find_phrases(text)]


# --- the grammar ---


def test_the_spans_of_the_official_example():
    assert found(WOMAN) == WOMAN_PHRASES
    assert find_phrases(WOMAN) == [(0, 16), (22, 35), (40, 55), (64, 78), (97, 107)]


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("There is two cat and a remote in the picture", ["two cat", "a remote", "the picture"]),
        ("bobble heads on top of the shelf", ["bobble heads", "the shelf"]),
        ("a broken window", ["a broken window"]),
        ("fried eggs and sliced tomatoes on a plate", ["fried eggs", "sliced tomatoes", "a plate"]),
        ("traffic light", ["traffic light"]),
        ("a fire hydrant and a stop sign", ["a fire hydrant", "a stop sign"]),
        ("stop sign", ["stop sign"]),
        ("running shoes", ["running shoes"]),
        ("a 3.5 inch disk", ["a 3.5 inch disk"]),
        ("a person in a t-shirt", ["a person", "a t-shirt"]),
        ("the man's hat is on John’s head", ["the man's hat", "John’s head"]),
        ("a woman holding her handbag", ["a woman", "her handbag"]),
        ("a small child is holding his teddy bear", ["a small child", "his teddy bear"]),
        ("a sliced orange on a cutting board", ["a sliced orange", "a cutting board"]),
        ("a very tall man with a brightly colored kite", ["a very tall man", "a brightly colored kite"]),
        ("a black and white cat", ["a black and white cat"]),
        ("a red, white and blue flag", ["a red, white and blue flag"]),
        ("a trash can", ["a trash can"]),
        ("two dog faces", ["two dog faces"]),
        ("A MAN WITH A HAT", ["A MAN", "A HAT"]),
        ("dog, bear, cat", ["dog", "bear", "cat"]),
    ],
)
def test_noun_phrases(text, phrases):
    assert found(text) == phrases


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("a man riding a horse", ["a man", "a horse"]),
        ("man riding horse", ["man", "horse"]),
        ("two men, both wearing hats", ["two men", "hats"]),
        ("a bag for carrying tools", ["a bag", "tools"]),
        ("a man sitting and holding bottles", ["a man", "bottles"]),
        ("a kid flies a kite", ["a kid", "a kite"]),
        ("the quick brown fox jumps over the lazy dog", ["the quick brown fox", "the lazy dog"]),
        ("a dog that isn't big", ["a dog"]),
        ("it's a dog", ["a dog"]),
    ],
)
def test_verbs_are_left_out(text, phrases):
    assert found(text) == phrases


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("top of a pile of rocks", ["a pile of rocks"]),
        ("a man standing on top of a pile of rocks", ["a man", "a pile of rocks"]),
        ("a group of people in front of an old building", ["a group of people", "an old building"]),
        ("a couple of very red apples", ["a couple of very red apples"]),
        ("a cup of tea", ["a cup", "tea"]),
        ("a red apple left of two dogs", ["a red apple", "two dogs"]),
        ("a red car right of a blue book", ["a red car", "a blue book"]),
        ("a girl on the left and a boy on the right of a car", ["a girl", "a boy", "a car"]),
        ("the left hand of a woman", ["the left hand", "a woman"]),
        ("the top of the building", ["the top", "the building"]),
    ],
)
def test_quantities_join_and_places_are_no_things(text, phrases):
    assert found(text) == phrases


def test_repeated_phrases_stay_apart():
    text = "a dog and a dog"
    assert find_phrases(text) == [(0, 5), (10, 15)]
    prompt = parse_prompt(text, build_tokenizer())
    assert prompt.phrases == ("a dog", "a dog")
    assert prompt.token_spans == ((1, 2), (4, 5))


@pytest.mark.parametrize("text", ["is walking across", "very red", "", " .", "🐶 !", "_ _", "it runs"])
def test_a_caption_without_a_noun_is_a_one_line_error(text):
    with pytest.raises(PromptError, match="no noun is found in") as caught:
        find_phrases(text)
    assert "\n" not in str(caught.value)


WORDS = ["a", "the", "two", "red", "very", "tattooed", "dog", "dogs", "pile", "left", "of", "and", ",", ".", "is"]
WORDS += ["running", "runs", "on", "top", "can", "bear", "it's", "man's", "_", "'", "/", "&slash;", "İ", "\n", "犬"]


@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS)).map(" ".join)))
@example("a dog\x00a dog\x1ca dog\u2028a dog\xa0a dog")
@example("x/y &slash; a/b")
def test_spans_are_in_order_inside_and_not_empty(text):
    try:
        spans = find_phrases(text)
    except PromptError:
        return
    assert spans == find_phrases(text)
    last = 0
    for start, end in spans:
        assert last <= start < end <= len(text)
        assert any(character.isalnum() for character in text[start:end])
        assert not text[start].isspace() and not text[end - 1].isspace()
        last = end


@pytest.mark.parametrize("unit", ["red ", "very red, and ", "a red pile of ", "the left of ", "dog ", "a dog. ", "' "])
def test_time_is_linear(unit):
    """Eight times the text takes about eight times as long; quadratic would be 64 times."""

    def seconds(count):
        start = time.process_time()
        with suppress(PromptError):
            find_phrases(unit * count)
        return time.process_time() - start

    seconds(10)
    shortest = min(seconds(2000) for _ in range(3))
    assert any(seconds(16000) < 30 * max(shortest, 0.02) for _ in range(3))  # a busy machine may slow any one of them


# --- which captions are read for noun phrases ---


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("person. dog", ("person", "dog")),
        ("person . dog . ", ("person", "dog")),
        ("person", ("person",)),
        ("person.", ("person",)),
        ("bear", ("bear",)),
        ("running", ("running",)),
        ("red apple", ("red apple",)),
        ("traffic light", ("traffic light",)),
        ("traffic light .", ("traffic light",)),
        ("quickly running . ", ("quickly running",)),
        ("3.5 inch disk", ("3.5 inch disk",)),
        ("a man riding. a horse", ("a man riding", "a horse")),
        ("stingray, which is flat. shark", ("stingray, which is flat", "shark")),
        ("a man with a [green hat]", ("green hat",)),
        ("A dog runs.", ("A dog",)),
        ("A dog runs...", ("A dog",)),
        ("a dog and a dog.", ("a dog", "a dog")),
        (WOMAN, tuple(WOMAN_PHRASES)),
    ],
)
def test_auto(text, phrases):
    assert mark(text).phrases == phrases


def test_phrases_whole_and_dots():
    text = "A dog runs. A cat sleeps."
    assert mark(text).phrases == mark(text, "dots").phrases == ("A dog runs", "A cat sleeps")
    assert mark(text, "whole").phrases == ("A dog", "A cat")
    assert mark("A dog runs.", "dots").phrases == ("A dog runs",)
    assert mark("a [dog] runs", "whole").phrases == ("dog",)
    assert mark(["a dog runs"], "whole").phrases == ("a dog runs",)
    assert mark(Caption("a dog runs", [(2, 5)]), "whole").phrases == ("dog",)


def test_an_unknown_value_of_phrases_is_refused():
    with pytest.raises(OptionError, match="phrases is 'all'; legal is auto, whole, dots"):
        mark("dog", "all")


# --- taggers ---


@pytest.mark.parametrize("text", ["person", "traffic light", "a red apple", "a red apple.", "person. a dog on a mat"])
def test_names_and_lists_need_no_tagger(no_tagger, text):
    assert mark(text).phrases == tuple(piece.strip() for piece in text.split(".") if piece)


@pytest.mark.parametrize("text", [WOMAN, "a cat and a dog", "cat, dog", "a dog is here"])
def test_without_a_tagger_a_caption_says_what_to_install(no_tagger, text):
    assert not is_plain_name(text)
    with pytest.raises(MissingPackage, match=r"pip install 'glip-deploy\[captions\]', or put brackets") as caught:
        mark(text)
    assert "\n" not in str(caught.value)


def test_whole_needs_a_tagger_even_for_a_name(no_tagger):
    with pytest.raises(MissingPackage):
        mark("red apple", "whole")


@pytest.fixture
def fake_spacy(monkeypatch):
    """A spaCy whose model "en_fake" tags every word but "a" as a noun."""

    class Doc(list):
        def __init__(self, vocab, words):
            assert vocab == "vocabulary"
            super().__init__(types.SimpleNamespace(tag_={"a": "DT"}.get(word, "NN")) for word in words)

    def load(exclude):
        return types.SimpleNamespace(vocab="vocabulary", pipe=iter)

    known = {"en_fake": types.SimpleNamespace(load=load), "spacy.tokens": types.SimpleNamespace(Doc=Doc)}
    monkeypatch.setattr(module, "find_spec", lambda name: name in ("en_fake", "spacy") or None)
    monkeypatch.setattr(module, "import_module", known.__getitem__)
    monkeypatch.setattr(module, "SPACY_MODELS", ("en_absent", "en_fake"))
    return known["en_fake"]


def test_spacy_is_used_where_a_model_is_installed(fake_spacy):
    assert found("a very red is a dog") == ["a very red", "a dog"]


def test_a_model_that_does_not_load_is_passed_over(fake_spacy, monkeypatch, caplog):
    def broken(exclude):
        raise OSError("made for another spaCy")

    fake_spacy.load = broken
    with pytest.raises(MissingPackage):
        find_phrases("a dog")
    monkeypatch.setattr(module, "find_spec", lambda name: name in ("en_fake", "spacy", "textblob") or None)
    assert found("a very red dog") == ["a very red dog"]
    assert "en_fake cannot be used to find phrases: made for another spaCy" in caplog.text
