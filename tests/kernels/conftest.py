"""Makes `kernels` (in benchmarks/) importable; the kernels' arithmetic on the host."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest

from glip_deploy.errors import GlipError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def host_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The ctypes layer on the host build of the same arithmetic: fp32, in the CPU's memory."""
    from glip_engines.compile import build_host_library
    from glip_engines.compilers import find_host_compiler

    try:
        find_host_compiler()
    except GlipError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("GLIP_DEPLOY_CACHE", str(tmp_path))
    host = ctypes.CDLL(str(build_host_library()))
    host.glip_deform_host_problem_error.restype = ctypes.c_char_p
    host.glip_deform_host_packed_weight_bytes.restype = ctypes.c_ulonglong

    class Shim:
        glip_deform_problem_error = staticmethod(host.glip_deform_host_problem_error)
        glip_deform_packed_weight_bytes = staticmethod(host.glip_deform_host_packed_weight_bytes)

        @staticmethod
        def glip_deform_workspace_bytes(problem: Any) -> Any:
            return 0

        @staticmethod
        def glip_deform_pack_weights(problem: Any, weight: Any, packed: Any, stream: int) -> Any:
            pointers = (ctypes.c_void_p(value) for value in (problem, weight, packed))
            host.glip_deform_host_pack_weights(*pointers)
            return 0

        @staticmethod
        def glip_deform_launch(problem: Any, workspace: Any, size: int, stream: int) -> Any:
            return host.glip_deform_host_run(ctypes.c_void_p(problem), 32)

    from kernels import kernel

    monkeypatch.setattr(kernel, "_stream", lambda: 0)
    library = object.__new__(kernel.DeformLibrary)
    library._library = Shim
    return library
