"""COCO ids of classes and pictures, and the annotation files they are read from."""

import json

import pytest

from glip_deploy.errors import OptionError, PromptError
from glip_deploy.results.coco import CocoIds, read_coco_names


def test_categories_are_found_without_case_spaces_and_underscores():
    ids = CocoIds({"Person": 1, "traffic_light": 10})
    assert (ids.category_of("person"), ids.category_of(" Traffic  Light")) == (1, 10)
    ids.check(["person", "traffic light"])
    CocoIds().check(["anything"])


def test_a_class_without_a_category():
    ids = CocoIds({"dog": 1})
    for call in (lambda: ids.category_of("person"), lambda: ids.check(["dog", "person"])):
        with pytest.raises(PromptError, match='class "person" is not among the 1 COCO categories'):
            call()


def test_coco_names(tmp_path):
    path = tmp_path / "instances.json"
    data = {
        "images": [{"id": 5, "file_name": "val/a.jpg"}],
        "categories": [{"id": 3, "name": "car"}, {"id": 1, "name": "person"}],
    }
    path.write_text(json.dumps(data))
    assert read_coco_names(path) == ({"car": 3, "person": 1}, {"a.jpg": 5})
    path.write_text(json.dumps(data["categories"]))
    assert read_coco_names(path) == ({"car": 3, "person": 1}, {})


@pytest.mark.parametrize(
    "text",
    ["{", "{}", "[]", "3", '[{"id": 1}]', '{"categories": 5}', "\x00", "[" * 200_000, '[{"name": "x", "id": 1e999}]'],
    ids=range(9),
)
def test_files_without_coco_names_are_refused(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(OptionError, match=r"COCO file .*c\.json .*give an annotation file") as caught:
        read_coco_names(tmp_path / "c.json")
    assert "\n" not in str(caught.value)
