"""The program that `glip-export --engine` goes on with, found among the installed packages.

Engines are built from bundles, never the other way round, so nothing here names the package that does it: it registers
itself under the entry point group `GROUP`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Protocol, cast

from glip_deploy.errors import MissingPackage

__all__ = ["GROUP", "EngineBuilder", "find_engine_builder"]

GROUP = "glip_deploy.engine_builder"
"""Entry point group; what an entry point loads has the functions of `EngineBuilder`."""


class EngineBuilder(Protocol):
    """A module or object that builds the engines of a bundle."""

    def check_options(self, options: Sequence[str]) -> None:
        """Raise a GlipError, or the error of bad usage, for options that cannot be used; there is no bundle yet."""

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Build as a command would for the arguments BUNDLE OPTION..., and return its exit status."""


def find_engine_builder() -> EngineBuilder:
    """Return the engine builder that is installed; of several, the first by name.

    Raises:
        MissingPackage: there is none.
    """
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    if not found:
        raise MissingPackage(
            "--engine needs an engine builder, and none is installed; pip install 'glip-deploy[build,tensorrt]',"
            " or leave --engine out"
        )
    return cast(EngineBuilder, found[0].load())
