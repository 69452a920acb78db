"""What a build may be asked for, and how sizes and ranges are written on a command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from glip_deploy.errors import OptionError
from glip_deploy.frames.geometry import SIZE_DIVISOR, ceil_div, ceil_to

__all__ = [
    "BUCKETS",
    "FORMS",
    "MAX_SIDE",
    "PRECISIONS",
    "BuildOptions",
    "Range",
    "parse_bytes",
    "parse_canvas",
    "parse_range",
    "parse_size",
    "parse_tokens",
]

PRECISIONS = ("fp32", "fp16", "bf16")
FORMS = ("native", "plugin")
"""Of the deformable convolution: TensorRT's own operators, or the kernels of `engines/plugin`."""
BUCKETS = (16, 32, 64, 128, 256)
"""Prompt lengths that suit `BuildOptions.tokens`; a prompt is padded to the next one. Each is an optimization profile
with kernels of its own: faster to run than one range, and as many times slower to build."""
MAX_SIDE = 8192
"""Longest side of a canvas, in pixels."""


@dataclass(frozen=True)
class Range:
    """Smallest, best and largest size of an axis; kernels are chosen for the best."""

    least: int
    best: int
    most: int

    @classmethod
    def fixed(cls, size: int) -> Range:
        """Return the range of a single size."""
        return cls(size, size, size)

    @property
    def is_fixed(self) -> bool:
        """Whether there is a single size."""
        return self.least == self.most

    def __floordiv__(self, stride: int) -> Range:
        """Return the range of a side of feature maps that have a location for every `stride` pixels, rounded up."""
        return Range(*(ceil_div(side, stride) for side in (self.least, self.best, self.most)))

    def __str__(self) -> str:
        return str(self.best) if self.is_fixed else f"{self.least}:{self.best}:{self.most}"


@dataclass(frozen=True)
class BuildOptions:
    """What to build. None takes the default that `glip_engines.builder.build_engines` describes."""

    flavour: str | None = None
    precision: str | None = None
    form: str | None = None
    plugin: Path | None = None
    height: Range | None = None
    width: Range | None = None
    tokens: tuple[Range, ...] | None = None
    """One optimization profile for each: fixed lengths (`BUCKETS`), or one range."""
    classes: Range | None = None
    batch: Range = Range(1, 1, 1)
    workspace: int | None = None
    """Bytes the builder may use for intermediate results of one layer."""
    timing_cache: Path | None = None
    optimization_level: int | None = None
    arch: str | None = None
    name: str | None = None
    """Name of the folder below the bundle's `engines`."""
    split: bool = False
    """Also build the image branch in two parts, for several prompts on a frame."""
    overwrite: bool = False
    verify: bool = True
    """Whether to run the engines before they are delivered, where there is a GPU for them."""


def parse_range(text: str, option: str) -> Range:
    """Read "N" or "MIN:BEST:MAX".

    Raises:
        OptionError: neither, or not in order.
    """
    match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}):(\d{1,9}))?", text.strip())
    if match is None:
        raise OptionError(f'{option} is "{text}"; write one number, or MIN:BEST:MAX such as 1:8:80')
    numbers = [int(part) for part in match.groups() if part is not None]
    if numbers[0] < 1:
        raise OptionError(f"{option} is {text}; the smallest is 1")
    if numbers != sorted(numbers):
        raise OptionError(f"{option} is {text}; write it in order, MIN:BEST:MAX")
    return Range.fixed(numbers[0]) if len(numbers) == 1 else Range(*numbers)


def parse_tokens(text: str) -> tuple[Range, ...]:
    """Read prompt lengths, "16,32,64", shortest first and each once, or one range.

    Raises:
        OptionError: neither.
    """
    buckets = [parse_range(part, "--tokens") for part in text.split(",")]
    if len(buckets) > 1 and not all(bucket.is_fixed for bucket in buckets):
        raise OptionError(f'--tokens is "{text}"; write lengths such as 16,32,64, or one range MIN:BEST:MAX')
    return tuple(sorted(set(buckets), key=lambda bucket: bucket.most))


def parse_size(text: str, option: str) -> tuple[int, int]:
    """Read "HEIGHTxWIDTH", both multiples of 32.

    Raises:
        OptionError: something else.
    """
    match = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", text.strip())
    if match is None:
        raise OptionError(f'{option} is "{text}"; write HEIGHTxWIDTH such as 800x1344')
    height, width = (int(side) for side in match.groups())
    for side in (height, width):
        if side % SIZE_DIVISOR or not SIZE_DIVISOR <= side <= MAX_SIDE:
            near = min(max(ceil_to(side, SIZE_DIVISOR), SIZE_DIVISOR), MAX_SIDE)
            raise OptionError(
                f"{option} is {text}; both sides are multiples of {SIZE_DIVISOR} from {SIZE_DIVISOR} to {MAX_SIDE};"
                f" {near} is next to {side}"
            )
    return height, width


def parse_canvas(
    size: str | None, least: str | None, best: str | None, most: str | None
) -> tuple[Range | None, Range | None]:
    """Read the ranges of height and width from `--size`, or from `--min`, `--opt` and `--max`; None where not given.

    Raises:
        OptionError: both ways at once, one of the three missing, or not in order.
    """
    texts = {"--min": least, "--opt": best, "--max": most}
    given = {option: text for option, text in texts.items() if text is not None}
    if size is not None:
        if given:
            raise OptionError(f"--size fixes the canvas and excludes {next(iter(given))}; use one or the other")
        height, width = parse_size(size, "--size")
        return Range.fixed(height), Range.fixed(width)
    if not given:
        return None, None
    if len(given) < len(texts):
        missing = [option for option in texts if option not in given]
        raise OptionError(f"{' and '.join(given)} without {' and '.join(missing)}; give all three, or --size")
    sizes = [parse_size(text, option) for option, text in given.items()]
    for name, sides in zip(("height", "width"), zip(*sizes, strict=True), strict=True):
        if list(sides) != sorted(sides):
            raise OptionError(
                f"--min {least}, --opt {best}, --max {most}: their {name}s are {', '.join(map(str, sides))};"
                " each must be at least the one before"
            )
    height_range, width_range = (Range(*sides) for sides in zip(*sizes, strict=True))
    return height_range, width_range


def parse_bytes(text: str, option: str) -> int:
    """Read a size such as "512M" or "2G" as a number of bytes (K, M and G are powers of 1024).

    Raises:
        OptionError: no such size, or nothing.
    """
    match = re.fullmatch(r"(\d{1,12})\s*(B|K|M|G)?i?B?", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise OptionError(f'{option} is "{text}"; write a size such as 512M or 2G')
    return int(match[1]) * {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30}[(match[2] or "B").upper()]
