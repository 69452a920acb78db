"""What is asked for in place of the names of a set's classes."""

import json

import pytest
from glip_bench.cli import main
from glip_bench.quality.custom_prompts import read_custom_prompts
from parity_data import ROOT

from glip_deploy import ClassName
from glip_deploy.errors import OptionError

CATEGORIES = ((7, "pothole"), (2, "car"))


def prompts(tmp_path, text):
    (tmp_path / "prompts.yaml").write_text(text)
    return read_custom_prompts(tmp_path / "prompts.yaml", CATEGORIES)


def test_some_classes_get_other_words(tmp_path):
    asked = prompts(tmp_path, 'pothole: {prefix: "there are some ", name: holes, suffix: " on the road"}\n')
    assert asked == {"pothole": ClassName("holes", "there are some ", " on the road"), "car": "car"}
    asked = prompts(tmp_path, "car: automobile\npothole: {suffix: ', which is round'}\n")
    assert asked == {"pothole": ClassName("pothole", suffix=", which is round"), "car": "automobile"}


def test_a_configuration_of_the_official_code(tmp_path):
    """Lists in strings, as they are there; CAPTION_PROMPT goes by the order of ids, and counts before the names."""
    override = (
        """  OVERRIDE_CATEGORY: '[{"id": 2, "name": "auto", "supercategory": "x"},\n    {"id": 7, "name": "hole"}]'\n"""
    )
    other = "MODEL: {ATSS: {NUM_CLASSES: 3}}\nDATASETS:\n  GENERAL_COPY: 16\n"
    assert prompts(tmp_path, other + override) == {"pothole": "hole", "car": "auto"}
    caption = (
        """  CAPTION_PROMPT: '[{"prefix": "a ", "name": "van", "suffix": ""},\n    {"name": "pit", "suffix": "!"}]'\n"""
    )
    expected = {"pothole": ClassName("pit", suffix="!"), "car": ClassName("van", "a ")}
    assert prompts(tmp_path, other + override + caption) == expected
    assert prompts(tmp_path, other + "  CAPTION_PROMPT: [{name: van}, {name: pit}]\n")["car"] == ClassName("van")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bus: omnibus\n", "names the class 'bus', which the set does not have; it has pothole, car"),
        ("car: 3\n", "is 3; a text, or prefix, name and suffix"),
        ("car: {nmae: van}\n", "prefix, name and suffix are needed"),
        ("car: {name: 3}\n", "put them in quotes"),
        ("- car\n", "holds a list"),
        ("", "holds a NoneType"),
        ("a: [b\n", "is not YAML"),
        ("DATASETS: {TEST: x}\n", "neither CAPTION_PROMPT nor OVERRIDE_CATEGORY"),
        ("DATASETS: {CAPTION_PROMPT: [{name: van}]}\n", "has 1 entries for the 2 categories"),
        ("DATASETS: {CAPTION_PROMPT: 3}\n", "CAPTION_PROMPT is a int"),
        ("DATASETS: {OVERRIDE_CATEGORY: [{id: 4, name: van}]}\n", "names the category 4, which the set does not have"),
        ("DATASETS: {OVERRIDE_CATEGORY: [{id: 2}]}\n", "an id and a name are needed"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, said):
    with pytest.raises(OptionError, match=said) as caught:
        prompts(tmp_path, text)
    assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match="cannot be read"):
        read_custom_prompts(tmp_path / "nowhere.yaml", CATEGORIES)


def test_nano_finds_classes_by_other_words(nano_bundle, tmp_path):
    """The set calls apples dogs and dogs apples; the prompts say what they are."""
    folder = ROOT / "tests" / "data" / "nano"
    scene = json.loads((folder / "caption.json").read_text())
    numbers = {"red apple": 4, "dog": 3}
    boxes = [(thing["name"], thing["box"]) for thing in scene["things"]]
    content = {
        "images": [{"id": 1, "file_name": scene["file"]}],
        "categories": [{"id": 4, "name": "dog"}, {"id": 3, "name": "red apple"}],
        "annotations": [
            {"image_id": 1, "category_id": numbers[name], "bbox": [x0, y0, x1 - x0 + 1, y1 - y0 + 1]}
            for name, (x0, y0, x1, y1) in boxes
        ],
    }
    (tmp_path / "set.json").write_text(json.dumps(content))
    (tmp_path / "p.yaml").write_text(
        'DATASETS:\n  CAPTION_PROMPT: \'[{"prefix": "two ", "name": "dogs", "suffix": ""},\n'
        '    {"prefix": "a ", "name": "red apple", "suffix": ""}]\'\n'
    )
    command = ["accuracy", str(tmp_path / "set.json"), "--images", str(folder), "--model", str(nano_bundle)]
    options = [
        "--shortest-side",
        "224",
        "--quiet",
        *("--subjects", "onnxruntime-cpu"),
        "--json",
        str(tmp_path / "r.json"),
    ]
    figures = []
    for extra in ([], ["--prompts", str(tmp_path / "p.yaml")]):
        assert main([*command, *options, *extra]) == 0
        figures.append(json.loads((tmp_path / "r.json").read_text())["subjects"]["onnxruntime-cpu"]["figures"]["AP50"])
    assert figures == pytest.approx([0, 100], abs=1)
