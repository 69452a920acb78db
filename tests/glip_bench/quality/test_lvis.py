"""LVIS: federated classes, frequencies, fixed AP; and GLIP-nano on a small set in its form."""

import json

import pytest
from glip_bench.cli import main
from glip_bench.quality.coco import average_precision, read_set
from glip_bench.quality.lvis import lvis_precision
from parity_data import ROOT
from PIL import Image

from glip_deploy.errors import OptionError

SCENES = ROOT / "tests" / "data" / "nano"
RARE, COMMON, FREQUENT = 2, 5, 9
BOX, FAR = [10, 10, 20, 20], [60, 60, 20, 20]


def lvis_set():
    """Two pictures: in the first a rare thing, in the second all three; the first was searched for common ones too."""
    boxes = [(1, RARE), (2, RARE), (2, COMMON), (2, FREQUENT)]
    return {
        "images": [
            {
                "id": number,
                "coco_url": f"http://images.example.org/val2017/{number}.png",
                "neg_category_ids": [COMMON] if number == 1 else [],
                "not_exhaustive_category_ids": [],
            }
            for number in (1, 2)
        ],
        "categories": [
            {"id": RARE, "name": "abacus", "frequency": "r"},
            {"id": COMMON, "name": "bow_(weapon)", "frequency": "c"},
            {"id": FREQUENT, "name": "bow_(decorative_ribbons)", "frequency": "f"},
        ],
        "annotations": [
            {"id": i, "image_id": image, "category_id": c, "bbox": BOX} for i, (image, c) in enumerate(boxes)
        ],
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "coco" / "val2017").mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (96, 96), (40 * number, 90, 120)).save(tmp_path / "coco" / "val2017" / f"{number}.png")
    return tmp_path


def read(folder, content):
    (folder / "lvis.json").write_text(json.dumps(content))
    return read_set(folder / "lvis.json", folder / "coco")


def rows(*found):
    return [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in found
    ]


RIGHT = [(1, RARE, BOX, 0.9), (2, RARE, BOX, 0.8), (2, COMMON, BOX, 0.5), (2, FREQUENT, BOX, 0.6)]


def test_what_finds_everything_has_100(folder):
    figures = lvis_precision(read(folder, lvis_set()), rows(*RIGHT)).figures
    assert list(figures) == ["AP", "AP50", "AP75", "APr", "APc", "APf", *(f"fixed AP{x}" for x in ("", *"rcf"))]
    assert list(figures.values()) == pytest.approx([100] * 10)


def test_a_class_counts_only_where_it_was_searched_for(folder):
    """A frequent thing in the first picture is passed over: nobody looked. A common one is wrong: it is not there."""
    data = read(folder, lvis_set())
    found = rows(*RIGHT, (1, FREQUENT, FAR, 0.95), (1, COMMON, FAR, 0.95))
    figures = lvis_precision(data, found).figures
    assert (figures["APr"], figures["APf"]) == (pytest.approx(100), pytest.approx(100))
    assert figures["APc"] == pytest.approx(50)
    assert figures["AP"] == pytest.approx(250 / 3)
    assert average_precision(data, found).figures["AP"] == pytest.approx(200 / 3)  # COCO's counts both


def test_what_is_not_annotated_completely_is_passed_over(folder):
    content = lvis_set()
    found = rows(*RIGHT, (2, RARE, FAR, 0.95))
    assert lvis_precision(read(folder, content), found).figures["APr"] < 90
    content["images"][1]["not_exhaustive_category_ids"] = [RARE]
    assert lvis_precision(read(folder, content), found).figures["APr"] == pytest.approx(100)


def test_300_boxes_of_a_picture_count_and_for_fixed_ap_all(folder):
    content = lvis_set()
    content["images"][1]["neg_category_ids"] = [COMMON]
    crowd = [(2, FREQUENT, FAR, 0.9)] * 299
    figures = lvis_precision(read(folder, content), rows(*RIGHT, *crowd)).figures
    assert figures["APc"] == pytest.approx(0) and figures["fixed APc"] == pytest.approx(100)
    assert figures["APr"] == figures["fixed APr"] == pytest.approx(100)


def test_a_frequency_without_classes_has_no_figure(folder):
    content = lvis_set()
    content["annotations"] = content["annotations"][:2]
    precision = lvis_precision(read(folder, content), rows(*RIGHT))
    assert precision.figures["APf"] != precision.figures["APf"] and precision.figures["AP"] == pytest.approx(100)
    assert lvis_precision(read(folder, content), []).figures["APr"] == 0


def test_pictures_are_found_by_the_end_of_their_address_or_by_name(folder):
    data = read(folder, lvis_set())
    assert [picture.file.name for picture in data.pictures] == ["1.png", "2.png"]
    (folder / "lvis.json").write_text(json.dumps(lvis_set()))
    assert read_set(folder / "lvis.json", folder / "coco" / "val2017").pictures[0].file.is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["categories"][1].pop("frequency"), "category 5 has the frequency None; legal"),
        (lambda c: c["categories"][1].update(frequency="x"), "category 5 has the frequency 'x'; legal"),
        (lambda c: c["images"][1].pop("neg_category_ids"), "image 2 has no 'neg_category_ids'"),
        (lambda c: c["images"][0].update(not_exhaustive_category_ids=None), "image 1 has no 'not_exhaustive_cat"),
        (lambda c: c["categories"][1].pop("name"), r"has no 'name' in categories\[1\]"),
        (lambda c: c["annotations"][2].pop("bbox"), r"has no 'bbox' in annotations\[2\]"),
        (lambda c: c["images"][1].pop("coco_url"), r"has no 'file_name' in images\[1\]"),
    ],
)
def test_a_damaged_file_is_one_line(folder, change, said):
    content = lvis_set()
    change(content)
    with pytest.raises(OptionError, match=said) as caught:
        read(folder, content)
    assert "\n" not in str(caught.value)


# -- GLIP-nano --------------------------------------------------------------------------------------------------------


def scenes(count):
    return [row for row in json.loads((SCENES / "scenes.json").read_text()) if row["kind"] == "trained"][:count]


def test_nano_on_a_set_in_lvis_form(nano_bundle, tmp_path, capsys):
    """Names in chunks of four, found in three scenes; a scene's own prompt says what is known to be absent."""
    chosen = scenes(3)
    things = sorted({thing["name"] for scene in chosen for thing in scene["things"]})
    numbers = {name: 10 * i + 1 for i, name in enumerate(things)}
    images, annotations = [], []
    for index, scene in enumerate(chosen, 1):
        there = {thing["name"] for thing in scene["things"]}
        images.append(
            {
                "id": index,
                "file_name": scene["file"],
                "neg_category_ids": [
                    numbers[name] for name in scene["prompt"] if name in numbers and name not in there
                ],
                "not_exhaustive_category_ids": [],
            }
        )
        for thing in scene["things"]:
            x0, y0, x1, y1 = thing["box"]
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append({"image_id": index, "category_id": numbers[thing["name"]], "bbox": box})
    categories = [{"id": numbers[name], "name": name, "frequency": "rcf"[i % 3]} for i, name in enumerate(things)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    command = ["accuracy", str(tmp_path / "lvis.json"), "--images", str(SCENES), "--model", str(nano_bundle)]
    options = [
        "--shortest-side",
        "224",
        "--classes-per-prompt",
        "8",
        "--quiet",
        *("--subjects", "onnxruntime-cpu"),
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert main([*command, *options]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["prompts"] == -(-len(things) // 8)
    figures = result["subjects"]["onnxruntime-cpu"]["figures"]
    assert figures["AP50"] > 70 and figures["AP"] > 40
    assert min(figures[name] for name in ("APr", "APc", "APf", "fixed AP")) > 20
    assert "fixed APr" in capsys.readouterr().out
