"""The options with which every command opens a detector: the same words in all of them."""

from __future__ import annotations

from typing import Annotated

from glip_deploy.backends import BACKENDS, MAX_THREADS
from glip_deploy.backends.openvino import Precision
from glip_deploy.cli.arguments import at_least, flag, option
from glip_deploy.frames.canvas import Resize

__all__ = [
    "BACKEND",
    "ENGINES",
    "HOW",
    "LONGEST_SIDE",
    "NO_PLUGINS",
    "NO_VERIFY",
    "PRECISION",
    "RESIZE",
    "SHORTEST_SIDE",
    "THREADS",
    "UNTRUSTED",
]

HOW = "How to run"
"""Their group in `--help`."""

SHORTEST_SIDE = Annotated[int, option("PX", "Resize to this.", HOW, at_least(1))]
LONGEST_SIDE = Annotated[int, option("PX", "But no longer than this; 0 for no limit.", HOW, at_least(0))]
RESIZE = Annotated[
    Resize | None,
    option(
        "HOW",
        "exact, as GLIP was evaluated; fast changes results a little; gpu (tensorrt). Default: gpu or exact.",
        HOW,
    ),
]
BACKEND = Annotated[str, option("NAME", f"{', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}.", HOW)]
PRECISION = Annotated[
    Precision | None,
    option("HOW", "openvino: f32, bf16, or auto for bf16 where the CPU has it (default: f32).", HOW),
]
ENGINES = Annotated[str | None, option("DIR", "tensorrt: folder of engines (default: the first that fit).", HOW)]
UNTRUSTED = Annotated[
    bool, flag("--untrusted", "The bundle is a stranger's: refuse native code in it (engines, plugins).", HOW)
]
NO_PLUGINS = Annotated[
    bool, flag("--no-plugins", "tensorrt: load no plugin library, only engines that need none.", HOW)
]
THREADS = Annotated[int | None, option("N", "CPU threads (default: one a core).", HOW, at_least(1, MAX_THREADS))]
NO_VERIFY = Annotated[bool, flag("--no-verify", "Do not check the bundle's hashes.", HOW)]
