"""What of `glip-build` cannot be done on Windows is refused in one line; the rest asks Windows' own driver."""

from __future__ import annotations

import ctypes
import sys

import pytest
from glip_engines import builder, flavours
from glip_engines.options import BuildOptions

from glip_deploy.errors import EngineError


@pytest.fixture(autouse=True)
def windows(monkeypatch):
    monkeypatch.setattr(flavours, "installed", lambda flavour: True)
    monkeypatch.setattr(sys, "platform", "win32")


@pytest.mark.parametrize("given", [True, False])
def test_the_plugin_is_refused_before_anything_is_compiled(tiny_bundle, tmp_path, given):
    library = tmp_path / "plugin.dll"
    library.touch()
    options = BuildOptions(flavour="tensorrt-rtx", form="plugin", plugin=library if given else None, arch="SM80")
    with pytest.raises(EngineError, match=r"--form plugin needs Linux, .*; use --form native"):
        builder.build_engines(tiny_bundle, options)
    assert not (tiny_bundle / "engines").exists()


def test_the_driver_has_another_name(monkeypatch):
    asked = []

    def library(name):
        asked.append(name)
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", library)
    assert flavours.current_gpu() is None
    assert asked == ["nvcuda.dll"]
