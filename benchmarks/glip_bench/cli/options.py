"""The options of glip-bench, each declared once; a command takes those that it has a use for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from glip_deploy.cli.arguments import at_least, flag, probability

__all__ = ["FrameSize"]

WHAT, HOW, OUTPUT = "What is measured", "How it is measured", "Output"
"""Panels of the help."""


@dataclass(frozen=True)
class FrameSize:
    """Of a frame, in pixels."""

    height: int
    width: int


def frame_size(text: str) -> FrameSize:
    """Parse WIDTHxHEIGHT, as in 1920x1080."""
    width, cross, height = text.lower().partition("x")
    if not cross or not (width.isdecimal() and height.isdecimal()) or not (int(width) and int(height)):
        raise typer.BadParameter(f"{text!r} is not a size; write width x height in pixels, as in 1920x1080")
    return FrameSize(int(height), int(width))


def frame_rate(text: str) -> float:
    """Parse a number of frames a second, above 0 and up to 1000."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1000:
        raise typer.BadParameter(f"{text!r} is not a number of frames a second, above 0 and up to 1000")
    return value


def _option(*names: str, metavar: str, text: str, panel: str = WHAT, parser: Callable[[str], Any] | None = None) -> Any:
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel, parser=parser)


Model = Annotated[Path | None, _option("--model", metavar="DIR", text="Bundle that glip-export wrote.")]
Checkpoint = Annotated[
    Path | None, _option("--checkpoint", metavar="FILE", text="The .pth it was exported from, for the torch subjects.")
]
Subjects = Annotated[
    str | None,
    _option(
        "--subjects", metavar="A,B", text="In this order; others are compared with the first. Default: all that can run"
    ),
]
Yardsticks = Annotated[
    bool,
    flag("--yardsticks", help="Other detectors too, of real size, with random weights, by transformers.", panel=WHAT),
]
Frames = Annotated[
    str | None,
    _option("--frames", "--picture", metavar="SOURCE", text="Picture, folder, glob or video. Default: our photograph"),
]
Frame = Annotated[
    FrameSize | None, _option("--frame", metavar="WxH", text="Frame size. Default: 1600x960", parser=frame_size)
]
Prompt = Annotated[str | None, _option("--prompt", metavar="TEXT", text="What to look for. Default: five classes")]
Threshold = Annotated[float, _option("--threshold", metavar="SCORE", text="Of a box that counts.", parser=probability)]
ShortestSide = Annotated[
    int | None,
    _option("--shortest-side", metavar="PX", text="Network size. Default: 800; 320 with --quick", parser=at_least(1)),
]
LongestSide = Annotated[
    int, _option("--longest-side", metavar="PX", text="Limit of the other side, 0 for none.", parser=at_least(0))
]
Images = Annotated[Path, _option("--images", metavar="DIR", text="Folder of the set's pictures.")]
Limit = Annotated[int | None, _option("--limit", metavar="N", text="Only the first N pictures.", parser=at_least(1))]
ClassesPerPrompt = Annotated[
    int | None,
    _option("--classes-per-prompt", metavar="N", text="At most. Default: as many as fit", parser=at_least(1)),
]
Sweeps = Annotated[
    list[str] | None,
    _option("--sweep", metavar="AXIS=A,B", text="Also the cost of these tokens, classes, side, batch or bundle."),
]

Runs = Annotated[
    int | None,
    _option("--runs", metavar="N", text="Timed frames of each subject. Default: 7", panel=HOW, parser=at_least(1)),
]
Quick = Annotated[
    bool, flag("--quick", help="Under a minute on two cores; finds what `make demo` left under build/.", panel=HOW)
]
Threads = Annotated[
    int | None,
    _option("--threads", metavar="N", text="CPU threads. Default: one a core", panel=HOW, parser=at_least(1)),
]
FrameRate = Annotated[
    float | None,
    _option(
        "--frame-rate", metavar="FPS", text="Also latency and drops with such a camera.", panel=HOW, parser=frame_rate
    ),
]
NoMemory = Annotated[bool, flag("--no-memory", help="Leave out peak memory (a fresh process a subject).", panel=HOW)]
NoDetails = Annotated[bool, flag("--no-details", help="Leave out blocks of the network, prompts, resizing.", panel=HOW)]

Json = Annotated[Path | None, _option("--json", metavar="FILE", text="Also write the result.", panel=OUTPUT)]
Resume = Annotated[bool, flag("--resume", help="Continue the interrupted run in the file of --json.", panel=OUTPUT)]
Report = Annotated[
    Path | None, _option("--report", metavar="DIR", text="Also write report.md with plots.", panel=OUTPUT)
]
Compare = Annotated[
    Path | None,
    _option("--compare", metavar="OLD", text="Compare with an old result; exit status 3 if worse.", panel=OUTPUT),
]
Quiet = Annotated[bool, flag("--quiet", help="Print only the result.", panel=OUTPUT)]
