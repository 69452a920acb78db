"""Flickr30K Entities in its own files."""

import json
import shutil

import numpy as np
import pytest
from glip_bench.cli import main
from glip_bench.quality.flickr import read_entities
from glip_bench.quality.grounding import recall
from parity_data import ROOT
from PIL import Image

from glip_deploy.errors import OptionError

SENTENCES = (
    "[/EN#0/notvisual It] shows [/EN#3/people/clothing A man] with [/EN#4/clothing a green hat] .",
    "[/EN#0/notvisual It] is outside .",
    "[/EN#4/clothing Hat] and [/EN#4/clothing another hat]",
)
OBJECTS = (("3", (10, 10, 50, 90)), ("4", (20, 5, 40, 20)), ("4", (60, 5, 80, 20)))


def write(folder, number, picture, sentences=SENTENCES, objects=OBJECTS):
    for name in ("Sentences", "Annotations", "images"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "test.txt").write_text(f"{number}\n")
    (folder / "Sentences" / f"{number}.txt").write_text("\n".join(sentences) + "\n")
    rows = "".join(
        f"<object><name>{name}</name><bndbox>"
        + "".join(f"<{edge}>{side}</{edge}>" for edge, side in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for name, box in objects
    )
    nobox = "<object><name>9</name><scene>1</scene><nobndbox>0</nobndbox></object>"
    (folder / "Annotations" / f"{number}.xml").write_text(f"<annotation>{rows}{nobox}</annotation>")
    shutil.copy(picture, folder / "images" / f"{number}.jpg")


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(tmp_path / "p.jpg")
    write(tmp_path, 1000, tmp_path / "p.jpg")
    return tmp_path


def test_sentences_and_boxes(folder):
    """A phrase without boxes is not asked for; a sentence without any other is left out."""
    first, second = read_entities(folder / "test.txt", folder / "images")
    assert first.caption.text == "It shows A man with a green hat ."
    words = [first.caption.text[start:end] for start, end in first.caption.spans]
    assert words == ["A man", "a green hat"]
    assert [boxes.tolist() for boxes in first.boxes] == [[[10, 10, 50, 90]], [[20, 5, 40, 20], [60, 5, 80, 20]]]
    assert first.kinds == (("people", "clothing"), ("clothing",))
    assert second.caption.text == "Hat and another hat" and len(second.boxes) == 2
    assert len(read_entities(folder / "test.txt", folder / "images", limit=1)) == 1


def test_recall_by_kind_and_protocol(folder):
    pictures = read_entities(folder / "test.txt", folder / "images")
    found = {
        "0": {"boxes": [[10, 10, 50, 90], [20, 5, 40, 20]], "scores": [0.9, 0.8], "labels": [0, 1]},
        "1": {"boxes": [[20, 5, 80, 20], [60, 5, 80, 20]], "scores": [0.9, 0.8], "labels": [0, 0]},
    }
    result = recall(pictures, found)
    figures = result["figures"]
    assert (figures["R@1"], figures["R@5"]) == (50, 75)  # the second sentence: wrong first, right second, nothing
    assert (figures["R@1 merged"], figures["R@5 merged"]) == (50, 50)
    assert result["R@1 by kind"] == {"clothing": 50, "people": 100}


def test_nano_grounds_every_phrase(nano_bundle, tmp_path, capsys):
    scenes = ROOT / "tests" / "data" / "nano"
    boxes = [thing["box"] for thing in json.loads((scenes / "caption.json").read_text())["things"]]
    sentence = "[/EN#1/other a red apple] left of [/EN#2/animals two dogs]"
    objects = [("1", boxes[0]), ("2", boxes[1]), ("2", boxes[2])]
    write(tmp_path, 42, scenes / "caption.jpg", [sentence], objects)
    arguments = ["grounding", str(tmp_path / "test.txt"), "--images", str(tmp_path / "images")]
    options = [
        "--model",
        str(nano_bundle),
        "--shortest-side",
        "224",
        "--quiet",
        *("--subjects", "onnxruntime-cpu"),
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert main([*arguments, *options]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    subject = result["subjects"]["onnxruntime-cpu"]
    assert (result["pictures"], result["phrases"]) == (1, 2)
    assert subject["figures"]["R@1"] == 100 and subject["R@1 by kind"] == {"animals": 100, "other": 100}
    assert subject["figures"]["R@10 merged"] == 50  # no box spans both dogs
    assert "R@1 by kind: animals 100.00, other 100.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: (f / "test.txt").unlink(), "test.txt cannot be read"),
        (lambda f: (f / "test.txt").write_text(""), "names no picture with a phrase"),
        (lambda f: (f / "images" / "1000.jpg").unlink(), "1000.jpg is missing"),
        (lambda f: (f / "Sentences" / "1000.txt").unlink(), "1000.txt cannot be read"),
        (lambda f: (f / "Annotations" / "1000.xml").unlink(), "1000.xml cannot be read"),
        (lambda f: (f / "Annotations" / "1000.xml").write_text("<a>"), "is not an annotation"),
        (
            lambda f: (f / "Annotations" / "1000.xml").write_text(
                "<a><object><name>3</name><bndbox><xmin>1</xmin></bndbox></object></a>"
            ),
            "is not an annotation",
        ),
        (lambda f: (f / "Sentences" / "1000.txt").write_text("[/EN#3 A man] ."), "is not marked as"),
        (lambda f: shutil.rmtree(f / "images"), "is not a folder"),
    ],
)
def test_a_damaged_folder_is_one_line(folder, break_it, said):
    break_it(folder)
    with pytest.raises(OptionError, match=said) as caught:
        read_entities(folder / "test.txt", folder / "images")
    assert "\n" not in str(caught.value)
