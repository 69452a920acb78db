"""The plugin as TensorRT 10 and later use it, on a CPU."""

import ctypes

import pytest
from engine_needs import skip_without
from glip_engines.compilers import cuda_headers, find_host_compiler, find_tensorrt_headers


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The adapter for TensorRT 10 and later with the kernels' host build (plugin_harness.cpp)."""
    from plugin_execution import build_harness

    skip_without(find_host_compiler, find_tensorrt_headers, cuda_headers)
    return build_harness(tmp_path_factory.mktemp("harness"))
