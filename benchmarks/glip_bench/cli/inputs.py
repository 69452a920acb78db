"""What a measurement runs on: what the options name, or, with --quick, what `make demo` left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glip_deploy.bundle.manifest import MANIFEST
from glip_deploy.errors import OptionError

__all__ = ["Inputs", "find_inputs", "own_picture"]

PROMPT = "person. bicycle. car. traffic light. hair drier"
"""14 tokens, as the reference timings of the official code have."""


@dataclass(frozen=True)
class Inputs:
    """What a measurement runs on."""

    bundle: Path
    checkpoint: Path | None = None
    frames: str | None = None
    """None for the photograph of glip-export."""
    prompt: str = PROMPT


DEMOS = (
    # GLIP-nano knows pictograms, and is small enough for the forms in torch.
    Inputs(
        Path("build/demo/glip_nano"),
        Path("examples/nano/glip_nano.pth"),
        "examples/nano/media/scene.jpg",
        "dog. red apple. bicycle. guitar. penguin. owl",
    ),
    Inputs(Path("build/demo/glip_t")),
)
"""What `make demo` and `make demo-full` leave."""


def find_inputs(
    model: Path | None,
    checkpoint: Path | None = None,
    frames: str | None = None,
    prompt: str | None = None,
    *,
    quick: bool = False,
) -> Inputs:
    """Complete what the options name.

    Args:
        model: the bundle.
        checkpoint: the file that it was exported from.
        frames: a source of frames.
        prompt: what to look for.
        quick: where no model is named, take what a demo left in the working directory, with its frames and prompt.

    Raises:
        OptionError: no model is named, or found.
    """
    if model is None:
        if not quick:
            raise OptionError("no model is named; give the bundle that glip-export wrote with --model DIR")
        demo = next((demo for demo in DEMOS if (demo.bundle / MANIFEST).is_file()), None)
        if demo is None:
            places = ", ".join(str(demo.bundle) for demo in DEMOS)
            raise OptionError(f"--quick finds no bundle in {places}; run `make demo`, or name one with --model")
        model = demo.bundle
        if checkpoint is None and demo.checkpoint is not None and demo.checkpoint.is_file():
            checkpoint = demo.checkpoint
        if frames is None and demo.frames is not None and Path(demo.frames).is_file():
            frames, prompt = demo.frames, prompt or demo.prompt
    return Inputs(model, checkpoint, frames, prompt or PROMPT)


def own_picture() -> str:
    """Return the photograph that travels with glip-export, without importing torch.

    Raises:
        OptionError: glip_export is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec("glip_export")
    if spec is None or not spec.submodule_search_locations:
        raise OptionError("glip_export and its picture are not installed; name one with --frames")
    return str(Path(spec.submodule_search_locations[0]) / "data" / "picture.jpg")
