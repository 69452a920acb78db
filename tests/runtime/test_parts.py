"""The parts of the C++ runtime, each against the same part in Python."""

from __future__ import annotations

import random

import numpy as np
import pytest
from selection import SLOW

from glip_deploy import Caption, GlipError
from glip_deploy.bundle.contract import Candidates
from glip_deploy.frames.canvas import make_canvas
from glip_deploy.frames.geometry import network_size
from glip_deploy.prompts.chunks import parse_chunks
from glip_deploy.prompts.tokens import parse_prompt
from glip_deploy.results.postprocess import select_batch

STRINGS = 100_000 if SLOW else 10_000


def same_tokens(probe, tokenizer, texts):
    texts = texts[:: probe.every]
    answers = probe.ask_all({"what": "tokenize", "text": text} for text in texts)
    for text, answer in zip(texts, answers, strict=True):
        wanted = tokenizer.encode(text)
        assert answer["ids"] == wanted.ids, (text.encode("unicode_escape"), wanted.tokens)
        assert [tuple(pair) for pair in answer["offsets"]] == wanted.offsets, text.encode("unicode_escape")


def test_every_character_of_unicode_is_tokenized_as_in_python(probe, bert_tokenizer):
    legal = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and code // 0x10000 in (0, 1, 2, 14)]
    texts = [" ".join(f"a{c}b" for c in legal[start : start + 256]) for start in range(0, len(legal), 256)]
    same_tokens(probe, bert_tokenizer[1], texts)


def test_random_strings_are_tokenized_as_in_python(probe, bert_tokenizer):
    rng = random.Random(5)
    words = [
        "person",
        "unaffable",
        "[MASK]",
        "[SEP]x",
        "İstanbul",
        "naïve",
        "ﬁne",
        "你好",
        "한국",
        "e\u0301tude",
        "3.5",
        "x" * 101,
    ]
    ranges = [
        (32, 127),
        (0, 0x250),
        (0x300, 0x600),
        (0x4E00, 0x4F00),
        (0x2000, 0x2100),
        (0x1F300, 0x1F600),
        (0xAC00, 0xB000),
    ]

    def piece():
        if rng.random() < 0.4:
            return rng.choice(words)
        low, high = rng.choice(ranges)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 6)))

    texts = [
        "".join(piece() + rng.choice(["", " ", " ", "\t", ". "]) for _ in range(rng.randrange(1, 7)))
        for _ in range(STRINGS)
    ]
    same_tokens(probe, bert_tokenizer[1], texts)


LISTS = [
    ["person", "traffic_light"],
    ["stop sign (red)", "a  b", "ÅNGSTRÖM"],
    ["[stingray], which is flat and round", "the [red hat] of a man"],
    [r"\[bracket\]", "caf\u00e9"],
    [],
    ["person", "PERSON"],
    ["person", "Per_son "],
    [" . "],
    ["[a] and [b]"],
    ["straße", "STRASSE"],
    ["\u200b"],
    ["x" * 300 + " " + "y " * 300],
]
CAPTIONS = [
    "person. dog",
    "person . traffic light . ",
    "3.5 inch disk. cat...dog. bird..",
    "a man with a [green hat] and [two dogs]",
    "dog",
    "traffic light",
    "a red apple",
    "person. dog. Person",
    "[open",
    "closed]",
    "[a [b]]",
    "[ ]. x",
    "   ",
    "",
    "\\[x\\]. y",
    "ein Haus\u2028. un café",
    "Hund.\u00a0Katze",
]


@pytest.mark.parametrize("prompt", [*LISTS, *CAPTIONS], ids=lambda value: repr(value)[:30])
def test_prompts_are_read_as_in_python(probe, bert_tokenizer, prompt):
    answer = probe.ask(what="prompt", **({"text": prompt} if isinstance(prompt, str) else {"names": prompt}))
    try:
        wanted = parse_prompt(prompt, bert_tokenizer[1])
    except GlipError as error:
        assert answer["kind"] == 2 and "\n" not in answer["error"]
        # The sentence up to the value is the same; how a text is quoted differs between the languages.
        assert answer["error"].split("(")[0].split("'")[0][:12] == str(error).split("(")[0].split("'")[0][:12]
        return
    assert answer["ids"] == wanted.input_ids.tolist()
    assert answer["phrases"] == list(wanted.phrases)
    assert answer["positions"] == [list(span) for span in wanted.token_spans]


def many(count):
    words = (
        "dog",
        "traffic light",
        "hippopotamus",
        "a very long name of a thing",
        "[wheel] of a cart",
        "oven_glove (red)",
    )
    return [f"{words[i % len(words)]} {i}" for i in range(count)]


LONG = [
    (many(20), None, 256),
    (many(290), None, 256),
    (many(1300), None, 256),
    (many(100), 40, 256),
    (many(9), 1, 256),
    ([f"{'a lot of words that fill ' * 3}{i}" for i in range(40)], 20, 256),
    (many(50), None, 16),
    ([*many(60), "far " * 240], None, 256),
    ([*many(300), "dog 0"], None, 256),
    ([*many(300), " "], None, 256),
    ([*many(300), "\u0301\u0301"], None, 256),
    ([*many(99), "far " * 300], None, 256),
    (["dog"], None, 2),
]


@pytest.mark.parametrize(("names", "classes", "limit"), LONG, ids=range(len(LONG)))
def test_long_lists_are_divided_as_in_python(probe, bert_tokenizer, names, classes, limit):
    answer = probe.ask(what="chunks", names=names, limit=limit, classes=classes or 0)
    try:
        wanted = parse_chunks(names, bert_tokenizer[1], max_tokens=limit, classes_per_prompt=classes)
    except GlipError as error:
        assert answer["kind"] == 2 and answer["error"][:9] == str(error)[:9]  # "class 300"
        assert answer["error"].rsplit(";")[-1] == str(error).rsplit(";")[-1]
        return
    assert [chunk["ids"] for chunk in answer] == [chunk.input_ids.tolist() for chunk in wanted]
    assert [chunk["phrases"] for chunk in answer] == [list(chunk.phrases) for chunk in wanted]
    assert [chunk["positions"] for chunk in answer] == [[list(span) for span in chunk.token_spans] for chunk in wanted]


def test_random_lists_are_divided_as_in_python(probe, bert_tokenizer):
    rng = random.Random(11)
    for _ in range(40):
        count, limit, classes = rng.randrange(1, 120), rng.choice([12, 40, 256]), rng.choice([None, None, 1, 7, 33])
        names = [
            " ".join(rng.choices(["cat", "unaffable", "é", "x-ray"], k=rng.randrange(1, 5))) + f" {i}"
            for i in range(count)
        ]
        answer = probe.ask(what="chunks", names=names, limit=limit, classes=classes or 0)
        try:
            wanted = parse_chunks(names, bert_tokenizer[1], max_tokens=limit, classes_per_prompt=classes)
        except GlipError:
            assert answer["kind"] == 2
            continue
        assert [chunk["ids"] for chunk in answer] == [chunk.input_ids.tolist() for chunk in wanted]


def test_spans_are_read_as_in_python(probe, bert_tokenizer):
    text, spans = "a naïve man near the café", [[(2, 11)], [(2, 7), (21, 25)]]
    answer = probe.ask(what="prompt", text=text, spans=spans)
    wanted = parse_prompt(Caption(text, spans), bert_tokenizer[1])
    assert answer["phrases"] == list(wanted.phrases) == ["naïve man", "naïve café"]
    assert answer["positions"] == [list(span) for span in wanted.token_spans]
    for bad in ([], [[]], [[(3, 3)]], [[(0, 99)]], [[(4, 8), (2, 3)]]):
        assert probe.ask(what="prompt", text=text, spans=bad)["kind"] == 2


def test_a_sentence_needs_brackets_or_spans(probe):
    answer = probe.ask(what="prompt", text="a red apple left of two dogs")
    assert answer["kind"] == 2 and "put brackets around what to find" in answer["error"]


def test_sizes_are_those_of_python(probe):
    rng = random.Random(1)
    for _ in range(300):
        sides = {"height": rng.randrange(1, 4000), "width": rng.randrange(1, 4000)}
        shortest, longest = rng.randrange(1, 1000), rng.choice([None, 1333, 640, rng.randrange(1, 2000)])
        answer = probe.ask(what="size", **sides, shortest=shortest, longest=longest or 0)
        try:
            assert tuple(answer) == network_size(sides["height"], sides["width"], shortest, longest)
        except GlipError:
            assert answer["kind"] == 3


SHAPES = [
    (37, 53, 96, 1333),
    (120, 90, 50, 1333),
    (64, 64, 64, 1333),
    (200, 31, 32, 100),  # so tall that Pillow begins with the height
    (48, 64, 48, 64),
    (97, 33, 150, 200),
]


@pytest.mark.parametrize(("height", "width", "shortest", "longest"), SHAPES)
def test_resizing_is_exact(probe, height, width, shortest, longest):
    rng = np.random.default_rng(height)
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    wanted = make_canvas(picture, color="bgr", shortest_side=shortest, longest_side=longest)
    alpha = np.dstack([picture, rng.integers(0, 256, (height, width), dtype=np.uint8)])
    padded = np.zeros((height, width + 5, 3), np.uint8)
    padded[:, :width] = picture
    views = [
        (picture, 0, 0), (picture[..., ::-1], 1, 0), (alpha, 2, 0), (alpha[..., [2, 1, 0, 3]], 3, 0),
        (padded, 0, padded.strides[0]),
    ]  # fmt: skip
    for pixels, kind, pitch in views:
        answer = probe.ask(
            what="canvas", pixels=pixels.ravel().tolist(), height=height, width=width, format=kind, pitch=pitch,
            shortest=shortest, longest=longest,
        )  # fmt: skip
        assert answer["picture"] == wanted.image_sizes[0].tolist()
        assert np.array_equal(np.array(answer["pixels"], np.uint8).reshape(wanted.frames[0].shape), wanted.frames[0])
    gray = picture[..., 0]
    wanted = make_canvas(gray, color="bgr", shortest_side=shortest, longest_side=longest)
    sides = {"height": height, "width": width, "shortest": shortest, "longest": longest}
    answer = probe.ask(what="canvas", pixels=gray.ravel().tolist(), format=4, **sides)
    assert answer["pixels"] == wanted.frames.ravel().tolist()


def test_nv12_gives_the_colors_of_bt601(probe):
    colors = {
        (81, 90, 240): (255, 0, 0),
        (145, 54, 34): (0, 255, 0),
        (41, 240, 110): (0, 0, 255),
        (235, 128, 128): (255,) * 3,
    }
    for (y, u, v), rgb in colors.items():
        answer = probe.ask(
            what="canvas", pixels=[y] * 1024 + [u, v] * 256, height=32, width=32, format=5, shortest=32, longest=0
        )
        assert np.abs(np.array(answer["pixels"][:3])[::-1] - np.array(rgb)).max() <= 2


def test_nv12_is_pythons_bit_for_bit(probe):
    both = np.random.default_rng(4).integers(0, 256, (48, 64), dtype=np.uint8)
    answer = probe.ask(
        what="canvas", pixels=both.ravel().tolist(), height=32, width=64, format=5, shortest=32, longest=0
    )
    wanted = make_canvas([both], color="nv12", shortest_side=32, longest_side=None)
    assert answer["pixels"] == wanted.frames.ravel().tolist()


REFUSED = [
    ({"pitch": 11}, "a row of 4 pixels has 12"),
    ({"pitch": 2**64 - 12}, "from the top down"),
    ({"width": 0}, "at least 1 pixel"),
    ({"null": True}, "pointer is null"),
    ({"format": 9}, "format 9"),
    ({"memory": 1}, "GPU memory"),
    ({"height": 40000, "width": 40000}, "pixels accepted"),
    ({"format": 5, "width": 3}, "are even"),
    ({"height": 1, "width": 90000, "longest": 0, "shortest": 900}, "set a longest side"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_pictures_that_cannot_be_used(probe, change, said):
    question = {"pixels": [0] * 48, "height": 4, "width": 4, "format": 0, "shortest": 32, "longest": 64}
    answer = probe.ask(what="canvas", **{**question, **change})
    assert answer["kind"] == 3 and said in answer["error"] and "\n" not in answer["error"]


def test_candidates_that_do_not_belong_together_are_an_error(probe):
    question = {"boxes": [1.0, 2.0, 3.0, 4.0], "scores": [0.5], "labels": [0], "thresholds": [0.1], "phrases": ["a"]}
    assert len(probe.ask(what="select", most=5, **question)) == 1
    for change in ({"boxes": [1.0, 2.0]}, {"labels": []}, {"scores": [0.5, 0.5]}):
        answer = probe.ask(what="select", most=5, **{**question, **change})
        assert answer["kind"] == 5 and "export the bundle again" in answer["error"]


def test_prompts_used_last_stay_in_memory(probe):
    steps = [*(("put", index) for index in range(64)), ("get", 0), ("put", 64), ("get", 0), ("get", 1), ("get", 2)]
    assert probe.ask(what="cache", steps=steps) == [True, True, False, True]


@pytest.mark.parametrize("seed", range(8))
def test_boxes_are_selected_as_in_python(probe, seed):
    rng = np.random.default_rng(seed)
    count = 400
    corners = rng.uniform(0, 150, (count, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + rng.uniform(-1, 40, (count, 2)).astype(np.float32)], axis=1)
    scores = rng.choice(np.linspace(0, 1, 30).astype(np.float32), count)  # with many ties
    labels = rng.integers(0, 3, count)
    thresholds, most = [0.1, 0.4, 0.0], int(rng.choice([5, 30, 100]))
    (wanted,) = select_batch(
        Candidates(boxes[None], scores[None], labels[None]), np.array([[100, 200]]), np.array([[333, 777]]),
        thresholds=np.array(thresholds, np.float32), phrases=["a", "b", "c"], nms_threshold=0.6, max_detections=most,
    )  # fmt: skip
    answer = probe.ask(
        what="select", boxes=boxes.ravel().tolist(), scores=scores.tolist(), labels=labels.tolist(),
        thresholds=thresholds, phrases=["a", "b", "c"], most=most,
    )  # fmt: skip
    found = np.array(answer)
    assert len(wanted) > 3
    np.testing.assert_array_equal(found[:, :4].astype(np.float32), wanted.boxes)
    np.testing.assert_array_equal(found[:, 4].astype(np.float32), wanted.scores)
    np.testing.assert_array_equal(found[:, 5].astype(int), wanted.labels)
