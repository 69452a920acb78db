"""What is shipped, and that it works where nothing else is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest
from parity_data import ROOT

PIP = ("-m", "pip", "--disable-pip-version-check")


def run(*command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", directory, ROOT)
    if done.returncode and "hatchling" in done.stderr:
        pytest.skip("hatchling cannot be fetched here, so no wheel can be built")
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = directory.glob("*.whl")
    return path


def test_a_wheel_holds_the_four_packages_and_their_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("glip_deploy", "glip_export", "glip_engines", "glip_bench"):
        assert f"{package}/__init__.py" in names and f"{package}/py.typed" in names
    assert {
        "glip_deploy/backends/onnxruntime.py",
        "glip_export/model/fusion.py",
        "glip_export/data/bert-base-uncased-vocab.txt",
        "glip_export/data/picture.jpg",
    } <= names
    roots = {name.partition("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {
        "glip_deploy", "glip_export", "glip_engines", "glip_bench",
    }  # fmt: skip
    licences = {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}
    assert wheel.stat().st_size < 2_000_000


DETECT = """
import json, sys
import numpy as np
from glip_deploy import Detector
frame = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
with Detector.open(sys.argv[1], shortest_side=128, cache_dir=None) as detector:
    found = detector.detect(frame, ["person", "dog"], 0.2, color="bgr")
print(json.dumps({"found": len(found), "foreign": [m for m in ("torch", "onnx", "av") if m in sys.modules]}))
"""


DRAW = """
import sys
import numpy as np
from PIL import Image
frame = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
Image.fromarray(frame[..., ::-1].copy()).save(sys.argv[1])  # the frame is BGR, a file RGB
"""


@pytest.fixture
def empty_environment(tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    yield tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    shutil.rmtree(tmp_path / "env")  # 200 MB


@pytest.mark.clean_install
def test_the_runtime_works_in_an_empty_environment(wheel, tiny_bundle, tmp_path, empty_environment):
    python = empty_environment
    done = run(python, *PIP, "install", "--quiet", wheel)
    if done.returncode:
        pytest.skip(f"the dependencies cannot be fetched here: {done.stderr.strip().splitlines()[-1][:200]}")
    listed = {row["name"] for row in json.loads(run(python, *PIP, "list", "--format=json").stdout)}
    assert "onnxruntime" in listed and listed.isdisjoint({"torch", "onnx", "av"})
    done = run(python, "-c", DETECT, tiny_bundle, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["found"] > 0 and answer["foreign"] == []
    for program in ("glip-detect", "glip-export", "glip-bench"):
        shown = run(python.with_name(program), "--help")
        assert shown.returncode == 0 and "--model" in shown.stdout
    picture, lines = tmp_path / "picture.png", tmp_path / "found.jsonl"
    drawn = run(python, "-c", DRAW, picture)
    assert drawn.returncode == 0, drawn.stderr
    command = ["--model", tiny_bundle, "--prompt", "person. dog", "--source", picture, "--json", lines]
    options = ["--threshold", "0.2", "--shortest-side", "128", "--no-cache", "--quiet"]
    done = run(python.with_name("glip-detect"), *command, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in lines.read_text().splitlines()]
    assert (row["width"], row["height"]) == (120, 90)
    assert len(row["detections"]) == answer["found"] and row["detections"][0]["label"] in ("person", "dog")
    # What an extra would bring is asked for by name, not with a traceback.
    missing = run(python.with_name("glip-export"), "--model", "glip_t.pth")
    assert missing.returncode == 1 and "glip-deploy[export]" in missing.stderr and "Traceback" not in missing.stderr
