"""What tests of engines need and a machine may lack: compilers, TensorRT-RTX, time. Skips say what to install."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from glip_engines.flavours import Flavour, installed

from glip_deploy.errors import MissingPackage


def missing(*finders: Callable[[], object]) -> str:
    """Return why one of these finds nothing here, or an empty string."""
    for finder in finders:
        try:
            finder()
        except MissingPackage as error:
            return str(error)
    return ""


def needs(*finders: Callable[[], object]) -> pytest.MarkDecorator:
    """Return a mark that skips a test where one of these finds nothing."""
    reason = missing(*finders)
    return pytest.mark.skipif(bool(reason), reason=reason or "all is here")


def skip_without(*finders: Callable[[], object]) -> None:
    """Skip the running test, or all that use the running fixture, where one of these finds nothing."""
    reason = missing(*finders)
    if reason:
        pytest.skip(reason)


needs_rtx = pytest.mark.skipif(
    not installed(Flavour.RTX), reason="tensorrt-rtx is not installed: pip install 'glip-deploy[tensorrt-rtx]'"
)
