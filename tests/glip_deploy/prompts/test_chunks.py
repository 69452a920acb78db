"""Lists of names that are longer than a prompt."""

from __future__ import annotations

import time

import pytest
from glip_export.tokenizer import build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from selection import slowly

from glip_deploy.errors import OptionError, PromptError
from glip_deploy.prompts import ClassName, parse_prompt
from glip_deploy.prompts.chunks import _token_counts, parse_chunks

TOKENIZER = build_tokenizer(None)
WORDS = ("dog", "traffic light", "hippopotamus", "a very long name of a thing", "wheel", "oven glove", "umbrella")


def many(count):
    return [f"{WORDS[i % len(WORDS)]} {i}" for i in range(count)]


def test_a_list_that_fits_is_one_prompt():
    assert parse_chunks(many(20), TOKENIZER) == (parse_prompt(many(20), TOKENIZER),)


def test_a_longer_one_is_several_that_fit():
    names = many(290)
    chunks = parse_chunks(names, TOKENIZER)
    assert [phrase for chunk in chunks for phrase in chunk.phrases] == names
    sizes = {len(chunk) for chunk in chunks[:-1]}
    assert len(chunks) > 1 and len(sizes) == 1 and sizes.pop() % 8 == 0
    assert max(len(chunk.input_ids) for chunk in chunks) <= 256
    assert sum(len(chunk.input_ids) for chunk in chunks[:-1]) / (len(chunks) - 1) > 256 * 0.7
    assert parse_chunks(tuple(names), TOKENIZER) == chunks
    start = 0
    for chunk in chunks:
        assert chunk == parse_prompt(names[start : start + len(chunk)], TOKENIZER)
        start += len(chunk)


def test_changing_a_class_changes_one_chunk():
    names = many(290)
    before = parse_chunks(names, TOKENIZER)
    for place in (0, 100, 289):
        changed = [*names[:place], "an electric guitar", *names[place + 1 :]]
        after = parse_chunks(changed, TOKENIZER)
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_so_many_classes_as_were_asked_for():
    chunks = parse_chunks(many(100), TOKENIZER, classes_per_prompt=40)
    assert [len(chunk) for chunk in chunks] == [40, 40, 20]
    assert [len(chunk) for chunk in parse_chunks(many(4), TOKENIZER, classes_per_prompt=3)] == [3, 1]
    # Where they do not fit, a chunk is halved.
    long = [f"{'a lot of words that fill ' * 3}{i}" for i in range(40)]
    assert {len(chunk) for chunk in parse_chunks(long, TOKENIZER, classes_per_prompt=20)} == {10}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([*many(300), "dog 0"], r"class 300 \('dog 0'\) repeats class 0"),
        ([*many(300), " "], r"class 300 is empty"),
        ([*many(300), "\u0301\u0301"], r"class 300 .* no character that the tokenizer knows"),
        ([*many(99), "far " * 300], r"class 99 \('far far .*\) has 300 tokens by itself, a prompt has room for 254"),
        ([*many(300), "\ud800"], "not a character"),
        ([], "empty list"),
    ],
)
def test_what_cannot_be_a_prompt(names, said):
    with pytest.raises(PromptError, match=said) as caught:
        parse_chunks(names, TOKENIZER)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "40"])
def test_numbers_of_classes_out_of_range(count):
    with pytest.raises(OptionError, match="classes_per_prompt is"):
        parse_chunks(many(3), TOKENIZER, classes_per_prompt=count)


PIECES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(PIECES, min_size=2, max_size=6), PIECES)
def test_tokens_of_a_list_are_those_of_its_names(texts, suffix):
    """Names of any characters: what decides about chunks is what the tokenizer makes of the caption."""
    names = [ClassName(f"{i}{text}", suffix=suffix if i % 2 else "") for i, text in enumerate(texts)]
    try:
        counts = _token_counts(names, TOKENIZER, 254)
        whole = parse_prompt(names, TOKENIZER, max_tokens=10_000)
    except PromptError:
        return
    assert len(whole.input_ids) == 2 + sum(counts) + len(names) - 1


@slowly
def test_time_grows_with_the_list():
    """A hundred thousand names: processor seconds, so that other work on the machine does not count."""
    spent = []
    for count in (10_000, 100_000):
        start = time.process_time()
        chunks = parse_chunks(many(count), TOKENIZER)
        spent.append(time.process_time() - start)
        assert sum(map(len, chunks)) == count
    assert spent[1] < 25 * max(spent[0], 0.2)
