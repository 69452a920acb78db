"""The C++ runtime's TensorRT-RTX backend on a simulated GPU: what differs from that of TensorRT.

No GPU and no TensorRT-RTX has run it. Its headers are in no package, so that module and simulated library are compiled
with headers of the tests, which have the same functions; TENSORRT_RTX_HOME names real ones.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from runtime_build import ROOT, GlipError, run
from simulated_tensorrt import write_engines
from test_tensorrt import (
    PROMPT,
    SHAPES,
    SIDE,
    Opened,
    Process,
    apart,
    number_of,
    opening_says,
    picture,
    refused,
    replace_record,
    simulation,
    system_has,
    told,
)

from glip_deploy import GlipError as PythonError
from glip_deploy.backends.trt_engine import _cache_file
from glip_deploy.bundle.engines import EngineRecord, Machine
from glip_deploy.bundle.manifest import Bundle

RTX = {"flavour": "tensorrt-rtx"}


@pytest.fixture(scope="module")
def simulated(runtime: Path) -> Path:
    """The folder of the runtime, with the simulated libraries."""
    if not list((runtime / "simulated").glob("libtensorrt_rtx.so.*")):
        pytest.skip("CUDA's headers are not here: pip install kernel-lens nvidia-cuda-runtime")
    return runtime


@pytest.fixture(scope="module")
def version(simulated: Path) -> str:
    """The version of the headers, as the simulated library tells it."""
    (library,) = (simulated / "simulated").glob("libtensorrt_rtx.so.*")
    return told(library)


@pytest.fixture
def bundle(nano_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(nano_bundle, tmp_path / "glip")
    return tmp_path / "glip"


@pytest.fixture(scope="module")
def process():
    opened = Process()
    yield opened
    opened.close()


# -- running ----------------------------------------------------------------------------------------------------------


def frames(folder, bundle, version):
    opened = Opened(folder, bundle, version, **RTX)
    assert opened.check(PROMPT).count("execute") == 1
    for _ in range(2):
        assert opened.check(PROMPT)[-2:] == ["launch", "wait"]
    log = opened.check(["penguin", "owl"])
    assert log[-2:] == ["launch", "wait"] and "execute" not in log
    # A stream of which TensorRT-RTX says that it cannot be recorded is not, and it is asked again later.
    small = np.ascontiguousarray(picture()[:100])
    opened.check(PROMPT, small)
    opened.gpu.refuse("capture")
    for _ in range(2):  # the second and the third
        assert "execute" in opened.check(PROMPT, small)
    opened.gpu.refuse("capture", False)
    assert "execute" in opened.check(PROMPT, small)  # the fifth is the next to be recorded
    assert opened.check(PROMPT, small)[-2:] == ["launch", "wait"]
    assert opened.check("owl")[-2:] == ["launch", "wait"]
    again = f"glip-build {bundle} --flavor tensorrt-rtx"
    opened.gpu.refuse("enqueue")
    message = refused(opened.detect, "owl", np.ascontiguousarray(picture()[:150]))
    assert message == f"BACKEND: tensorrt-rtx could not run the engine; {again} --overwrite"
    opened.gpu.refuse("enqueue", False)
    opened.close()


def test_frames_are_those_of_python_and_recorded_where_it_says_so(process, simulated, bundle, version):
    process.run(frames, simulated, bundle, version)


def content(folder):
    return {file.name: file.read_bytes() for file in (folder / "kernels").iterdir()}


def kernels(folder, bundle, version, cache):
    gpu = simulation(folder, number_of(version), "tensorrt-rtx")
    record = EngineRecord.read(write_engines(Bundle.open(bundle), version=version, **SHAPES, **RTX))
    library = gpu.library
    compiled = []

    def session(**more):
        before = gpu.trt.simulated_compiled()
        options = {"backend": b"tensorrt", "cache_dir": str(cache).encode(), "no_verify": 1, **SIDE, **more}
        detector = library.open(bundle, **options)
        prompt = library.encode(detector, PROMPT)
        assert library.detect(detector, prompt, picture(), 0.1)
        library.c.glip_prompt_free(prompt)
        library.c.glip_close(detector)
        assert gpu.left() == {}
        compiled.append(gpu.trt.simulated_compiled() - before)

    session()
    assert compiled.pop() > 0
    files = content(cache)
    assert (cache / "kernels").stat().st_mode & 0o777 == 0o700
    # Python finds the same files.
    python = {_cache_file(record.engines[plan].sha256, version, "Simulated GPU") for plan in record.engines}
    assert set(files) == {file.name for file in python} and all(file.parent == cache / "kernels" for file in python)
    session()
    assert compiled.pop() == 0
    gpu.trt.simulated_driver_number(2)  # it refuses what another driver compiled
    session()
    assert compiled.pop() > 0
    newer = content(cache)
    assert set(newer) == set(files) and newer != files
    # A folder that everyone may write to, what is damaged, no cache: all is compiled anew; none is written there.
    (cache / "kernels").chmod(0o777)
    session()
    assert compiled.pop() > 0
    assert content(cache) == newer
    (cache / "kernels").chmod(0o700)
    for name in newer:
        (cache / "kernels" / name).write_bytes(b"something else")
    session()
    assert compiled.pop() > 0
    assert content(cache) == newer
    session(no_cache=1)
    assert compiled.pop() > 0
    (cache / "kernels").rename(cache / "elsewhere")
    (cache / "kernels").write_bytes(b"a file")
    session()
    assert compiled.pop() > 0
    # Where it makes no cache, it runs without; without settings it does not.
    gpu.refuse("cache")
    session()
    gpu.refuse("cache", False)
    gpu.refuse("settings")
    message = refused(library.open, bundle, backend=b"tensorrt", no_cache=1)
    wanted = rf"BACKEND: .*text.plan: tensorrt-rtx {re.escape(version)} makes no settings of contexts; install it again"
    assert re.fullmatch(wanted, message)
    gpu.refuse("settings", False)
    assert gpu.left() == {}


def test_compiled_kernels_are_kept_in_python_s_files(simulated, bundle, version, tmp_path, monkeypatch):
    monkeypatch.setenv("GLIP_DEPLOY_CACHE", str(tmp_path / "cache"))
    apart(kernels, simulated, bundle, version, tmp_path / "cache")


# -- engines ----------------------------------------------------------------------------------------------------------


def says(folder, bundle, version):
    gpu = simulation(folder, number_of(version), "tensorrt-rtx")
    try:
        gpu.library.c.glip_close(gpu.library.open(bundle, backend=b"tensorrt", no_cache=1))
    except GlipError as error:
        assert gpu.left() == {}
        return str(error)
    assert gpu.left() == {}
    return ""


def test_engines_for_something_else_are_refused_in_python_s_words(process, simulated, bundle, version):
    opened = Bundle.open(bundle)
    folder = write_engines(opened, version=version, **SHAPES, **RTX)
    built = EngineRecord.read(folder)
    minor = ".".join(version.split(".")[:2])
    for change in ({"version": f"{minor}.99"}, {"compute_capability": 90}, {"manifest_sha256": "0" * 64}):
        record = replace_record(built, change)
        record.write(folder)
        with pytest.raises(PythonError) as caught:
            record.check(folder, opened, Machine("tensorrt-rtx", version, "Simulated GPU", 80))
        assert "--flavor tensorrt-rtx" in str(caught.value)
        assert process.run(says, simulated, bundle, version) == f"MISSING: {caught.value}"
    replace_record(built, {"gpu": "Another GPU"}).write(folder)  # it finishes kernels on the target
    assert process.run(says, simulated, bundle, version) == ""
    replace_record(built, {"version": "9.9.1"}).write(folder)
    assert process.run(says, simulated, bundle, version) == (
        f"MISSING: engines {folder} were built by tensorrt-rtx 9.9.1, this library was compiled for TensorRT-RTX"
        f" {minor}; compile it with the headers of tensorrt-rtx 9.9.1, or build engines with TensorRT-RTX {minor}"
    )


def another_minor(folder, bundle, version):
    major, minor = (int(part) for part in version.split(".")[:2])
    return says(folder, bundle, f"{major}.{minor + 1}.0")


def test_a_library_of_another_minor_version_is_not_used(simulated, bundle, version):
    """Its classes have their functions in other places."""
    write_engines(Bundle.open(bundle), version=version, **SHAPES, **RTX)
    major, minor = (int(part) for part in version.split(".")[:2])
    assert apart(another_minor, simulated, bundle, version) == (
        f"MISSING: tensorrt-rtx {major}.{minor + 1}.0.34 is installed, and the engines were built by tensorrt-rtx"
        f" {version}; install that, or build them again"
    )


def both_flavors(folder, bundle, version, full):
    rtx, trt = simulation(folder, number_of(version), "tensorrt-rtx"), simulation(folder, number_of(full))
    library = rtx.library

    def opens(**options):
        """How many engines of each flavor are loaded, or what is said."""
        try:
            detector = library.open(bundle, backend=b"tensorrt", no_cache=1, no_verify=1, **options)
        except GlipError as error:
            return str(error)
        loaded = rtx.trt.simulated_engines(), trt.trt.simulated_engines()
        library.c.glip_close(detector)
        return loaded

    opened = Bundle.open(bundle)
    first = write_engines(opened, "a-rtx", version=version, **SHAPES, **RTX)
    second = write_engines(opened, "b-full", version=full, **SHAPES)
    write_engines(opened, "c-rtx", version=version, **SHAPES, **RTX)
    assert opens() == (2, 0)
    assert opens(engines=b"b-full") == (0, 2)
    # Those that do not fit, and those that cannot be read, are passed over, whatever their flavor.
    replace_record(EngineRecord.read(first), {"compute_capability": 90}).write(first)
    assert opens() == (0, 2)
    assert "were built for SM90" in opens(engines=b"a-rtx")
    (second / "build.json").write_text("{")
    assert opens() == (2, 0)
    assert "build.json is damaged" in opens(engines=b"b-full")
    assert rtx.left() == trt.left() == {}


def test_the_record_decides_which_library_runs_it(process, simulated, bundle, version):
    full = told(next((simulated / "simulated").glob("libnvinfer.so.*")))
    process.run(both_flavors, simulated, bundle, version, full)


# -- machines that lack something -------------------------------------------------------------------------------------


def test_a_machine_without_tensorrt_rtx(simulated, bundle, version):
    name = f"libtensorrt_rtx.so.{version.split('.')[0]}"
    system_has(name)
    write_engines(Bundle.open(bundle), version=version, **SHAPES, **RTX)
    said = apart(opening_says, simulated, bundle, [simulated / "simulated" / "libcuda.so.1"])
    assert said.startswith(f"MISSING: tensorrt-rtx {version} is not installed ({name}: ")
    assert said.endswith("); install it, or name its folder in LD_LIBRARY_PATH")


def test_a_build_without_it_says_what_to_build(simulated, bundle, version, tmp_path):
    write_engines(Bundle.open(bundle), version=version, **SHAPES, **RTX)
    for name in ("libglip.so", "libglip_tensorrt.so"):
        shutil.copy(simulated / name, tmp_path / name)
    said = apart(opening_says, tmp_path, bundle, [])
    assert said.startswith("MISSING: backend tensorrt_rtx cannot be loaded (")
    assert "libglip_tensorrt_rtx.so" in said
    assert said.endswith("); build it with the headers of TensorRT-RTX and CUDA, and keep it beside libglip.so")


def test_headers_of_the_other_flavor_are_refused(tmp_path):
    source = ROOT / "engines" / "runtime" / "src" / "trt_interface.hpp"
    for define, major, words in (
        (["-DGLIP_RTX"], 10, "these are the headers of TensorRT, not of TensorRT-RTX; set TENSORRT_RTX_DIR"),
        ([], 1, "TensorRT 8.6 or newer is needed; set TENSORRT_DIR"),
    ):
        header = f"#define NV_TENSORRT_MAJOR {major}\n#define NV_TENSORRT_MINOR 6\n"
        (tmp_path / "NvInferRuntime.h").write_text(header)
        command = ["c++", "-fsyntax-only", "-x", "c++", *define, f"-I{tmp_path}", source]
        with pytest.raises(AssertionError, match=words):
            run(*command)
