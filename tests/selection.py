"""Which tests `make test` leaves to `make test-slow`."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

__all__ = ["SLOW", "slow", "slowly"]

SLOW = os.environ.get("GLIP_SLOW") == "1"
"""Whether tests run that take long or show a variant of what others show."""

slow = (pytest.mark.slow, pytest.mark.skipif(not SLOW, reason="takes long: GLIP_SLOW=1 runs it"))
"""Marks of a case that is run by `make test-slow` alone."""


def slowly(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test, all its cases, to be run by `make test-slow` alone."""
    for mark in slow:
        test = mark(test)
    return test
