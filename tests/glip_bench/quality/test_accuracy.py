"""Accuracy on made-up sets, by subjects that know the answer and by the tiny bundle."""

import json

import numpy as np
import pytest
from glip_bench.cli import main
from glip_bench.quality import accuracy
from glip_bench.quality.accuracy import Task, best_boxes, measure, prompts_that_fit
from glip_bench.quality.coco import average_precision, read_set
from glip_bench.subjects.base import Options, SubjectName
from PIL import Image

from glip_deploy import Bundle
from glip_deploy.errors import GlipError
from glip_deploy.results.detections import Detections

NAMES = ("cat", "dog", "bus")


@pytest.fixture
def folder(tmp_path):
    """Three pictures of noise; picture k has one object of class k, and of class 0, at known places."""
    rng = np.random.default_rng(0)
    pictures, rows = [], []
    for k in range(3):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
        pictures.append({"id": 10 + k, "file_name": f"{k}.png"})
        for category, box in ((k, [5 + k, 6, 20, 30]), (0, [40, 10 + k, 25, 25])):
            rows.append({"image_id": 10 + k, "category_id": 7 + category, "bbox": box, "area": box[2] * box[3]})
    content = {
        "images": pictures,
        "annotations": rows,
        "categories": [{"id": 7 + i, "name": name} for i, name in enumerate(NAMES)],
    }
    (tmp_path / "set.json").write_text(json.dumps(content))
    return tmp_path


class Oracle:
    """Finds what the set has; `change` spoils it."""

    def __init__(self, name, folder, change=lambda label, box: (label, box)):
        self.name, self.folder, self.change = name, folder, change
        self.runs, self.stop_after, self.shares_frames = 0, None, False
        content = json.loads((folder / "set.json").read_text())
        self.truth = {}
        for row in content["annotations"]:
            with Image.open(folder / f"{row['image_id'] - 10}.png") as picture:
                key = np.asarray(picture.convert("RGB")).tobytes()
            self.truth.setdefault(key, []).append((NAMES[row["category_id"] - 7], row["bbox"]))

    def prepare(self, prompt):
        self.prompt = prompt

    def run(self, frame):
        if self.stop_after is not None and self.runs >= self.stop_after:
            raise KeyboardInterrupt
        self.runs += 1
        boxes, labels = [], []
        for name, (x, y, w, h) in self.truth[frame.tobytes()]:
            if name in self.prompt:
                label, box = self.change(name, (x, y, x + w - 1, y + h - 1))  # the last pixel is part of it
                if label in self.prompt:
                    boxes.append(box)
                    labels.append(self.prompt.index(label))
        count = len(boxes)
        return Detections(
            np.array(boxes).reshape(-1, 4), np.linspace(0.9, 0.5, count), np.array(labels, int), ["x"] * count
        )

    def run_prompts(self, frame, prompts):
        found = []
        for prompt in prompts:
            self.prepare(prompt)
            found.append(self.run(frame))
        self.groups = [*getattr(self, "groups", []), len(prompts)]
        return found

    def close(self):
        pass


@pytest.fixture
def oracles(folder, monkeypatch):
    subjects = {}

    def stand_in(*pairs):
        for name, change in pairs:
            subjects[SubjectName(name)] = Oracle(SubjectName(name), folder, change)
        monkeypatch.setattr(accuracy, "choose", lambda names, options: (list(subjects), {}))
        monkeypatch.setattr(accuracy, "open_subjects", lambda names, *_: iter([(subjects[names[0]], 0.0)]))
        return subjects

    return stand_in


def task(folder, bundle, **options):
    return Task(Options(bundle), None, folder / "set.json", folder, **options)


def right(label, box):
    return label, box


@pytest.mark.parametrize("at_most", [None, 1, 2])
def test_what_finds_everything_has_100(folder, tiny_bundle, oracles, at_most):
    oracles(("onnxruntime-cpu", right))
    result = measure(task(folder, tiny_bundle, classes_per_prompt=at_most), folder / "work")
    figures = result["subjects"]["onnxruntime-cpu"]["figures"]
    assert figures["AP"] == figures["AP50"] == figures["AR100"] == pytest.approx(100)
    assert result["prompts"] == {None: 1, 1: 3, 2: 2}[at_most] and result["pictures"] == 3


def test_a_subject_that_shares_frames_gets_all_prompts_of_a_picture_at_once(folder, tiny_bundle, oracles):
    (oracle,) = oracles(("onnxruntime-cpu", right)).values()
    oracle.shares_frames = True
    result = measure(task(folder, tiny_bundle, classes_per_prompt=1), folder / "work")
    assert result["subjects"]["onnxruntime-cpu"]["figures"]["AP"] == pytest.approx(100)
    assert oracle.groups == [3, 3, 3]


def test_a_shifted_subject_loses_ap75_and_not_ap50(folder, tiny_bundle, oracles):
    oracles(("torch", right), ("onnxruntime-cpu", lambda label, box: (label, (box[0] + 5, box[1], box[2] + 5, box[3]))))
    subjects = measure(task(folder, tiny_bundle), folder / "work")["subjects"]
    assert subjects["onnxruntime-cpu"]["figures"]["AP50"] == pytest.approx(100)
    assert subjects["onnxruntime-cpu"]["figures"]["AP75"] == pytest.approx(0)
    assert subjects["onnxruntime-cpu"]["difference"]["AP75"] == pytest.approx(-100)
    assert {name for name, *_ in subjects["onnxruntime-cpu"]["losers"]} == set(NAMES)
    assert subjects["torch"]["losers"] == [] and subjects["torch"]["difference"]["AP"] == 0


def test_a_lost_class_is_named(folder, tiny_bundle, oracles):
    oracles(("torch", right), ("onnxruntime-cpu", lambda label, box: ("cat" if label == "bus" else label, box)))
    lost = measure(task(folder, tiny_bundle), folder / "work")["subjects"]["onnxruntime-cpu"]
    assert lost["losers"][0] == ["bus", 100.0, 0.0]
    assert "dog" not in [name for name, *_ in lost["losers"]]


def test_an_interrupted_run_goes_on(folder, tiny_bundle, oracles):
    (oracle,) = oracles(("onnxruntime-cpu", right)).values()
    oracle.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        measure(task(folder, tiny_bundle), folder / "work")
    work = folder / "work" / "onnxruntime-cpu.jsonl"
    work.write_text(work.read_text() + '["12/0", {"bo')  # torn
    oracle.stop_after = None
    result = measure(task(folder, tiny_bundle), folder / "work", resume=True)
    assert oracle.runs == 3 and result["subjects"]["onnxruntime-cpu"]["figures"]["AP"] == pytest.approx(100)
    assert len(work.read_text().splitlines()) == 4
    with pytest.raises(GlipError, match="is of another classes_a_prompt; start anew"):
        measure(task(folder, tiny_bundle, classes_per_prompt=1), folder / "work", resume=True)


def test_a_crowd_is_counted_whole(tiny_bundle, tmp_path, oracles):
    """150 objects in a picture: more than a prompt gives, fewer than two give."""
    rows, truth = {}, []
    for label in range(2):
        boxes = [[10.0 * k, 20.0 * label, 10.0 * k + 7, 20.0 * label + 15] for k in range(75)]
        rows[f"10/{label}"] = {"boxes": boxes, "scores": [0.9] * 75, "labels": [0] * 75}
        truth += [{"image_id": 10, "category_id": 7 + label, "bbox": [*box[:2], 8.0, 16.0]} for box in boxes]
    content = {"images": [{"id": 10, "file_name": "0.png"}], "annotations": truth}
    content["categories"] = [{"id": 7 + i, "name": name} for i, name in enumerate(NAMES[:2])]
    (tmp_path / "crowd.json").write_text(json.dumps(content))
    (tmp_path / "0.png").write_bytes(b"")
    data = read_set(tmp_path / "crowd.json", tmp_path)
    found = best_boxes(data.numbers, [["cat"], ["dog"]], rows, 10)
    assert len(found) == 150 and average_precision(data, found).figures["AP"] == pytest.approx(100)


def test_a_damaged_work_file_is_said(folder, tiny_bundle, oracles):
    oracles(("onnxruntime-cpu", right))
    (folder / "work").mkdir()
    (folder / "work" / "onnxruntime-cpu.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GlipError, match="is damaged; start anew"):
        measure(task(folder, tiny_bundle), folder / "work", resume=True)


def test_an_interruption_says_how_to_go_on(folder, tiny_bundle, oracles, capsys):
    (oracle,) = oracles(("onnxruntime-cpu", right)).values()
    oracle.stop_after = 1
    file = folder / "result.json"
    arguments = ["accuracy", str(folder / "set.json"), "--images", str(folder), "--model", str(tiny_bundle)]
    assert main([*arguments, "--quiet", "--json", str(file)]) == 130
    assert f"kept beside {file}, --resume continues" in capsys.readouterr().err
    oracle.stop_after = None
    assert main([*arguments, "--quiet", "--json", str(file), "--resume"]) == 0
    assert oracle.runs == 3 and file.is_file() and not file.with_name("result.json.work").exists()


def test_prompts_are_cut_where_tokens_end(tiny_bundle):
    tokenizer = Bundle.open(tiny_bundle).tokenizer()
    names = [f"{a} {b}" for a in "abcdefgh" for b in "ijklmnop"]
    prompts = prompts_that_fit(names, tokenizer, 32)
    assert [name for prompt in prompts for name in prompt] == names
    assert {len(prompt) for prompt in prompts[:-1]} == {10}  # 2 + 10 * 2 words + 9 dots = 31
    with pytest.raises(GlipError, match="32"):
        prompts_that_fit(["a " * 40], tokenizer, 32)


def test_nothing_found_is_0(folder):
    precision = average_precision(read_set(folder / "set.json", folder), [])
    assert precision.figures["AP"] == 0 and set(precision.by_class) == set(NAMES)


def test_the_tiny_bundle_end_to_end(folder, tiny_bundle, tiny_checkpoint, capsys):
    arguments = ["--model", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--shortest-side", "64", "--quiet"]
    file = folder / "result.json"
    subjects = ["--subjects", "torch,onnxruntime-cpu"]
    extra = ["--images", str(folder), "--json", str(file)]
    assert main(["accuracy", str(folder / "set.json"), *arguments, *subjects, *extra]) == 0
    result = json.loads(file.read_text())
    assert result["kind"] == "accuracy" and list(result["subjects"]) == ["torch", "onnxruntime-cpu"]
    assert abs(result["subjects"]["onnxruntime-cpu"]["difference"]["AP"]) <= 0.1
    assert "less torch" in capsys.readouterr().out
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".png", ".png", ".png"]


def spoil(change):
    def apply(folder):
        content = json.loads((folder / "set.json").read_text())
        change(content)
        (folder / "set.json").write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: (f / "set.json").unlink(), "cannot be read"),
        (lambda f: (f / "set.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "set.json").write_text("[]"), "holds a list"),
        (lambda f: (f / "0.png").unlink(), "0.png is missing"),
        (lambda f: (f / "0.png").write_text("no"), "0.png"),
        (spoil(lambda c: c.pop("categories")), "has no 'categories'"),
        (spoil(lambda c: c.update(categories=[])), "0 categories and 3 images"),
        (spoil(lambda c: c.update(images=[])), "3 categories and 0 images"),
        (spoil(lambda c: c["categories"][1].update(name="cat")), "names a category twice"),
        (spoil(lambda c: c["categories"][1].update(name=" ")), "is empty"),
        (spoil(lambda c: c["categories"][1].update(id=float("inf"))), "not a COCO-format detection set"),
        (spoil(lambda c: c["images"][1].update(id=10)), "several images one id"),
        (spoil(lambda c: c.update(annotations=[])), "has no annotations of its 3 pictures"),
        (spoil(lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 3])), "annotation 1 has the box"),
        (spoil(lambda c: c["annotations"][0].update(bbox=[1, 2])), "not a COCO-format detection set"),
        (spoil(lambda c: c["annotations"][0].update(category_id=99)), "category 99, which it does not list"),
    ],
)
def test_a_bad_set_is_one_line(folder, tiny_bundle, capsys, break_it, said):
    break_it(folder)
    arguments = ["--model", str(tiny_bundle), "--shortest-side", "64", "--quiet"]
    assert main(["accuracy", str(folder / "set.json"), *arguments, "--images", str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glip-bench: error: ") and said in line


def test_the_pictures_must_be_named(folder, tiny_bundle, capsys):
    arguments = ["accuracy", str(folder / "set.json"), "--model", str(tiny_bundle), "--quiet"]
    assert main(arguments) == 2 and "--images" in capsys.readouterr().err
    assert main([*arguments, "--images", "nowhere"]) == 1 and "is not a folder" in capsys.readouterr().err


# -- results that are there already -----------------------------------------------------------------------------------


def judged(folder, rows, *options):
    (folder / "found.json").write_text(json.dumps(rows))
    return main(["accuracy", str(folder / "set.json"), "--predictions", str(folder / "found.json"), *options])


def right_rows(folder):
    rows = json.loads((folder / "set.json").read_text())["annotations"]
    return [{**{key: row[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9} for row in rows]


def test_results_of_another_tool_are_judged(folder, capsys):
    assert judged(folder, right_rows(folder), "--json", str(folder / "r.json")) == 0
    result = json.loads((folder / "r.json").read_text())
    assert result["subjects"]["predictions"]["figures"]["AP"] == pytest.approx(100)
    assert "found.json on set.json: 3 pictures\n" in capsys.readouterr().out
    assert judged(folder, right_rows(folder)[:3]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_id": 99}, "result 1, is of image 99, which the set does not have"),
        ({"category_id": 99}, "result 1, is of category 99, which the set does not have"),
        ({"bbox": [1, 2]}, "result 1: not enough values"),
        ({"score": None}, "result 1: float()"),
        ({"score": float("nan")}, "result 1: a number is not finite"),
    ],
)
def test_results_that_do_not_belong_to_the_set_are_one_line(folder, capsys, change, said):
    rows = right_rows(folder)
    rows[1].update(change)
    assert judged(folder, rows) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glip-bench: error: ") and said in line


def test_results_need_no_run(folder, tiny_bundle, capsys):
    assert judged(folder, {}) == 1 and "holds a dict" in capsys.readouterr().err
    assert judged(folder, [{}]) == 1 and "'bbox' is missing" in capsys.readouterr().err
    assert judged(folder, right_rows(folder), "--model", str(tiny_bundle)) == 2
    assert "--model: has no use beside --predictions" in capsys.readouterr().err
