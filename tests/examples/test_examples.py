"""The examples that users copy: run as programs on GLIP-nano, with real boxes, and on inputs that cannot be used."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from parity_data import ROOT
from PIL import Image
from simulated_tensorrt import SimulatedCuda, SimulatedDeviceArray, simulated_tensorrt, write_engines

from glip_deploy import Bundle, Detections, Detector
from glip_deploy.backends import tensorrt
from glip_deploy.backends.tensorrt import TensorRTBackend
from glip_deploy.results.boxes import pairwise_iou
from glip_deploy.video.open import open_source
from glip_deploy.video.video_out import VideoSink

EXAMPLES = ROOT / "examples"
SCENE = EXAMPLES / "nano" / "media" / "scene.jpg"
DOG, PENGUIN = [302, 174, 409, 287], [221, 101, 292, 202]
CAPTION = ROOT / "tests" / "data" / "nano" / "caption.jpg"
BOX = re.compile(r"(0\.\d\d) ?([a-z ]*) \((-?\d+), (-?\d+)\) to \((\d+), (\d+)\)")
COMMANDS = dict(
    re.findall(r"^\| \[(\w+\.py)\].*\| `(python [^`]*)` \|$", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """The first 16 frames of GLIP-nano's video; a sunflower and a red apple are in all of them."""
    path = tmp_path_factory.mktemp("video") / "yard.mp4"
    moving = EXAMPLES / "nano" / "media" / "moving.mp4"
    with open_source(moving, max_frames=16) as source, VideoSink(path, fps=source.fps) as sink:
        for frame in source:
            sink.write(frame, Detections.empty())
    return path


def start(folder, name, *arguments, path=None, **options):
    environment = {**os.environ, "GLIP_DEPLOY_CACHE": str(folder / "cache")}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), environment.get("PYTHONPATH")]))
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def run(folder, name, *arguments, **options):
    """Run an example to its end; returns its status and what it printed."""
    with start(folder, name, *arguments, **options) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def nano(nano_bundle):
    """The options of GLIP-nano, the same for all examples."""
    return ["--model", nano_bundle, "--shortest-side", 224, "--threshold", 0.6]


def boxes(text):
    return [(name, [int(side) for side in box]) for _, name, *box in BOX.findall(text)]


def near(box, truth):
    return pairwise_iou(np.array([box], float), np.array([truth], float)).item() > 0.6


def frames(out):
    """Frame number and phrases of every line."""
    found = re.findall(r"frame (\d+): (.*)", out)
    return [(int(number), [] if names == "nothing" else names.split(", ")) for number, names in found]


# -- what they find ---------------------------------------------------------------------------------------------------


def test_detect_image(nano, tmp_path):
    status, out, err = run(tmp_path, "detect_image.py", SCENE, *nano, "--prompt", "dog. penguin", "--output", "f.png")
    assert (status, err) == (0, "")
    found = dict(boxes(out))
    assert near(found["dog"], DOG) and near(found["penguin"], PENGUIN)
    with Image.open(tmp_path / "f.png") as annotated, Image.open(SCENE) as picture:
        changed = np.abs(np.asarray(annotated, int) - np.asarray(picture, int)).max(axis=2) > 60
    x1, y1, x2, y2 = found["dog"]
    assert changed[y1 : y2 + 1, [x1, x2]].mean() > 0.6 and changed[320:, 420:].mean() < 0.01  # outlines; nothing else


def test_switch_prompt(nano, tmp_path):
    status, out, _ = run(tmp_path, "switch_prompt.py", SCENE, "dog. penguin", "guitar", *nano)
    lines = re.findall(r"'(.*)': prompt (.*) ms, frame .* ms: (.*)", out)
    assert status == 0 and [line[0] for line in lines] == ["dog. penguin", "guitar"] * 2
    assert {*lines[0][2].split(", ")} == {"dog", "penguin"}
    assert [line[2] for line in lines[:2]] == [line[2] for line in lines[2:]]
    assert float(lines[2][1]) < float(lines[0][1])  # known by then


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a red apple left of two dogs", ["a red apple", "two dogs"]),
        ("a [red apple] left of two [dogs]", ["red apple", "dogs"]),
    ],
)
def test_phrase_grounding(nano, tmp_path, caption, phrases):
    status, out, err = run(tmp_path, "phrase_grounding.py", CAPTION, caption, *nano)
    assert (status, err) == (0, "")
    assert re.findall(r"^(\S.*):$", out, re.MULTILINE) == phrases
    apple, dogs = re.split(r"^\S.*:$", out, flags=re.MULTILINE)[1:]
    things = json.loads(CAPTION.with_suffix(".json").read_text())["things"]
    assert len(boxes(apple)) == 1 and near(boxes(apple)[0][1], things[0]["box"])
    assert len(boxes(dogs)) == 2
    assert all(any(near(box, thing["box"]) for _, box in boxes(dogs)) for thing in things[1:])


def test_to_supervision(nano, tmp_path):
    prompt = ["--prompt", "dog. penguin. red apple"]
    status, out, _ = run(tmp_path, "to_supervision.py", SCENE, *nano, *prompt, "--output", "s.png")
    assert status == 0 and out.splitlines() == ["1 dog", "1 penguin", "2 red apple"]
    with Image.open(tmp_path / "s.png") as annotated, Image.open(SCENE) as picture:
        assert annotated.size == picture.size and annotated.tobytes() != picture.tobytes()
    status, out, _ = run(tmp_path, "to_supervision.py", SCENE, *nano, *prompt, "--least-area", 0.9)
    assert status == 0 and out == ""


def test_webcam_takes_a_new_prompt_while_it_runs(nano, tmp_path, video):
    arguments = ["--source", video, "--headless", "--prompt", "sunflower"]
    with start(tmp_path, "webcam.py", *nano, *arguments, stdin=subprocess.PIPE) as process:
        first = process.stdout.readline()
        process.stdin.write("a [dog\nred apple. owl\n")  # the first cannot be used; the second can
        process.stdin.flush()
        out = first + process.stdout.read()
        err = process.stderr.read()
    assert process.returncode == 0
    assert re.fullmatch(r"webcam: '\[' at character .* never closed.*\n", err)
    seen = frames(out)
    assert [number for number, _ in seen] == list(range(16))
    changed = next(number for number, names in seen if "red apple" in names)
    assert changed > 0
    assert all({*names} == {"sunflower"} for _, names in seen[:changed])
    assert all("red apple" in names and "sunflower" not in names for _, names in seen[changed:])


def test_webcam_takes_the_newest_frame_of_a_stream(nano, tmp_path, video):
    """All frames arrive at once; those that a newer one replaces are never detected in."""
    stream = tmp_path / "yard.ts"
    remux(video, stream)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.sendall(stream.read_bytes())

        threading.Thread(target=serve, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        status, out, err = run(tmp_path, "webcam.py", *nano, "--source", address, "--headless", "--prompt", "sunflower")
    numbers = [number for number, _ in frames(out)]
    assert 1 <= len(numbers) < 12 and numbers == sorted(numbers)
    assert status == 1 and re.fullmatch(r"webcam: .* lost after \d+ frames .*\n", err)


def remux(source, target):
    import av

    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


def test_webcam_shows_a_window_until_q_is_pressed(nano, tmp_path, video):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "cv2.py").write_text(
        "shown = []\n"
        "def imshow(name, picture):\n"
        "    shown.append(picture)\n"
        "    print(name, picture.shape, picture.dtype)\n"
        "def waitKey(milliseconds):\n"
        "    return ord('q') if len(shown) == 3 else -1\n"
    )
    arguments = ["--source", video, "--prompt", "sunflower"]
    status, out, err = run(tmp_path, "webcam.py", *nano, *arguments, path=tmp_path / "stub")
    assert (status, err) == (0, "")
    assert out.count("GLIP (336, 432, 3) uint8") == 3 and len(frames(out)) == 3


def test_two_cameras(nano, tmp_path, video):
    status, out, err = run(tmp_path, "two_cameras.py", *nano, video, SCENE, "--prompt", "sunflower. red apple")
    assert (status, err) == (0, "")
    of = {file: frames("\n".join(line for line in out.splitlines() if str(file) in line)) for file in (video, SCENE)}
    assert of[SCENE] == [(0, ["red apple", "red apple", "sunflower"])]
    assert [number for number, _ in of[video]] == list(range(16))
    assert all({"sunflower", "red apple"} <= {*names} for _, names in of[video])


def test_gpu_frame_on_a_simulated_gpu(nano_bundle, tmp_path, monkeypatch, capsys):
    """The picture reaches the backend as CuPy's array; what the GPU itself would do is not shown here."""
    monkeypatch.setattr(tensorrt, "_RUNTIMES", {})
    shutil.copytree(nano_bundle, tmp_path / "nano")
    cuda, bundle = SimulatedCuda(), Bundle.open(tmp_path / "nano")
    engines = write_engines(bundle, tokens=((1, 8, 64),), sizes=((32, 224, 384),) * 2)

    def opened(path, *, backend, shortest_side):
        assert (path, backend) == (str(bundle.path), "tensorrt")
        backend = TensorRTBackend.open(bundle, engines, cuda=cuda, trt=simulated_tensorrt(cuda))
        return Detector(bundle, backend, shortest_side=shortest_side)

    monkeypatch.setattr(Detector, "open", opened)
    monkeypatch.setitem(sys.modules, "cupy", type("cupy", (), {"asarray": SimulatedDeviceArray}))
    options = ["--model", str(bundle.path), "--shortest-side", "224", "--threshold", "0.6"]
    monkeypatch.setattr(sys, "argv", ["gpu_frame.py", str(SCENE), *options, "--prompt", "dog. penguin"])
    spec = importlib.util.spec_from_file_location("gpu_frame", EXAMPLES / "gpu_frame.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    found = dict(boxes(capsys.readouterr().out))
    assert near(found["dog"], DOG) and near(found["penguin"], PENGUIN)
    assert "resize" in cuda.log


# -- what they refuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("detect_image.py", ["nowhere.jpg"], "picture nowhere.jpg does not exist"),
        ("detect_image.py", [SCENE, "--threshold", 2], "threshold"),
        ("detect_image.py", [SCENE, "--output", "found.xyz"], "unknown file extension"),
        ("switch_prompt.py", [SCENE, "dog", "a [dog"], "never closed"),
        ("phrase_grounding.py", [CAPTION, "walking slowly"], "no noun is found"),
        ("to_supervision.py", [SCENE, "--prompt", "dog. dog"], "dog"),
        ("to_supervision.py", [SCENE, "--prompt", "dog", "--output", "no/where.png"], "No such file"),
        ("webcam.py", ["--headless", "--source", "nowhere.mp4"], "source nowhere.mp4 does not exist"),
        ("two_cameras.py", [SCENE, "nowhere.mp4"], "source nowhere.mp4 does not exist"),
        ("gpu_frame.py", [SCENE], "has no engines; build them with glip-build"),
    ],
)
def test_a_wrong_input_is_one_line(nano, tmp_path, name, arguments, said):
    status, _, err = run(tmp_path, name, *nano, *arguments)
    (line,) = [line for line in err.splitlines() if "supervision" not in line or line.startswith("to_supervision")]
    assert status == 1 and line.startswith(f"{name.removesuffix('.py')}: ") and said in line


def test_without_opencv_a_window_is_refused(nano, tmp_path, video):
    (tmp_path / "cv2.py").write_text("raise ImportError(\"No module named 'cv2'\")\n")
    status, out, err = run(tmp_path, "webcam.py", *nano, "--source", video, path=tmp_path)
    assert (status, out) == (1, "")
    assert err == "webcam: No module named 'cv2'; pip install opencv-python for a window, or use --headless\n"


# -- what is written about them ---------------------------------------------------------------------------------------


def test_every_example_has_its_row():
    assert sorted(COMMANDS) == sorted(file.name for file in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_of_the_table_is_good_usage_and_is_the_one_in_the_program(name, tmp_path):
    """It gets as far as what it reads: there is no glip_t/ and no street.jpg in the folder."""
    assert COMMANDS[name] in (EXAMPLES / name).read_text()
    program, file, *arguments = shlex.split(COMMANDS[name])
    assert (program, file) == ("python", f"examples/{name}")
    status, _, err = run(tmp_path, name, *arguments)
    assert status == 1 and re.search(r"(street\.jpg|bundle glip_t) does not exist", err.splitlines()[-1]), err
