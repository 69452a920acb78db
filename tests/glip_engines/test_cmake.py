"""The CMake build, as C++ users run it."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engine_needs import skip_without
from glip_engines.compilers import find_host_compiler, find_nvcc, find_tensorrt_headers
from selection import slow

# The development extra brings one, which need not be on the PATH.
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
ENGINES = Path(__file__).resolve().parents[2] / "engines"


@pytest.fixture(scope="module", autouse=True)
def cmake():
    if CMAKE is None:
        pytest.skip("there is no cmake; pip install cmake")
    skip_without(find_host_compiler)


def configure(folder, *options):
    done = subprocess.run([CMAKE, "-S", ENGINES, "-B", folder, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(folder):
    done = subprocess.run([CMAKE, "--build", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout + done.stderr
    return {file.name for file in folder.glob("*.so")}


def test_without_nvcc_the_host_library_is_built(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "none"))
    said = configure(tmp_path / "build", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert "No nvcc: the CUDA library and the plugin are left out" in said
    assert build(tmp_path / "build") == {"libglip_deform_host.so"}
    assert ctypes.CDLL(str(tmp_path / "build" / "libglip_deform_host.so")).glip_deform_host_run


# None: all that CMakeLists.txt lists; test_compile.py compiles them one by one in every run.
@pytest.mark.parametrize("arches", ["75-real", pytest.param(None, marks=slow)])
def test_with_nvcc_and_headers_all_three_are_built(tmp_path, arches):
    skip_without(find_nvcc, find_tensorrt_headers)
    nvcc, headers = find_nvcc(), find_tensorrt_headers()
    only = [] if arches is None else [f"-DCMAKE_CUDA_ARCHITECTURES={arches}"]
    said = configure(
        tmp_path,
        *only,
        f"-DCMAKE_CUDA_COMPILER={nvcc.path}",
        f"-DTENSORRT_HOME={headers}",
    )
    assert "the plugin is built from plugin/adapter_v3.cpp" in said
    assert build(tmp_path) == {"libglip_deform_host.so", "libglip_deform.so", "libglip_deform_tensorrt.so"}
    assert ctypes.CDLL(str(tmp_path / "libglip_deform.so")).glip_deform_launch
    plugin = ctypes.CDLL(str(tmp_path / "libglip_deform_tensorrt.so"))
    assert plugin.getCreators and plugin.setLoggerFinder
