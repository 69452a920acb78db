"""What is shipped: what the archives hold, and that every extra is enough for its job where nothing else is installed.

The extras are installed one after the other into one clean environment (`clean_environment`, also used by the tests of
the documentation's commands). Not installed anywhere: `gpu` and `tensorrt`, which need a GPU and gigabytes; their
requirements are read instead. torch is lent from the running environment.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from importlib import metadata

import pytest
from clean_environment import run
from packaging.requirements import Requirement
from parity_data import ROOT
from selection import slowly

ROOMS = {
    "glip_deploy": ROOT / "glip_deploy",
    "glip_export": ROOT / "export" / "glip_export",
    "glip_engines": ROOT / "engines" / "glip_engines",
    "glip_bench": ROOT / "benchmarks" / "glip_bench",
}
PICTURE = ROOT / "examples" / "nano" / "media" / "scene.jpg"
VIDEO = ROOT / "examples" / "nano" / "media" / "moving.mp4"


# -- the archives ---------------------------------------------------------------------------------------------------


def files_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_the_wheel_holds_the_four_packages_and_their_data(wheel):
    files = files_of(wheel)
    for package, folder in ROOMS.items():
        sources = {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
        assert sources | {f"{package}/py.typed"} <= set(files)
    plugin = ROOT / "engines" / "plugin"
    sources = {path.relative_to(plugin).as_posix() for path in plugin.rglob("*") if path.is_file()}
    assert {f"glip_engines/plugin/{name}" for name in sources} <= set(files)
    assert {
        "glip_deploy/backends/resize.cu",
        "glip_engines/CMakeLists.txt",
        "glip_engines/plugin/deform_kernel.cu",
        "glip_export/data/bert-base-uncased-vocab.txt",
        "glip_export/data/picture.jpg",
    } <= set(files)
    assert {name.partition("/")[0] for name in files if ".dist-info/" not in name} == set(ROOMS)
    assert {name.rpartition("/")[2] for name in files if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert wheel.stat().st_size < 2_000_000


def test_the_source_distribution_is_small_and_makes_the_same_wheel(wheel, tmp_path):
    """The wheel is built from the unpacked source distribution, as `build` does where no --wheel is asked for."""
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (rebuilt,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    assert sdist.stat().st_size < 3_000_000
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "engines/plugin/glip_deform.h"} <= names
    assert not [name for name in names if name.startswith(("tests/", "examples/", "benchmarks/results/"))]
    ours, theirs = files_of(wheel), files_of(rebuilt)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and ".dist-info/" not in name] == []


# -- what it requires -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def required(wheel):
    """Distributions by extra ("" for the runtime's own), with extras that an extra includes resolved."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        facts = metadata.PathDistribution(zipfile.Path(archive, name.partition("/")[0] + "/")).metadata
        rows = [Requirement(row) for row in facts.get_all("Requires-Dist")]
        extras = facts.get_all("Provides-Extra")

    def of(extra):
        found = set()
        for row in rows:
            asked = re.search(r'extra == ["\']([\w-]+)["\']', str(row.marker)) if row.marker else None
            if (asked[1] if asked else "") != extra:
                continue
            found |= {row.name} if row.name != "glip-deploy" else {one for part in row.extras for one in of(part)}
        return found

    return {extra: of(extra) for extra in ["", *extras]}


def test_extras_are_named_after_jobs(required):
    jobs = {"video", "captions", "supervision", "gpu", "export", "build", "tensorrt", "tensorrt-rtx", "plugin", "bench"}
    assert jobs < set(required)
    assert "nvidia-cuda-nvrtc" not in required["build"]  # whose CUDA may be 12
    assert required["tensorrt"] == required["build"] | {"nvidia-cuda-nvrtc", "tensorrt"}
    assert required["tensorrt-rtx"] == required["build"] | {"nvidia-cuda-nvrtc", "tensorrt-rtx-cu13"}
    assert required["gpu"] == {"onnxruntime-gpu"}
    for extra in required.keys() - {"export", "yardsticks", "dev"}:
        assert "torch" not in required[extra], extra


def test_the_runtime_itself_is_light(required):
    assert required[""].isdisjoint({"torch", "onnx", "onnx-ir", "av", "tensorrt", "cuda-python", "opencv-python"})


def imported_by(folder):
    """Top-level modules that the sources import, from outside the standard library and this project."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - set(ROOMS)


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        (
            "glip_deploy",
            ["captions", "video", "supervision", "openvino", "ray", "serve", "tensorrt", "track", "gpu-rtx"],
        ),
        ("glip_export", ["export"]),
        ("glip_engines", ["tensorrt"]),
        ("glip_bench", ["bench", "export", "tensorrt", "yardsticks"]),
    ],
)
def test_every_import_is_declared(required, package, extras):
    modules = {"cuda": "cuda-python", "tensorrt": "tensorrt", "PIL": "pillow", "yaml": "pyyaml", "rich": "typer"}
    distributions = metadata.packages_distributions()
    declared = set().union(required[""], *(required[extra] for extra in extras))
    for module in imported_by(ROOMS[package]):
        names = {modules[module]} if module in modules else set(distributions.get(module, [module]))
        assert {re.sub(r"[-_.]+", "-", name).lower() for name in names} & declared, f"{package} imports {module}"


def test_every_extra_that_a_message_names_exists(required):
    """`tests/docs` checks those that README and docs name."""
    sources = [path for folder in ROOMS.values() for path in folder.rglob("*.py")]
    named = {
        extra: path.relative_to(ROOT)
        for path in sources
        for extras in re.findall(r"(?:glip-deploy\[|\bextra=\")([a-z,-]+)[]\"]", path.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert {"bench", "export", "video"} <= named.keys()
    assert {extra: path for extra, path in named.items() if extra not in required} == {}


# -- installed, extra by extra --------------------------------------------------------------------------------------

DETECT = """
import json, sys
import numpy as np
from glip_deploy import Detector
frame = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
with Detector.open(sys.argv[1], shortest_side=128, cache_dir=None) as detector:
    found = detector.detect(frame, ["person", "dog"], 0.2, color="bgr")
print(json.dumps({"found": len(found), "foreign": [m for m in ("torch", "onnx", "av") if m in sys.modules]}))
"""
PROGRAMS = ("glip-detect", "glip-batch", "glip-export", "glip-build", "glip-bench", "glip-serve")
TINY = ("--prompt", "person. dog", "--threshold", "0.2", "--shortest-side", "128", "--no-cache", "--quiet")


def fails_in_one_line(done, *parts):
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert ": error: " in line and all(part in line for part in parts) and "Traceback" not in done.stderr, done.stderr


@pytest.mark.clean_install
def test_the_runtime_alone(clean_environment, tiny_bundle, tmp_path):
    """The first of these tests: nothing but the runtime may be there."""
    clean_environment.install()
    assert clean_environment.distributions().isdisjoint({"torch", "onnx", "onnx-ir", "av", "cuda-python", "matplotlib"})
    done = clean_environment.run("python", "-c", DETECT, tiny_bundle, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["found"] > 0 and answer["foreign"] == []
    for program in PROGRAMS:
        shown = clean_environment.run(program, "--help")
        assert shown.returncode == 0 and "examples:" in shown.stdout, program
    lines = tmp_path / "found.jsonl"
    done = clean_environment.run("glip-detect", "--model", tiny_bundle, "--source", PICTURE, "--json", lines, *TINY)
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in lines.read_text().splitlines()]
    assert row["detections"] and {one["label"] for one in row["detections"]} <= {"person", "dog"}


@pytest.mark.clean_install
def test_what_an_extra_would_bring_is_asked_for_by_name(clean_environment, tiny_bundle, tiny_checkpoint, tmp_path):
    clean_environment.install()
    extras = clean_environment.distributions()
    here = {"av": "video", "torch": "export", "onnx-ir": "build", "pyarrow": "ray", "fastapi-offline": "serve"}
    commands = {
        "av": ("glip-detect", "--model", tiny_bundle, "--source", VIDEO, *TINY),
        "torch": ("glip-export", "--model", tiny_checkpoint, "--output", tmp_path / "out"),
        "onnx-ir": ("glip-build", tiny_bundle, "--arch", "SM86"),
        "pyarrow": ("glip-batch", "--model", tiny_bundle, "--prompt", "dog", "--source", PICTURE, "--output", "batch"),
        "fastapi-offline": ("glip-serve", "--model", tiny_bundle, "--port", "0"),
    }
    for distribution, command in commands.items():
        assert distribution not in extras
        done = clean_environment.run(*command, cwd=tmp_path)
        fails_in_one_line(done, "glip-deploy[")
        assert "tensorrt" in done.stderr or f"glip-deploy[{here[distribution]}]" in done.stderr
    done = clean_environment.run("python", "-c", "from glip_deploy import Detections; Detections().to_supervision()")
    assert done.returncode == 1 and "pip install supervision" in done.stderr.splitlines()[-1]


@pytest.mark.clean_install
def test_video(clean_environment, tiny_bundle, tmp_path):
    clean_environment.install("video")
    output = tmp_path / "found.mp4"
    command = ("glip-detect", "--model", tiny_bundle, "--source", VIDEO, "--output", output, "--max-frames", "3", *TINY)
    done = clean_environment.run(*command)
    assert done.returncode == 0 and output.stat().st_size > 1000, done.stderr


@slowly
@pytest.mark.clean_install
def test_bench(clean_environment, tiny_bundle, tmp_path):
    clean_environment.install("video", "bench")
    done = clean_environment.run("glip-bench", "--quick", "--model", tiny_bundle, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["complete"]


@pytest.mark.clean_install
def test_serve(clean_environment, tiny_bundle):
    clean_environment.install("serve")
    command = [clean_environment.bin / "glip-serve", "--model", tiny_bundle, "--port", "0", "--shortest-side", "128"]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, cwd=clean_environment.folder, env=variables
    )
    try:
        line = server.stderr.readline()
        assert line.startswith("glip-serve: http://127.0.0.1:"), line + server.stderr.read()
        address = line.split()[1]
        for path, part in (("healthz", b'"ok"'), ("", b"<canvas"), ("app.js", b"./drawing.js")):
            with urllib.request.urlopen(address + path, timeout=60) as answer:
                assert part in answer.read(), path
        picture = base64.b64encode(PICTURE.read_bytes()).decode()
        body = json.dumps({"image": picture, "prompt": "person. dog", "threshold": 0.2}).encode()
        asked = urllib.request.Request(f"{address}v1/detect", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=120) as answer:
            found = json.load(answer)["detections"]
        assert found and {one["label"] for one in found} <= {"person", "dog"}
        server.terminate()
        assert server.wait(60) == 0 or sys.platform == "win32"  # where it is killed
    finally:
        server.kill()
        server.communicate()


@pytest.mark.clean_install
def test_supervision(clean_environment):
    clean_environment.install("supervision")
    code = "from glip_deploy import Detections; print(len(Detections().to_supervision()))"
    done = clean_environment.run("python", "-c", code)
    assert done.returncode == 0 and done.stdout.strip() == "0", done.stderr


@pytest.mark.clean_install
@pytest.mark.skipif(sys.platform != "linux", reason="the registry has TensorRT-RTX's compilers for Linux only")
@slowly
@pytest.mark.parametrize("form", ["native", "plugin"])
def test_engines(clean_environment, tiny_bundle, tmp_path, form):
    """The extra alone is enough; with `plugin` and TensorRT's headers, no CUDA toolkit is needed for the other form."""
    clean_environment.install("tensorrt-rtx")
    if form == "plugin":
        clean_environment.install("plugin")
        clean_environment.pip("install", "--quiet", "--no-deps", "kernel-lens")
    assert "torch" not in clean_environment.distributions()
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    options = ("--arch", "SM86", "--size", "64x64", "--tokens", "16", "--form", form)
    done = clean_environment.run("glip-build", bundle, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = bundle / "engines" / done.stdout.strip().rpartition("/")[2]
    assert (folder / "image.plan").is_file() and bool(list(folder.glob("*.so"))) == (form == "plugin")


@pytest.mark.clean_install
@pytest.mark.skipif(sys.platform == "win32", reason="torch is lent by links, which Windows keeps for administrators")
def test_export(clean_environment, tiny_checkpoint, tmp_path):
    clean_environment.lend("torch", "triton")
    clean_environment.install("export")
    done = clean_environment.run("glip-export", "--model", tiny_checkpoint, "--output", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bundle" / "manifest.json").is_file()


@slowly
@pytest.mark.clean_install
def test_docs(clean_environment):
    clean_environment.install("docs")
    done = clean_environment.run("mkdocs", "--version")
    assert done.returncode == 0, done.stderr
    code = "import mkdocs, material, mkdocstrings, mkdocstrings_handlers.python"
    assert clean_environment.run("python", "-c", code).returncode == 0


@pytest.mark.clean_install
def test_all_of_it_together_has_what_it_requires(clean_environment):
    clean_environment.install("video")
    clean_environment.pip("check")
