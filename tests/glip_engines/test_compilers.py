"""Compilers are found where people have them, and a message says what to install where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from glip_engines import compilers
from glip_engines.compilers import Nvcc, find_host_compiler, find_nvcc, find_nvrtc, find_tensorrt_headers

from glip_deploy.errors import MissingPackage


def hide_compilers(monkeypatch, tmp_path):
    monkeypatch.setattr(compilers, "_package_folders", lambda: iter([]))
    monkeypatch.setattr(compilers, "_SYSTEM_CUDA", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)


def test_missing_compilers(monkeypatch, tmp_path):
    hide_compilers(monkeypatch, tmp_path)
    with pytest.raises(MissingPackage, match="pip install nvidia-cuda-nvcc"):
        find_nvcc()
    with pytest.raises(MissingPackage, match=r"apt-get install g\+\+"):
        find_host_compiler()


@pytest.mark.parametrize(("arch", "package"), [(60, "nvidia-cuda-nvrtc-cu12"), (90, "nvidia-cuda-nvrtc$")])
def test_a_missing_nvrtc(monkeypatch, tmp_path, arch, package):
    hide_compilers(monkeypatch, tmp_path)

    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(compilers.ctypes, "CDLL", no_library)
    with pytest.raises(MissingPackage, match=package):
        find_nvrtc(arch)


def test_cuda_home_comes_first(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc() == Nvcc(nvcc, "12.4")
    assert find_nvcc().oldest < 60


def test_headers_of_another_tensorrt(monkeypatch, tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInfer.h").touch()
    (tmp_path / "include" / "NvInferVersion.h").write_text("#define TRT_MAJOR_ENTERPRISE 10\n")
    monkeypatch.setenv("TENSORRT_HOME", str(tmp_path))
    assert find_tensorrt_headers() == tmp_path / "include"
    with pytest.raises(MissingPackage, match=r"NvInfer.h of TensorRT 8.6 is not .*point \$TENSORRT_HOME"):
        find_tensorrt_headers(of_8=True)


def test_importing_starts_no_compiler():
    code = "import glip_engines.compile, sys; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    environment = {**os.environ, "PATH": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
