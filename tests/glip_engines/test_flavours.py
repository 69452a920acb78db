"""Which TensorRT is chosen, and what is said where there is none."""

from __future__ import annotations

import pytest
from glip_engines.flavours import Flavour, choose_flavour, installed

from glip_deploy.errors import MissingPackage, OptionError


def test_flavours_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("glip_engines.flavours.installed", lambda flavour: False)
    with pytest.raises(MissingPackage, match=r"neither tensorrt nor tensorrt-rtx is installed; pip install"):
        choose_flavour(None)
    with pytest.raises(MissingPackage, match=r"tensorrt is not installed; pip install 'glip-deploy\[tensorrt\]'"):
        choose_flavour("tensorrt")
    with pytest.raises(OptionError, match=r'flavour is "onnx"; legal is tensorrt or tensorrt-rtx'):
        choose_flavour("onnx")


def test_type_stubs_do_not_count_as_installed(tmp_path, monkeypatch):
    """The package tensorrt-stubs leaves a folder that imports as an empty package."""
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").touch()
    monkeypatch.syspath_prepend(tmp_path)
    if not installed(Flavour.TENSORRT):
        return
    import tensorrt

    assert tensorrt.__file__ is not None
