"""The options of glip-bench, each declared once; a command takes those that it has a use for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from glip_deploy.backends import MAX_THREADS
from glip_deploy.cli.arguments import at_least, flag, probability

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


def _in(panel: str) -> Callable[..., Any]:
    def option(names: str, metavar: str, text: str, parser: Callable[[str], Any] | None = None) -> Any:
        return typer.Option(*names.split(), metavar=metavar, help=text, rich_help_panel=panel, parser=parser)

    return option


_what, _how, _out = (_in(panel) for panel in (WHAT, HOW, OUTPUT))
_positive, _or_none = at_least(1), at_least(0)

Model = Annotated[Path | None, _what("--model", "DIR", "Bundle that glip-export wrote.")]
Checkpoint = Annotated[Path | None, _what("--checkpoint", "FILE", "The .pth it was exported from, to run in torch.")]
Subjects = Annotated[str | None, _what("--subjects", "A,B", "In this order; others are compared with the first.")]
Yardsticks = Annotated[bool, flag("--yardsticks", help="Other detectors too, with random weights.", panel=WHAT)]
Frames = Annotated[str | None, _what("--frames --picture", "SOURCE", "Picture, folder, glob or video.")]
Frame = Annotated[FrameSize | None, _what("--frame", "WxH", "Frame size. Default: 1600x960", frame_size)]
Prompt = Annotated[str | None, _what("--prompt", "TEXT", "What to look for. Default: five classes")]
Threshold = Annotated[float, _what("--threshold", "SCORE", "Of a box that counts.", probability)]
ShortestSide = Annotated[int | None, _what("--shortest-side", "PX", "Of the network. Default: 800", _positive)]
LongestSide = Annotated[int, _what("--longest-side", "PX", "Its limit, 0 for none.", _or_none)]
ImagesIfRun = Annotated[Path | None, _what("--images", "DIR", "Folder of the set's pictures.")]
Images = Annotated[Path, _what("--images", "DIR", "Folder of the set's pictures.")]
Limit = Annotated[int | None, _what("--limit", "N", "Only the first N pictures.", _positive)]
ClassesPerPrompt = Annotated[
    int | None, _what("--classes-per-prompt", "N", "At most. Default: as many as fit; of LVIS 40", _positive)
]
CustomPrompts = Annotated[Path | None, _what("--prompts", "YAML", "What to ask for in place of the classes' names.")]
Predictions = Annotated[Path | None, _what("--predictions", "JSON", "Judge these results; nothing is run.")]
Sweeps = Annotated[list[str] | None, _what("--sweep", "AXIS=A,B", "Also the cost of these sizes, as `sweep` has it.")]

Sample = Annotated[int | None, _how("--sample", "N", "Time only N of the prompts. Default: all", _positive)]
Runs = Annotated[int | None, _how("--runs", "N", "Timed frames of each subject. Default: 7", _positive)]
Quick = Annotated[bool, flag("--quick", help="Under a minute, at 320 pixels; on what `make demo` left.", panel=HOW)]
Untrusted = Annotated[bool, flag("--untrusted", help="Refuse native code in the bundle, such as engines.", panel=HOW)]
NoPlugins = Annotated[bool, flag("--no-plugins", help="Load no plugin library.", panel=HOW)]
Threads = Annotated[int | None, _how("--threads", "N", "CPU threads. Default: one a core", at_least(1, MAX_THREADS))]
FrameRate = Annotated[float | None, _how("--frame-rate", "FPS", "Also latency and drops at this rate.", frame_rate)]
NoMemory = Annotated[bool, flag("--no-memory", help="Leave out peak memory (a fresh process a subject).", panel=HOW)]
NoDetails = Annotated[bool, flag("--no-details", help="Leave out blocks, prompts, resizing, limits.", panel=HOW)]

Json = Annotated[Path | None, _out("--json", "FILE", "Also write the result.")]
Resume = Annotated[bool, flag("--resume", help="Continue the interrupted run in the file of --json.", panel=OUTPUT)]
Report = Annotated[Path | None, _out("--report", "DIR", "Also write report.md with plots.")]
Compare = Annotated[Path | None, _out("--compare", "OLD", "Compare with an old result; exit status 3 if worse.")]
Quiet = Annotated[bool, flag("--quiet", help="Print only the result.", panel=OUTPUT)]
