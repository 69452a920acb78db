"""The goldens of the parts that ship with the tests, through the C++ runtime.

That of a whole model is in tests/glip_export/test_end_to_end.py, which has its bundle.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from parity_data import OWN

PROMPTS = json.loads((OWN / "unit_prompts.json").read_text(encoding="utf-8"))
LISTS = [entry for entry in PROMPTS if "names" in entry]
CAPTIONS = [entry for entry in PROMPTS if "char_spans" in entry]
SIZES = json.loads((OWN / "unit_resize_table.json").read_text())
MEAN = np.array([103.53, 116.28, 123.675], np.float32)
DEVIATION = np.array([57.375, 57.12, 58.395], np.float32)


def same_prompt(answer, official):
    assert answer["ids"] == official["input_ids"]
    assert answer["positions"] == list(official["positive_map"].values())


@pytest.mark.parametrize("entry", LISTS, ids=lambda entry: entry["names"][0])
def test_lists_are_the_official_prompts(probe, entry):
    answer = probe.ask(what="prompt", names=entry["names"])
    same_prompt(answer, entry["eval"])
    assert answer["phrases"] == entry["names"]
    same_prompt(probe.ask(what="prompt", text=entry["demo"]["caption"]), entry["demo"])


@pytest.mark.parametrize("entry", CAPTIONS, ids=lambda entry: entry["caption"][:10])
def test_captions_are_the_official_prompts(probe, entry):
    text, spans = entry["caption"], entry["char_spans"]
    same_prompt(probe.ask(what="prompt", text=text, spans=[[span] for span in spans]), entry)
    for start, end in reversed(spans):
        text = f"{text[:start]}[{text[start:end]}]{text[end:]}"
    same_prompt(probe.ask(what="prompt", text=text), entry)


def test_sizes_are_the_official_ones(probe):
    assert len(SIZES) > 10
    for row in SIZES:
        for form, longest in (("eval", 1333), ("demo", 0)):
            found = probe.ask(what="size", height=row["h"], width=row["w"], shortest=800, longest=longest)
            assert found == [row[f"{form}_h"], row[f"{form}_w"]]


@pytest.mark.parametrize(
    ("source", "wanted", "longest"),
    [("image", "demo_min64", 0), ("image", "eval_min64_max90", 90), ("image_small", "demo_up_min64", 0)],
)
def test_pictures_are_resized_as_officially(probe, source, wanted, longest):
    with np.load(OWN / "unit_preprocess.npz") as golden:
        picture, official = golden[source], golden[wanted]
    sides = {"height": picture.shape[0], "width": picture.shape[1], "shortest": 64, "longest": longest}
    answer = probe.ask(what="canvas", pixels=picture.ravel().tolist(), format=1, **sides)
    assert tuple(answer["picture"]) == official.shape[1:]
    canvas = np.array(answer["pixels"], np.float32).reshape(*answer["canvas"], 3)
    ours = (canvas[: official.shape[1], : official.shape[2]] - MEAN) / DEVIATION
    np.testing.assert_allclose(ours.transpose(2, 0, 1), official, atol=1e-5)


@pytest.mark.parametrize("case", ["random", "tied_scores", "one_label", "threshold"])
def test_boxes_are_selected_as_by_the_official_kernel(probe, case):
    with np.load(OWN / "unit_ml_nms.npz") as golden:
        boxes, scores, labels, keep = (golden[f"{case}_{name}"] for name in ("boxes", "scores", "labels", "keep"))
    answer = probe.ask(
        what="select", boxes=boxes.ravel().tolist(), scores=scores.tolist(), labels=(labels - 1).tolist(),
        thresholds=[0.0] * 3, phrases=["a", "b", "c"], most=len(scores),
    )  # fmt: skip
    found = np.array(answer, np.float32)
    keep = keep[scores[keep] > 0]  # a threshold of 0 leaves out scores of 0
    keep = keep[np.argsort(-scores[keep], kind="stable")]
    assert len(keep) > 50
    np.testing.assert_array_equal(found[:, 4], scores[keep])
    np.testing.assert_array_equal(found[:, 5], labels[keep] - 1)
    scale = np.array([777 / 200, 333 / 100] * 2, np.float32)  # what the program that shows the parts assumes
    np.testing.assert_array_equal(found[:, :4], boxes[keep] * scale)
