"""Sizes: to what a picture is resized, how large the canvas around it is, and whole numbers checked and rounded up."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from glip_deploy.errors import FrameError, OptionError

__all__ = [
    "MAX_NETWORK_PIXELS",
    "SIZE_DIVISOR",
    "canvas_size",
    "ceil_div",
    "ceil_to",
    "check_sides",
    "check_whole",
    "network_size",
]

MAX_NETWORK_PIXELS = 64_000_000
"""Largest resized picture, in pixels: without a longest side, a thin strip would fill the memory."""
SIZE_DIVISOR = 32
"""The canvas is a multiple of this many pixels on both sides (official DATALOADER.SIZE_DIVISIBILITY)."""


def network_size(height: int, width: int, shortest_side: int = 800, longest_side: int | None = 1333) -> tuple[int, int]:
    """Return the (height, width), in pixels, to which the official code resizes a picture.

    Official: `maskrcnn_benchmark/data/transforms/transforms.py`, `Resize.get_size` (evaluation); without a longest
    side, the demo's `torchvision.transforms.Resize`. The rounding is the official one: where the longest side
    decides, the shortest is rounded first and the longest follows from it, so it may end a little to either side of
    `longest_side` (2000x500 gives 1332x333).

    A strip so thin that its short side would round to nothing, where the official code fails, becomes one pixel by
    `longest_side`.

    Raises:
        OptionError: a side that is not a whole number from 1 to `MAX_NETWORK_PIXELS`.
        FrameError: an empty picture, or one whose resized area is above `MAX_NETWORK_PIXELS`.
    """
    check_sides(shortest_side, longest_side)
    if height < 1 or width < 1:
        raise FrameError(f"picture is {width}x{height}: both sides must be at least 1 pixel")
    short, long = min(height, width), max(height, width)
    new_short = shortest_side
    new_long = None
    if longest_side is not None and float(long) / float(short) * shortest_side > longest_side:
        new_short = round(longest_side * float(short) / float(long))
        if new_short == 0:
            new_short, new_long = 1, longest_side
    if new_long is None:
        new_long = int(new_short * long / short)
    if new_short * new_long > MAX_NETWORK_PIXELS:
        raise FrameError(
            f"a {width}x{height} picture resized to a shortest side of {shortest_side} has a side of"
            f" {new_long} pixels, {new_short * new_long} in all, more than {MAX_NETWORK_PIXELS};"
            " set a longest side (official: 1333) or crop the picture"
        )
    return (new_short, new_long) if height <= width else (new_long, new_short)


def check_sides(shortest_side: int, longest_side: int | None) -> None:
    """Check the sides to which pictures are resized, in pixels; a longest side of None is no limit.

    Raises:
        OptionError: one is not a whole number from 1 to `MAX_NETWORK_PIXELS`.
    """
    check_whole("shortest_side", shortest_side, 1, MAX_NETWORK_PIXELS, unit="pixel")
    if longest_side is not None:
        check_whole("longest_side", longest_side, 1, MAX_NETWORK_PIXELS, unit="pixel")


def check_whole(name: str, value: object, least: int, most: int | None = None, *, unit: str = "") -> None:
    """Check that an argument is a whole number (of Python or numpy) in its legal range.

    Raises:
        OptionError: it is not; the message has the name, the value and the range.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
        legal = not isinstance(value, bool) and least <= number and (most is None or number <= most)
    except TypeError:
        legal = False
    if not legal:
        try:
            text = repr(value)
        except ValueError:  # more digits than Python converts
            text = "..."
        limit = "" if most is None else f" and at most {most}"
        raise OptionError(
            f"{name} is {text if len(text) <= 60 else text[:57] + '...'};"
            f" it must be a whole number of at least {least}{f' {unit}' if unit else ''}{limit}"
        )


def ceil_div(value: int, divisor: int) -> int:
    """Return `value / divisor` rounded up, for whole numbers."""
    return -(-value // divisor)


def ceil_to(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return ceil_div(value, multiple) * multiple


def canvas_size(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the (height, width) of the smallest canvas that holds pictures of these (height, width), in pixels.

    Both sides are multiples of `SIZE_DIVISOR` (official `to_image_list(size_divisible=32)`).

    Raises:
        FrameError: the canvas would have more than `MAX_NETWORK_PIXELS`, as that of a tall and a wide strip has.
    """
    heights, widths = zip(*sizes, strict=True)
    height, width = ceil_to(max(heights), SIZE_DIVISOR), ceil_to(max(widths), SIZE_DIVISOR)
    if height * width > MAX_NETWORK_PIXELS:
        raise FrameError(
            f"resized pictures of up to {max(widths)}x{max(heights)} pixels need a canvas of {width}x{height},"
            f" {width * height} in all, more than {MAX_NETWORK_PIXELS}; set a longest side (official: 1333), or give"
            " pictures of other shapes in another call"
        )
    return height, width
