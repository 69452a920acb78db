"""Detections drawn on a picture: outlines, and labels on colored tags that stay inside the picture.

Line width and text size follow the size of the picture, so a thumbnail and a 4K frame look alike. The color of a class
depends only on its index, so it is the same in every frame and every run.
"""

from __future__ import annotations

import colorsys
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import FrameError
from glip_deploy.results.detections import NO_TRACK

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image, ImageFont

    from glip_deploy.results.detections import Detections

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
    Box = tuple[int, int, int, int]

__all__ = ["annotate", "class_color"]

_PALETTE = (
    (255, 56, 92),
    (0, 194, 168),
    (255, 176, 0),
    (61, 130, 255),
    (171, 89, 247),
    (52, 199, 89),
    (255, 122, 26),
    (24, 186, 229),
    (240, 82, 176),
    (160, 214, 40),
    (104, 110, 246),
    (232, 200, 32),
)
_GOLDEN = (math.sqrt(5) - 1) / 2
# Fonts with more than Latin letters, by file name; Pillow knows the folders in which each system keeps its fonts.
_FALLBACK_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "seguiemj.ttf",
    "arial.ttf",
)


def class_color(label: int) -> tuple[int, int, int]:
    """Return the RGB color, 0..255, of a class index: twelve fixed ones, then steps of hue by the golden ratio."""
    if 0 <= label < len(_PALETTE):
        return _PALETTE[label]
    hue = (label * _GOLDEN) % 1.0
    lightness = (0.52, 0.62, 0.44)[label % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def annotate(frame: NDArray[Any], detections: Detections) -> NDArray[np.uint8]:
    """Draw detections on a copy of a picture.

    Higher scores are drawn over lower ones. Labels avoid each other where there is room; those of tracked objects show
    the id, as "#7".

    Args:
        frame: (H, W, 3) uint8 RGB; not changed.
        detections: boxes in pixels of `frame`. What lies outside the picture is cut off; boxes that are not
            finite are left out.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        FrameError: the frame has another shape or dtype.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise FrameError(f"frame has shape {frame.shape} and dtype {frame.dtype}; draw on (H, W, 3) uint8 RGB only")
    boxes = np.asarray(detections.boxes, dtype=np.float64).reshape(-1, 4)
    drawable = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    if not len(drawable):
        return np.array(frame)

    from PIL import Image, ImageDraw

    height, width = frame.shape[:2]
    picture = Image.fromarray(np.ascontiguousarray(frame))
    draw = ImageDraw.Draw(picture, "RGBA")
    short = min(height, width)
    line = max(1, round(short / 260))
    text_size = max(10, round(short / 38))
    scores = np.asarray(detections.scores, dtype=np.float64)
    best_first = [int(i) for i in drawable[np.argsort(-scores[drawable], kind="stable")]]
    corners = {i: _pixels(boxes[i], width, height) for i in best_first}

    for i in reversed(best_first):
        _outline(draw, corners[i], class_color(int(detections.labels[i])), line)
    taken: list[Box] = []
    for i in best_first:
        tag = _tag(_name(detections, i), f"{scores[i]:.2f}", class_color(int(detections.labels[i])), text_size)
        spot = _place(tag.size, corners[i], (width, height), line, taken)
        taken.append(spot)
        picture.paste(tag, spot[:2], tag)
    return np.array(picture)


def _pixels(box: NDArray[np.float64], width: int, height: int) -> Box:
    x0, x1 = np.clip(np.sort(box[[0, 2]]), 0, width - 1).round().astype(int)
    y0, y1 = np.clip(np.sort(box[[1, 3]]), 0, height - 1).round().astype(int)
    return int(x0), int(y0), int(x1), int(y1)


def _outline(draw: Any, box: Box, color: tuple[int, int, int], line: int) -> None:
    x0, y0, x1, y1 = box
    small = min(x1 - x0, y1 - y0)
    radius = min(2 * line, small // 4) if line > 1 else 0
    # A dark hairline on both sides keeps the outline visible on a background of its own color.
    if small > 6 * line:
        draw.rounded_rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), radius + 1, outline=(0, 0, 0, 110))
        inner = (x0 + line, y0 + line, x1 - line, y1 - line)
        draw.rounded_rectangle(inner, max(0, radius - line), fill=(*color, 20), outline=(0, 0, 0, 90))
    draw.rounded_rectangle(box, radius, outline=(*color, 255), width=line)


def _place(size: tuple[int, int], box: Box, picture: tuple[int, int], line: int, taken: list[Box]) -> Box:
    """Return a place for a tag: above its box, else inside, else below; the first that overlaps no other tag."""
    x0, y0, x1, y1 = box
    width, height = size
    spots = [
        (x0, y0 - height),
        (x0, y0 + line),
        (x1 + 1 - width, y0 - height),
        (x0, y1 + 1),
        (x1 + 1 - width, y0 + line),
        (x0, y1 + 1 - line - height),
        (x1 + 1 - width, y1 + 1),
    ]
    inside = [(x, y) for x, y in spots if 0 <= x <= picture[0] - width and 0 <= y <= picture[1] - height]
    # For when none of them fits: two are moved inside; a tag larger than the picture keeps its top left corner.
    moved = [(max(0, min(x, picture[0] - width)), max(0, min(y, picture[1] - height))) for x, y in spots[:2]]
    candidates = [(x, y, x + width, y + height) for x, y in inside + moved]
    for spot in candidates:
        if not any(_overlap(spot, other) for other in taken):
            return spot
    return candidates[0]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _name(detections: Detections, i: int) -> str:
    """Return what a tag calls a box: its phrase, cut short, and the id of its object."""
    name = " ".join(detections.phrases[i].split())
    if len(name) > 48:
        name = name[:47] + "…"
    return name if detections.track[i] == NO_TRACK else f"{name} #{detections.track[i]}".strip()


@lru_cache(maxsize=512)
def _tag(name: str, score: str, color: tuple[int, int, int], size: int) -> Image.Image:
    """Return a label as RGBA with rounded, smooth edges. It is cached: do not change it."""
    from PIL import Image, ImageDraw

    font = _font(name, size)
    ink = _ink(color)
    pad = max(2, round(size * 0.36))
    gap = max(3, round(size * 0.42))
    name_width = math.ceil(font.getlength(name))
    score_width = math.ceil(font.getlength(score))
    # The height does not depend on the letters, so that neighboring tags line up.
    top, bottom = font.getbbox("Ågjp|")[1::2]
    width = 2 * pad + name_width + (gap if name else 0) + score_width
    height = math.ceil(bottom - top) + 2 * max(1, pad // 2)

    zoom = 4
    shape = Image.new("L", (width * zoom, height * zoom), 0)
    ImageDraw.Draw(shape).rounded_rectangle(
        (0, 0, width * zoom - 1, height * zoom - 1), radius=max(1, size // 5) * zoom, fill=255
    )
    tag = Image.new("RGBA", (width, height), (*color, 255))
    draw = ImageDraw.Draw(tag)
    y = max(1, pad // 2) - top
    draw.text((pad, y), name, font=font, fill=(*ink, 255))
    # The color is blended here: half-transparent ink would make the opaque tag itself transparent.
    faint = tuple(round(0.78 * i + 0.22 * c) for i, c in zip(ink, color, strict=True))
    draw.text((width - pad - score_width, y), score, font=font, fill=(*faint, 255))
    tag.putalpha(shape.resize((width, height), Image.Resampling.BOX))
    return tag


def _ink(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever contrasts more (WCAG 2, relative luminance)."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    with_white = 1.05 / (luminance + 0.05)
    with_black = (luminance + 0.05) / 0.05
    return (0, 0, 0) if with_black >= with_white else (255, 255, 255)


@lru_cache(maxsize=256)
def _font(text: str, size: int) -> Font:
    """Return Pillow's own font for ASCII, the same on every machine; else the installed one with most letters."""
    from PIL import ImageFont

    own = ImageFont.load_default(size)
    if text.isascii():
        return own
    best, best_missing = own, _missing(own, text)
    for name in _FALLBACK_FONTS:
        if not best_missing:
            break
        font = _installed(name, size)
        if font is not None and (missing := _missing(font, text)) < best_missing:
            best, best_missing = font, missing
    return best


@lru_cache(maxsize=64)
def _installed(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    from PIL import ImageFont

    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _missing(font: Font, text: str) -> int:
    """Return how many letters of `text` the font draws as its sign for unknown ones."""
    unknown = bytes(font.getmask("\U0010ffff"))
    return sum(bytes(font.getmask(letter)) == unknown for letter in set(text) if not letter.isspace())
