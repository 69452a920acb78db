"""The C++ runtime's ONNX Runtime backend against Python's."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_build import GlipError, Library, run

from glip_deploy import Detector, load_image

ROOT = Path(__file__).resolve().parents[2]
SCENES = ROOT / "tests" / "data" / "nano"
SIDES = {"shortest_side": 224, "longest_side": 1333}
HERE = {"backend": b"onnxruntime", "no_cache": 1, "no_verify": 1}


def onnxruntime_library() -> Path:
    """The library that Python's package has."""
    import onnxruntime

    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    return library


@pytest.fixture(scope="module")
def built(runtime: Path) -> Path:
    """The folder of the runtime, with this backend."""
    if not (runtime / "libglip_onnxruntime.so").exists():
        pytest.skip("onnxruntime_c_api.h is not here: no package has it; set ONNXRUNTIME_DIR to a release archive")
    return runtime


@pytest.fixture(scope="module")
def library(built: Path) -> Library:
    ctypes.CDLL(str(onnxruntime_library()))  # the runtime opens it by its name
    return Library(built)


@pytest.fixture(scope="module")
def detector(library, nano_bundle):
    opened = library.open(nano_bundle, **HERE, **SIDES)
    yield opened
    library.c.glip_close(opened)


@pytest.fixture(scope="module")
def python(nano_bundle):
    with Detector.open(nano_bundle, cache_dir=None, **SIDES) as opened:
        yield opened


@pytest.fixture(scope="module")
def picture():
    return load_image(ROOT / "examples" / "nano" / "media" / "scene.jpg")


def same(found: Any, wanted: Any) -> None:
    assert [label for _, _, label, _ in found] == wanted.labels.tolist()
    assert [phrase for *_, phrase in found] == wanted.phrases
    np.testing.assert_allclose([score for _, score, _, _ in found], wanted.scores, atol=1e-4)
    np.testing.assert_allclose([box for box, *_ in found], wanted.boxes, atol=0.01)


def refused(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(GlipError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def test_it_finds_what_python_finds_in_the_scenes_of_glip_nano(library, detector, python):
    total = 0
    for entry in json.loads((SCENES / "scenes.json").read_text()):
        scene = load_image(SCENES / entry["file"])
        prompt = library.encode(detector, entry["prompt"])
        wanted = python.detect(scene, entry["prompt"], 0.1, color="rgb")
        same(library.detect(detector, prompt, scene, 0.1), wanted)
        library.c.glip_prompt_free(prompt)
        total += len(wanted)
    assert total > 300


def test_several_prompts_batches_and_clones(library, nano_bundle, python, picture):
    opened = library.open(nano_bundle, **HERE, **SIDES)
    twin = library.new("glip_clone", opened)
    texts = [["dog", "red apple"], ["owl"], ["penguin", "guitar", "bicycle"]]
    prompts = [library.encode(opened, text) for text in texts]
    for one in (opened, twin):  # the whole first, then its parts, which then serve single prompts too
        same(library.detect(one, prompts[0], picture, 0.1), python.detect(picture, texts[0], 0.1, color="rgb"))
        for found, text in zip(library.detect_prompts(one, prompts, picture, 0.1), texts, strict=True):
            same(found, python.detect(picture, text, 0.1, color="rgb"))
    library.c.glip_close(opened)
    frames = [picture, np.ascontiguousarray(picture[:150]), picture]
    wanted = python.detect_batch(frames, texts[0], 0.1, color="rgb")
    for found, of_frame in zip(library.detect_batch(twin, prompts[0], frames, 0.1), wanted, strict=True):
        same(found, of_frame)
    for prompt in prompts:
        library.c.glip_prompt_free(prompt)
    library.c.glip_close(twin)


def test_what_is_refused(library, nano_bundle, detector, picture, tmp_path):
    message = refused(library.open, nano_bundle, **HERE, precision=b"bf16")
    assert message == (
        'OPTION: precision is "bf16", which backend onnxruntime cannot choose; use backend openvino, or glip-export'
        " --precision"
    )
    prompt = library.encode(detector, "owl")
    assert refused(library.detect, detector, prompt, picture, memory=1) == (
        "FRAME: the picture is in GPU memory, which this backend cannot read; copy it to the host, or use backend"
        " tensorrt"
    )
    library.c.glip_prompt_free(prompt)
    shutil.copytree(nano_bundle, tmp_path / "glip")
    graph = tmp_path / "glip" / "image.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    message = refused(library.open, tmp_path / "glip", **HERE)
    assert message.startswith(f"BACKEND: ONNX Runtime cannot load {graph}: ")
    assert message.endswith("; export the bundle again")


# -- in processes of their own ----------------------------------------------------------------------------------------


def apart(work: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result(120)


def threads_of(folder: Path, file: Path, bundle: Path, threads: int) -> int:
    """How many threads a detector adds to the process."""
    ctypes.CDLL(str(file))
    library = Library(folder)
    before = len(list(Path("/proc/self/task").iterdir()))
    library.open(bundle, **HERE, **SIDES, threads=threads)
    return len(list(Path("/proc/self/task").iterdir())) - before


def test_the_number_of_threads(built, nano_bundle):
    one, four = (apart(threads_of, built, onnxruntime_library(), nano_bundle, threads) for threads in (1, 4))
    assert four - one == 3


def opening_says(folder: Path, bundle: Path, loaded: list[Path]) -> str:
    for library in loaded:
        ctypes.CDLL(str(library))
    return refused(Library(folder).open, bundle, **HERE)


def can_load(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def test_a_machine_without_it(built, nano_bundle):
    if apart(can_load, "libonnxruntime.so.1") or apart(can_load, "libonnxruntime.so"):
        pytest.skip("ONNX Runtime is installed in the system")
    said = apart(opening_says, built, nano_bundle, [])
    assert said.startswith("MISSING: ONNX Runtime is not installed (libonnxruntime.so.1: ")
    assert said.endswith("); install a release archive of it, and name its lib folder in LD_LIBRARY_PATH")


OLD = """
static const char* version(void) { return "1.20.1"; }
static const void* api(unsigned number) { return number ? 0 : 0; }
static const struct { const void* (*api)(unsigned); const char* (*version)(void); } base = {api, version};
const void* OrtGetApiBase(void) { return &base; }
"""


def test_one_that_is_too_old(built, nano_bundle, tmp_path):
    (tmp_path / "old.c").write_text(OLD)
    library = tmp_path / "libonnxruntime.so.1"
    run("cc", "-shared", "-fPIC", "-Wl,-soname,libonnxruntime.so.1", tmp_path / "old.c", "-o", library)
    assert apart(opening_says, built, nano_bundle, [library]) == (
        "BACKEND: ONNX Runtime 1.20.1 has no deformable convolution on the CPU; install 1.25 or newer"
    )
