"""Recall of phrases."""

import json

import numpy as np
import pytest
from glip_bench.cli import main
from glip_bench.quality.grounding import read_phrases, recall
from PIL import Image

from glip_deploy.errors import GlipError

CAPTION = "a red cat left of two dogs"


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(tmp_path / "a.png")
    phrases = [
        {"span": [0, 9], "boxes": [[0, 0, 10, 10]]},
        {"span": [[18, 21], [22, 26]], "boxes": [[20, 0, 30, 10], [40, 0, 50, 10]]},
    ]
    content = [{"image": "a.png", "caption": CAPTION, "phrases": phrases}]
    (tmp_path / "set.json").write_text(json.dumps(content))
    return tmp_path


def figures(folder, *rows):
    data = read_phrases(folder / "set.json", folder)
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return recall(data, {"0": {"boxes": boxes, "scores": scores, "labels": labels}})["figures"]


def test_ranks_and_protocols(folder):
    good, both = [0, 0, 10, 9], [20, 0, 50, 10]
    found = figures(folder, (good, 0.9, 0), (both, 0.8, 1), ([40, 0, 50, 10], 0.7, 1), (good, 0.95, 1))
    assert (found["R@1"], found["R@5"], found["R@10"]) == (50, 100, 100)  # the best box for "two dogs" is the cat's
    assert (found["R@1 merged"], found["R@5 merged"]) == (50, 100)


def test_a_phrase_without_boxes_counts(folder):
    assert figures(folder, ([0, 0, 10, 10], 0.9, 0))["R@10"] == 50
    assert set(figures(folder).values()) == {0.0}


def test_half_overlapped_is_right_and_less_is_not(folder):
    """As in the official evaluation, a width is x2 - x1: with the last pixel counted, 4.9 would be 5.9 of 11."""
    assert figures(folder, ([0, 0, 10, 5.0], 0.9, 0))["R@1"] == 50
    assert figures(folder, ([0, 0, 10, 4.9], 0.9, 0))["R@1"] == 0


def test_a_box_without_area_overlaps_nothing(folder):
    assert figures(folder, ([5, 5, 5, 5], 0.9, 0))["R@10"] == 0


def test_spans_reach_the_prompt(folder):
    (picture,) = read_phrases(folder / "set.json", folder)
    assert picture.caption.spans == [[(0, 9)], [(18, 21), (22, 26)]]


def test_the_tiny_bundle_end_to_end(folder, tiny_bundle, capsys):
    arguments = [
        "--model",
        str(tiny_bundle),
        "--shortest-side",
        "64",
        "--quiet",
        "--subjects",
        "onnxruntime-cpu",
        "--images",
        str(folder),
    ]
    assert main(["grounding", str(folder / "set.json"), *arguments, "--json", str(folder / "r.json")]) == 0
    assert "1 pictures, 2 phrases" in capsys.readouterr().out
    result = json.loads((folder / "r.json").read_text())
    assert result["kind"] == "grounding" and set(result["subjects"]) == {"onnxruntime-cpu"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "no list of captions"),
        ('[{"image": "a.png", "caption": "x"}]', "caption 0: 'phrases' is missing"),
        ('[{"image": "a.png", "caption": "x", "phrases": []}]', "there are no phrases"),
        ('[{"image": "a.png", "caption": "x", "phrases": [{"span": [0, 1], "boxes": []}]}]', "boxes of shape"),
        (
            '[{"image": "a.png", "caption": "x", "phrases": [{"span": [0, 9], "boxes": [[0, 0, 1, 1]]}]}]',
            r"span \[0, 9\]",
        ),
        ('[{"image": "b.png", "caption": "x", "phrases": [{"span": [0, 1], "boxes": [[0, 0, 1, 1]]}]}]', "is missing"),
    ],
)
def test_a_bad_file_is_one_line(folder, content, said):
    (folder / "set.json").write_text(content)
    with pytest.raises(GlipError, match=said) as caught:
        read_phrases(folder / "set.json", folder)
    assert "\n" not in str(caught.value)
