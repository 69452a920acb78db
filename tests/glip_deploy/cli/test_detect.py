"""`glip-detect`: what is written to which stream, exit statuses, and messages."""

import inspect
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from glip_deploy.cli import detect as cli
from glip_deploy.detector import Detector
from glip_deploy.errors import GlipError
from glip_deploy.prompts.syntax import mark
from glip_deploy.results.detections import Detections


class FakeDetector:
    """Finds the first class of the prompt in the left half of every picture."""

    opened = None
    closed = False

    @classmethod
    def open(
        cls,
        path,
        *,
        backend="onnxruntime",
        precision=None,
        engines=None,
        shortest_side=800,
        longest_side=1333,
        resize="exact",
        threads=None,
        cache_dir="the default",
        verify=True,
        trusted=True,
        plugins=True,
    ):
        cls.opened = {key: value for key, value in locals().items() if key != "cls"}
        if "broken" in str(path):
            raise GlipError(f"bundle {path} is broken; export it again")
        return cls()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        type(self).closed = True

    def encode(self, text, *, phrases="auto", classes_per_prompt=None):
        type(self).classes_per_prompt = classes_per_prompt
        return types.SimpleNamespace(phrases=mark(text, phrases).phrases)

    def detect_prompts(self, frame, prompts, threshold=0.5, *, color, max_detections=None, timings=None):
        found = [self.detect(frame, *pair, color=color) for pair in zip(prompts, threshold, strict=True)]
        type(self).thresholds = threshold
        return found

    def detect(self, frame, prompt, threshold=0.5, *, color, max_detections=None, timings=None):
        assert color == "rgb" and frame.dtype == np.uint8
        type(self).thresholds, type(self).max_detections = threshold, max_detections
        height, width = frame.shape[:2]
        return Detections(
            boxes=np.array([[0, 0, width / 2, height - 1]], np.float32),
            scores=np.array([0.75], np.float32),
            labels=np.array([0]),
            phrases=[prompt.phrases[0]],
        )


@pytest.fixture
def detector(monkeypatch):
    fake = type("Detector", (FakeDetector,), {})
    monkeypatch.setattr("glip_deploy.detector.Detector", fake)
    return fake


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a picture, three pictures in a folder, and a video of 12 frames."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "photos/1.png", "photos/2.png", "photos/10.jpg"):
        Image.new("RGB", (40, 30), (90, 120, 150)).save(tmp_path / name)
    write_video(tmp_path / "v.mp4")
    return tmp_path


def write_video(path, frames=12):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"bf": "0"}
        for i in range(frames):
            image = np.full((48, 64, 3), 20 * (i % 12), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def frames_in(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def detect(*args, prompt=("--prompt", "person. traffic light")):
    return cli.main(["--model", "bundle", *prompt, *args])


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


# --- without a bundle, as a process ---------------------------------------------------------------------------


def run_process(*args, **options):
    command = [sys.executable, "-m", "glip_deploy.cli.detect", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


def test_help_has_examples_and_imports_nothing_heavy():
    program = textwrap.dedent("""
        import sys
        from glip_deploy.cli import detect as cli
        assert cli.main(["--help"]) == 0
        heavy = {"onnxruntime", "av", "tqdm", "PIL", "tokenizers", "torch", "onnx"} & set(sys.modules)
        sys.exit(f"imported {heavy}" if heavy else 0)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    panels = ("What to look for", "Where to look", "What to write", "How to run")
    for word in ("examples:", "--class-threshold", "rtsp://", "exit status", "a man with a [green hat]", *panels):
        assert word in done.stdout


def test_version():
    done = run_process("--version")
    assert done.returncode == 0 and done.stdout.startswith("glip-detect 0.")


REQUIRED = ["--model", "m", "--source", "s"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--source", "s", "--prompt", "x"], "--model"),
        (["--model", "m", "--prompt", "x"], "--source"),
        (REQUIRED, "one of the arguments --prompt --prompt-file --class --classes is required"),
        ([*REQUIRED, "--prompt", "x", "--class", "y"], "not allowed with argument"),
        ([*REQUIRED, "--classes", "x", "--class", "y"], "not allowed with argument"),
        ([*REQUIRED, "--prompt", "x", "--threshold", "1.5"], "--threshold: '1.5' is not a number in [0, 1]"),
        ([*REQUIRED, "--prompt", "x", "--threshold", "nan"], "'nan' is not a number in [0, 1]"),
        ([*REQUIRED, "--prompt", "x", "--threshold", "much"], "'much' is not a number in [0, 1]"),
        ([*REQUIRED, "--prompt", "x", "--stride", "0"], "--stride: '0' is not a whole number of at least 1"),
        ([*REQUIRED, "--prompt", "x", "--max-frames", "-3"], "'-3' is not a whole number of at least 1"),
        ([*REQUIRED, "--prompt", "x", "--longest-side", "-1"], "whole number of at least 0"),
        ([*REQUIRED, "--prompt", "x", "--timeout", "0"], "'0' is not a number of seconds above 0"),
        ([*REQUIRED, "--prompt", "x", "--class-threshold", "x"], "'x' is not NAME=VALUE"),
        ([*REQUIRED, "--prompt", "x", "--class-threshold", "x=2"], "'2' is not a number in [0, 1]"),
        ([*REQUIRED, "--prompt", "x", "--class-threshold", "y=0.2"], '"y" is not in the prompt; its classes: x'),
        ([*REQUIRED, "--prompt", "x", "--coco-categories", "c"], "--coco-categories: needs --coco"),
        ([*REQUIRED, "--prompt", "x", "--resize", "best"], "--resize: 'best' is not one of 'exact', 'fast'"),
        ([*REQUIRED, "--prompt", "x", "--phrases", "all"], "--phrases: 'all' is not one of 'auto', 'whole', 'dots'"),
        ([*REQUIRED, "--class", "x", "--phrases", "whole"], "--phrases: needs --prompt or --prompt-file"),
        ([*REQUIRED, "--prompt", "x", "--classes-per-prompt", "40"], "use it with --classes, --class or --prompt-file"),
        ([*REQUIRED, "--class", "x", "--classes-per-prompt", "0"], "whole number of at least 1"),
        ([*REQUIRED, "--class", "x", "--max-detections", "0"], "whole number of at least 1"),
        ([*REQUIRED, "--prompt", "x", "--no-cache", "--cache-dir", "d"], "not allowed with argument"),
    ],
)
def test_bad_usage_is_status_2_and_says_what_is_legal(args, message, capsys):
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert message in err and out == ""
    assert err.startswith("glip-detect: error: ") and err.count("\n") == 1


def test_an_error_is_one_line_status_1_and_no_traceback(tmp_path):
    done = run_process("--model", "m", "--prompt", "x", "--source", "nothing.jpg", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("glip-detect: error: source nothing.jpg does not exist")
    assert done.stderr.count("\n") == 1


# --- with a fake detector -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["open", "encode", "detect", "detect_prompts"])
def test_the_fake_takes_what_the_real_detector_takes(method):
    real, fake = (inspect.signature(getattr(kind, method)).parameters for kind in (Detector, FakeDetector))
    assert list(fake) == list(real)
    assert {name for name in fake if fake[name].kind is inspect.Parameter.KEYWORD_ONLY} == {
        name for name in real if real[name].kind is inspect.Parameter.KEYWORD_ONLY
    }


def test_json_lines_go_to_standard_output_if_no_output_is_named(here, detector, capsys):
    assert detect("--source", "a.jpg") == 0
    assert detector.closed
    out, err = capsys.readouterr()
    (line,) = lines_of(out)
    assert line == {
        "source": "a.jpg",
        "frame": 0,
        "width": 40,
        "height": 30,
        "detections": [
            {"score": 0.75, "label": "person", "box": {"xmin": 0.0, "ymin": 0.0, "xmax": 20.0, "ymax": 29.0}}
        ],
    }
    assert err.startswith("glip-detect: 1 frame, 1 detections in ") and "fps" in err and "detect" in err


def test_a_picture(here, detector, capsys):
    assert detect("--source", "a.jpg", "--output", "out.png") == 0
    with Image.open("out.png") as picture:
        assert picture.size == (40, 30) and picture.format == "PNG"
    assert capsys.readouterr().out == ""


def test_a_folder_with_all_kinds_of_output(here, detector, capsys):
    options = ["--output", "new/folder", "--json", "o.jsonl", "--coco", "o.json", "--quiet"]
    assert detect("--source", "photos", *options) == 0
    assert names_in("new/folder") == ["1.png", "10.jpg", "2.png"]
    lines = lines_of(Path("o.jsonl").read_text())
    assert [Path(line["source"]).name for line in lines] == ["1.png", "2.png", "10.jpg"]
    assert [entry["image_id"] for entry in json.loads(Path("o.json").read_text())] == [1, 2, 10]
    assert capsys.readouterr() == ("", "")


def test_a_video(here, detector):
    assert detect("--source", "v.mp4", "--output", "o.mp4", "--stride", "3", "--max-frames", "3") == 0
    assert frames_in("o.mp4") == 3
    assert names_in(".") == ["a.jpg", "o.mp4", "photos", "v.mp4"]


def test_a_video_into_a_folder_keeps_its_name(here, detector):
    assert detect("--source", "v.mp4", "--output", "out/") == 0
    assert names_in("out") == ["v.mp4"]
    assert frames_in("out/v.mp4") == 12


def test_unreadable_pictures_are_reported_and_the_rest_is_done(here, detector, capsys):
    (here / "photos" / "3.png").write_bytes(b"junk")
    assert detect("--source", "photos", "--json", "-") == 0
    out, err = capsys.readouterr()
    assert [line["frame"] for line in lines_of(out)] == [0, 1, 3]
    assert "glip-detect: warning: picture 2: " in err and "(1 unreadable)" in err


def test_options_reach_the_detector(here, detector, capsys):
    assert detect("--source", "a.jpg") == 0
    assert detector.opened == {
        "path": "bundle",
        "backend": "onnxruntime",
        "precision": None,
        "engines": None,
        "shortest_side": 800,
        "longest_side": 1333,
        "resize": None,
        "threads": None,
        "cache_dir": "the default",
        "verify": True,
        "trusted": True,
        "plugins": True,
    }
    options = "--shortest-side 480 --longest-side 0 --resize fast --threads 2 --no-verify --cache-dir c"
    options += " --backend x --precision bf16 --engines e --untrusted --no-plugins"
    assert detect("--source", "a.jpg", *options.split()) == 0
    assert detector.opened == {
        "path": "bundle",
        "backend": "x",
        "precision": "bf16",
        "engines": "e",
        "shortest_side": 480,
        "longest_side": None,
        "resize": "fast",
        "threads": 2,
        "cache_dir": "c",
        "verify": False,
        "trusted": False,
        "plugins": False,
    }
    assert detect("--source", "a.jpg", "--no-cache") == 0
    assert detector.opened["cache_dir"] is None


def test_several_prompts_give_a_line_each(here, detector, capsys):
    prompts = ("--prompt", "person. dog", "--prompt", "a [red car]")
    options = ["--class-threshold", "dog=0.3", "--json", "-", "--coco", "o.json", "--output", "o.png"]
    assert detect("--source", "a.jpg", *options, prompt=prompts) == 0
    first, second = lines_of(capsys.readouterr().out)
    assert (first["prompt"], second["prompt"]) == ("person. dog", "a [red car]")
    assert first["frame"] == second["frame"] == 0
    assert [one["label"] for one in first["detections"]] == ["person"]
    assert [one["label"] for one in second["detections"]] == ["red car"]
    assert list(detector.thresholds) == [[0.5, 0.3], [0.5]]
    # Everything else sees one list of classes: person, dog, red car.
    assert [entry["category_id"] for entry in json.loads(Path("o.json").read_text())] == [1, 3]
    assert Path("o.png").is_file()
    assert detect("--source", "a.jpg", "--json", "-", prompt=("--prompt", "person")) == 0
    assert "prompt" not in lines_of(capsys.readouterr().out)[0]


class Moves(FakeDetector):
    """Finds the first class, further right with every frame (whose brightness is its number)."""

    def detect(self, frame, prompt, threshold=0.5, *, color, max_detections=None, timings=None):
        left = 2 * round(frame.mean() / 20)
        return Detections(
            np.array([[left, 4, left + 20, 24], [0, 30, 10, 40]], np.float32),
            np.array([0.75, 0.3], np.float32),
            np.array([0, 1]),
            list(prompt.phrases[:2]),
        )


def test_tracks_are_in_every_output(here, monkeypatch, capsys):
    pytest.importorskip("trackers", reason="trackers (extra track) is not installed", exc_type=ImportError)
    monkeypatch.setattr("glip_deploy.detector.Detector", Moves)
    options = ["--source", "v.mp4", "--json", "o.jsonl", "--coco", "o.json", "--output", "o.mp4"]
    assert detect(*options) == 0
    plain = lines_of(Path("o.jsonl").read_text())
    assert not any("track" in one for line in plain for one in line["detections"])
    assert "tracks" not in capsys.readouterr().err
    assert detect(*options, "--track") == 0
    lines = lines_of(Path("o.jsonl").read_text())
    assert [[one.pop("track", None) for one in line["detections"]] for line in lines] == [[None], *[[1]] * 11]
    for line, before in zip(lines, plain, strict=True):  # the fake gives weak boxes too, the real one only on request
        assert line["detections"] == before["detections"][:1]
    assert [row.get("track_id") for row in json.loads(Path("o.json").read_text())] == [None, *[1] * 11]
    assert frames_in("o.mp4") == 12
    assert "12 detections, 1 tracks in" in capsys.readouterr().err


def test_pictures_are_not_tracked(here, detector, capsys):
    for source, what in (("photos", "pictures"), ("a.jpg", "a picture")):
        assert detect("--source", source, "--track", "--output", "out/") == 1
        out, err = capsys.readouterr()
        assert out == "" and err == (
            f"glip-detect: error: tracking follows objects through a video, but source {source} is {what};"
            " leave it out (--track), or give a video, a camera or a stream\n"
        )
    assert detector.opened is None and not Path("out").exists()


def test_tracking_without_its_package(here):
    """As a process: the message comes before the bundle is opened."""
    program = (
        "import sys; sys.modules['trackers'] = None\n"
        "from glip_deploy.cli.detect import main\n"
        "sys.exit(main(['--model', 'm', '--prompt', 'x', '--source', 'v.mp4', '--track']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "glip-detect: error: tracking needs the package trackers, which is not installed;"
        " pip install 'glip-deploy[track]'\n"
    )


def test_lists_of_classes_may_be_divided_and_more_detections_kept(here, detector):
    options = ["--source", "a.jpg", "--classes-per-prompt", "40", "--max-detections", "300"]
    assert detect(*options, prompt=("--classes", "person,dog")) == 0
    assert (detector.classes_per_prompt, detector.max_detections) == (40, 300)


def test_thresholds_by_class(here, detector, capsys):
    options = ["--threshold", "0.4", "--class-threshold", "Traffic_Light=0.2"]
    assert detect("--source", "a.jpg", *options) == 0
    assert list(detector.thresholds) == [0.4, 0.2]


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        (("--prompt", "a man with a [green hat]"), "green hat"),
        (("--class", "sports ball", "--class", "dog"), "sports ball"),
        (("--classes", "cat, dog"), "cat"),
        (("--prompt-file", "p.txt"), "zebra"),
    ],
)
def test_every_way_to_give_a_prompt(here, detector, capsys, prompt, label):
    (here / "p.txt").write_text("zebra\n")
    assert detect("--source", "a.jpg", prompt=prompt) == 0
    (line,) = lines_of(capsys.readouterr().out)
    assert line["detections"][0]["label"] == label


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        (["A dog runs. A cat sleeps."], ["A dog runs", "A cat sleeps"]),
        (["A dog runs. A cat sleeps.", "--phrases", "whole"], ["A dog", "A cat"]),
        (["A dog chases a cat."], ["A dog", "a cat"]),
        (["A dog chases a cat.", "--phrases", "auto"], ["A dog", "a cat"]),
        (["A dog chases a cat.", "--phrases", "dots"], ["A dog chases a cat"]),
    ],
)
def test_phrases_of_a_caption(here, detector, capsys, prompt, phrases):
    thresholds = [option for phrase in phrases for option in ("--class-threshold", f"{phrase}=0.25")]
    assert detect("--source", "a.jpg", *thresholds, prompt=("--prompt", *prompt)) == 0
    (line,) = lines_of(capsys.readouterr().out)
    assert line["detections"][0]["label"] == phrases[0]
    assert detector.thresholds == [0.25] * len(phrases)


def test_a_caption_without_a_noun_is_one_line(here, detector, capsys):
    assert detect("--source", "a.jpg", prompt=("--prompt", "is walking across")) == 1
    error = capsys.readouterr().err
    assert error.startswith("glip-detect: error: no noun is found in 'is walking across'") and error.count("\n") == 1


def test_coco_names(here, detector, capsys):
    data = {
        "images": [{"id": 9, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "Person"}, {"id": 10, "name": "traffic light"}],
    }
    Path("c.json").write_text(json.dumps(data))
    assert detect("--source", "a.jpg", "--coco", "o.json", "--coco-categories", "c.json") == 0
    (entry,) = json.loads(Path("o.json").read_text())
    assert (entry["image_id"], entry["category_id"]) == (9, 1)
    prompt = ("--prompt", "unicorn")
    assert detect("--source", "a.jpg", "--coco", "o.json", "--coco-categories", "c.json", prompt=prompt) == 1
    assert 'class "unicorn" is not among the 2 COCO categories' in capsys.readouterr().err


def test_yolo_labels(here, detector, capsys):
    """The fake finds the first class in the left half of every picture."""
    assert detect("--source", "photos", "--yolo", "set", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert names_in("set") == ["classes.txt", "labels"] and names_in("set/labels") == ["1.txt", "10.txt", "2.txt"]
    assert Path("set/classes.txt").read_text() == "person\ntraffic light\n"
    label, *shares = Path("set/labels/10.txt").read_text().split()
    assert label == "0" and [float(share) for share in shares] == pytest.approx([0.25, 0.5, 0.5, 1], abs=0.04)


def test_label_studio_tasks(here, detector, capsys):
    (here / "photos" / "1.png").rename(here / "photos" / "1 of ä.png")
    assert detect("--source", "photos", "--label-studio", "tasks.json", "--quiet") == 0
    assert capsys.readouterr().out == ""
    tasks = json.loads(Path("tasks.json").read_text())
    places = [task["data"]["image"] for task in tasks]
    assert places[0] == "/data/local-files/?d=photos/1%20of%20%C3%A4.png"
    assert places[1:] == ["/data/local-files/?d=photos/2.png", "/data/local-files/?d=photos/10.jpg"]
    (prediction,) = tasks[0]["predictions"]
    assert prediction["model_version"] == "bundle"
    (region,) = prediction["result"]
    assert region["value"]["rectanglelabels"] == ["person"] and region["value"]["width"] == pytest.approx(50, abs=3)


def test_a_single_pictures_task_names_its_folder(here, detector):
    assert detect("--source", "photos/2.png", "--label-studio", "tasks.json", "--quiet") == 0
    (task,) = json.loads(Path("tasks.json").read_text())
    assert task["data"]["image"] == "/data/local-files/?d=photos/2.png"


def test_pictures_that_would_share_a_label_file(here, detector, capsys):
    (here / "photos" / "2.jpg").write_bytes((here / "a.jpg").read_bytes())
    assert detect("--source", "photos", "--yolo", "set") == 1
    assert "photos/2.jpg and photos/2.png would have the same label file" in capsys.readouterr().err
    assert not Path("set").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--source", "photos", "--output", "o.jpg"], "--output o.jpg is one file, but source photos holds 3"),
        (["--source", "a.jpg", "--output", "o.mp4"], "is a video, but source a.jpg is a picture"),
        (["--source", "a.jpg", "--output", "o.bmp"], "does not end in"),
        (["--source", "v.mp4", "--output", "o.jpg"], "cannot hold source v.mp4, a video"),
        (["--source", "v.mp4", "--output", "v.mp4"], "is the source itself"),
        (["--source", "a.jpg", "--output", "./a.jpg"], "is the source itself"),
        (["--source", "photos", "--output", "photos"], "is the folder of the source itself"),
        (["--source", "v.mp4", "--output", "."], "is the source itself"),
        (["--source", "a.jpg", "--output", "no/o.jpg"], "folder no does not exist"),
        (["--source", "v.mp4", "--json", "v.mp4"], "is the source itself"),
        (["--source", "v.mp4", "--coco", "./v.mp4"], "is the source itself"),
        (["--source", "a.jpg", "--coco", "a.jpg"], "is the source itself"),
        (["--source", "photos", "--json", "photos/2.png"], "is the source itself"),
        (["--source", "photos/*", "--coco", "photos/2.png"], "is the source itself"),
        (["--source", "a.jpg", "--json", "o", "--coco", "./o"], "is named twice"),
        (["--source", "a.jpg", "--json", "o.png", "--output", "o.png"], "is named twice"),
        (["--source", "v.mp4", "--coco", "o.mp4", "--output", "o.mp4"], "is named twice"),
        (["--source", "photos", "--json", "out/2.png", "--output", "out"], "is named twice"),
        (["--source", "a.jpg", "--coco", "c.json", "--coco-categories", "c.json"], "is the file of COCO categories"),
        (["--source", "a.jpg", "--json", "bundle/manifest.json"], "is a file of the bundle"),
        (["--source", "a.jpg", "--json", "n" * 300], "cannot be written (File name too long)"),
        (["--source", "a.jpg", "--coco", "n" * 300], "cannot be written (File name too long)"),
        (["--source", "a.jpg", "--output", "n" * 300], "cannot be written (File name too long)"),
        (["--source", "v.mp4", "--output", "n" * 300 + ".mp4"], "cannot be written (File name too long)"),
        (["--source", "n" * 300], "cannot be read (File name too long)"),
        (["--source", "a.jpg", "--json", "no/o.jsonl"], "folder no does not exist"),
        (["--source", "a.jpg", "--coco", "photos"], "is a folder"),
        (["--source", "a.jpg", "--coco", "o.json", "--coco-categories", "a.jpg"], "COCO file a.jpg"),
        (["--source", "a.txt"], "source a.txt does not exist"),
        (["--source", "v.mp4", "--yolo", "o"], "--yolo labels pictures, but source v.mp4 is a video"),
        (["--source", "v.mp4", "--label-studio", "o.json"], "--label-studio labels pictures, but source v.mp4 is a"),
        (["--source", "a.jpg", "--label-studio", "a.jpg"], "is the source itself"),
        (["--source", "a.jpg", "--label-studio", "no/o.json"], "folder no does not exist"),
        (["--source", "a.jpg", "--label-studio", "o", "--json", "o"], "is named twice"),
        (["--source", "a.jpg", "--yolo", "c.json"], "c.json is a file"),
        (["--source", "a.jpg", "--yolo", "out", "--json", "out/classes.txt"], "is named twice"),
        (["--source", "photos", "--yolo", "n" * 300], "File name too long"),
    ],
)
def test_wrong_outputs_are_found_before_the_model_is_loaded(here, detector, capsys, args, message):
    (here / "out").mkdir()
    (here / "bundle").mkdir()
    (here / "bundle" / "manifest.json").write_text("{}")
    (here / "c.json").write_text('[{"id": 1, "name": "person"}, {"id": 2, "name": "traffic light"}]')
    before = contents(here)
    assert detect(*args) == 1
    out, err = capsys.readouterr()
    assert message in err and err.startswith("glip-detect: error: ") and err.count("\n") == 1 and out == ""
    assert detector.opened is None
    assert contents(here) == before


def test_a_prompt_file_is_not_overwritten(here, detector, capsys):
    (here / "p.txt").write_text("zebra")
    assert detect("--source", "a.jpg", "--json", "p.txt", prompt=("--prompt-file", "p.txt")) == 1
    assert "output p.txt is the prompt file and would be overwritten" in capsys.readouterr().err
    assert (here / "p.txt").read_text() == "zebra"


def test_a_bundle_name_that_is_too_long_is_one_line(here, capsys):
    assert cli.main(["--model", "n" * 300, "--prompt", "x", "--source", "a.jpg"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("glip-detect: error: ") and "File name too long" in err and err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows allows no colon in a file name")
def test_names_with_a_colon_are_files(here, detector):
    Path("v.mp4").rename("2026-11-24T12:30:05.mp4")
    assert detect("--source", "2026-11-24T12:30:05.mp4", "--output", "12:30.mp4", "--quiet") == 0
    assert frames_in("file:12:30.mp4") == 12


def test_a_broken_bundle_leaves_earlier_results_alone(here, detector, capsys):
    for name in ("o.mp4", "o.json", "o.jsonl"):
        Path(name).write_text("earlier")
    options = ["--output", "o.mp4", "--json", "o.jsonl", "--coco", "o.json"]
    assert cli.main(["--model", "broken", "--prompt", "x", "--source", "v.mp4", *options]) == 1
    assert capsys.readouterr().err == "glip-detect: error: bundle broken is broken; export it again\n"
    assert {Path(name).read_text() for name in ("o.mp4", "o.json", "o.jsonl")} == {"earlier"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(here, detector, capsys):
    assert detect("--source", "v.mp4", "--json", "/dev/full") == 1
    assert capsys.readouterr().err == (
        "glip-detect: error: /dev/full cannot be written: no space left; free some, or write elsewhere\n"
    )


def test_a_truncated_video_is_one_line(here, detector, capsys):
    data = (here / "v.mp4").read_bytes()
    (here / "v.mp4").write_bytes(data[: len(data) // 2])
    assert detect("--source", "v.mp4") == 1
    err = capsys.readouterr().err
    assert "v.mp4: cannot be opened as a video" in err and err.count("\n") == 1


def test_quiet_prints_errors_but_no_warnings(here, detector, capsys):
    (here / "photos" / "3.png").write_bytes(b"junk")
    assert detect("--source", "photos", "--output", "o/", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert detect("--source", "nothing", "--quiet") == 1
    assert "does not exist" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_on_a_terminal_only(here, detector, monkeypatch, capsys):
    assert detect("--source", "v.mp4", "--json", "o.jsonl") == 0
    assert "detecting" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert detect("--source", "v.mp4", "--json", "o.jsonl") == 0
    assert "detecting" in sys.stderr.getvalue() and "12/12" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert detect("--source", "v.mp4") == 0
    assert "detecting" not in sys.stderr.getvalue()  # it would run through the data


def test_main_leaves_logging_as_it_was(here, detector, capsys):
    logger = logging.getLogger("glip_deploy")
    before = (logger.level, list(logger.handlers))
    assert detect("--source", "a.jpg", "--log-level", "debug") == 0
    assert (logger.level, list(logger.handlers)) == before


def test_ctrl_c_while_the_model_is_loaded(here, detector, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(detector, "open", interrupt)
    assert detect("--source", "v.mp4", "--output", "o.mp4") == 130
    assert capsys.readouterr().err == "glip-detect: interrupted\n"
    assert not Path("o.mp4").exists()


SLOW = """
import sys, time, types
import numpy as np
import glip_deploy.detector
from glip_deploy.results import Detections

class Slow:
    @classmethod
    def open(cls, path, **options):
        return cls()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def encode(self, text, *, phrases="auto"):
        return types.SimpleNamespace(phrases=("x",))

    def detect(self, frame, prompt, threshold, color, timings=None):
        time.sleep(0.02)
        return Detections(np.array([[1, 1, 9, 9]], np.float32), np.array([0.5], np.float32), np.array([0]), ["x"])

glip_deploy.detector.Detector = Slow
from glip_deploy.cli.detect import main
sys.exit(main(sys.argv[1:]))
"""

NOISY = SLOW.replace("        time.sleep(0.02)", "        os.write(1, b'a library\\n')").replace(
    "import sys", "import os, sys", 1
)


def test_what_a_library_prints_does_not_get_into_the_data(here):
    command = [sys.executable, "-c", NOISY, "--model", "m", "--prompt", "x", "--source", "v.mp4"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, timeout=60)
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 12
    assert done.stderr.count("a library") == 12


def start_slow(here, *args, source="long.mp4"):
    command = [sys.executable, "-c", SLOW, "--model", "m", "--prompt", "x", "--source", source, *args]
    return subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process alone")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_complete_the_files(here, number, status):
    write_video(here / "long.mp4", frames=3000)
    process = start_slow(here, "--output", "o.mp4", "--coco", "o.json", "--json", "-")
    first = [process.stdout.readline() for _ in range(4)]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    lines = lines_of("".join(first) + out)
    assert process.returncode == status
    assert 4 <= len(lines) < 3000
    assert [line["frame"] for line in lines] == list(range(len(lines)))
    assert frames_in(here / "o.mp4") == len(lines)
    assert len(json.loads((here / "o.json").read_text())) == len(lines)
    assert "interrupted" in err and "Traceback" not in err
    assert names_in(here) == ["a.jpg", "long.mp4", "o.json", "o.mp4", "photos", "v.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process alone")
def test_ctrl_c_while_a_stream_opens(here):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        process = start_slow(here, "--timeout", "30", source=f"http://127.0.0.1:{server.getsockname()[1]}/x")
        connection, _ = server.accept()
        with connection:  # closed, it would be a stream that cannot be reached
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "glip-detect: interrupted\n")
    assert time.monotonic() - start < 15


@pytest.mark.skipif(sys.platform == "win32", reason="the shell's way to close a stream")
@pytest.mark.parametrize(
    ("closed", "args", "status", "error"),
    [
        (">&-", [], 1, "glip-detect: error: standard output is closed, so nothing can be written there"),
        (">&-", ["--json", "o.jsonl"], 0, "glip-detect: 12 frames"),
        ("2>&-", ["--json", "o.jsonl"], 0, ""),
        ("<&- >&- 2>&-", ["--json", "o.jsonl"], 0, ""),
    ],
)
def test_closed_standard_streams(here, closed, args, status, error):
    (here / "program.py").write_text(SLOW)
    script = f'"{sys.executable}" program.py --model m --prompt x --source v.mp4 {" ".join(args)} {closed}'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        script, shell=True, cwd=here, capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(error) and done.stderr.count("\n") == bool(error)
    if args:
        assert len(lines_of((here / "o.jsonl").read_text())) == 12


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot kill a process outright")
def test_a_killed_process_leaves_a_playable_video(here):
    write_video(here / "long.mp4", frames=3000)
    process = start_slow(here, "--output", "o.mp4", "--json", "-")
    for _ in range(8):
        process.stdout.readline()
    process.kill()
    process.communicate(timeout=60)
    assert frames_in(here / "o.mp4") >= 6


@pytest.mark.skipif(sys.platform == "win32", reason="Windows closes pipes in another way")
def test_a_closed_pipe_prints_no_error(here):
    write_video(here / "long.mp4", frames=3000)
    process = start_slow(here)
    process.stdout.readline()
    process.stdout.close()
    start = time.monotonic()
    process.wait(timeout=60)
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.returncode == 141
    assert time.monotonic() - start < 30
