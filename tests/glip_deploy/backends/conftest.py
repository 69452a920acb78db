"""The TensorRT backend on a simulated GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from simulated_tensorrt import VERSION, SimulatedCuda, simulated_tensorrt, write_engines

from glip_deploy.backends import tensorrt
from glip_deploy.backends.tensorrt import TensorRTBackend
from glip_deploy.bundle.manifest import Bundle


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A copy that a test may change; nothing is loaded or cached yet."""
    monkeypatch.setenv("GLIP_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tensorrt, "_RUNTIMES", {})
    monkeypatch.setattr(tensorrt, "_PLUGINS", set())
    shutil.copytree(tiny_bundle, tmp_path / "glip")
    return Bundle.open(tmp_path / "glip")


@pytest.fixture
def cuda() -> SimulatedCuda:
    return SimulatedCuda()


@pytest.fixture
def opened(bundle: Bundle, cuda: SimulatedCuda) -> Callable[..., TensorRTBackend]:
    """Opens the backend on engines of these shapes."""

    def open_it(version: str = VERSION, **shapes: Any) -> TensorRTBackend:
        folder, gpu = write_engines(bundle, version=version, **shapes), cast(Any, cuda)
        return TensorRTBackend.open(bundle, folder, cuda=gpu, trt=simulated_tensorrt(gpu, version))

    return open_it
