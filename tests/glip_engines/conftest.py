"""A bundle to build engines from, and the plugin as TensorRT 10 and later use it, on a CPU."""

import ctypes
import shutil
from pathlib import Path

import pytest
from engine_needs import skip_without
from glip_engines.compilers import cuda_headers, find_host_compiler, find_tensorrt_headers


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may change."""
    return shutil.copytree(tiny_bundle, tmp_path / "glip")


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The adapter for TensorRT 10 and later with the kernels' host build (plugin_harness.cpp)."""
    from plugin_execution import build_harness

    skip_without(find_host_compiler, find_tensorrt_headers, cuda_headers)
    return build_harness(tmp_path_factory.mktemp("harness"))
