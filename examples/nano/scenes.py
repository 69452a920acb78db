"""Scenes of pictograms on photographs, with exact boxes; and captions that describe them.

Every scene is a function of its seed: same seed, same packages, same picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from glip_deploy.errors import MissingPackage
from glip_deploy.prompts.syntax import Caption
from nano.objects import pictogram

__all__ = ["Placed", "Scene", "SceneStyle", "caption_of", "make_scene", "photographs"]

# (package, file inside it); licenses in README.md. None of them shows an object of the catalog.
TRAINING_PHOTOGRAPHS = (
    ("skimage", "data/brick.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/retina.jpg"),
    ("skimage", "data/page.png"),
    ("skimage", "data/coins.png"),
    ("skimage", "data/text.png"),
    ("skimage", "data/cell.png"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("glip_export", "data/picture.jpg"),
)
FRESH_PHOTOGRAPHS = (
    ("skimage", "data/gravel.png"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ("skimage", "data/moon.png"),
)
PIP_NAME = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
LARGEST_PHOTOGRAPH = 640
VISIBLE_SHARE = 0.4  # a thing more hidden than this is not labeled, and is not left in the scene either


@dataclass(frozen=True)
class SceneStyle:
    """How varied the things are."""

    smallest: float = 24.0
    """Longest side of a pictogram, pixels, before rotation."""
    largest: float = 104.0
    tilt: float = 18.0
    """Standard deviation of the rotation, degrees."""
    turned: float = 0.15
    """Share of things turned by any angle."""
    overlap: float = 0.3
    """A new thing covers at most this share of any earlier one."""


@dataclass(frozen=True)
class Placed:
    """A thing in a scene."""

    name: str
    box: tuple[int, int, int, int]
    """First and last column and row with a visible pixel of it: x0, y0, x1, y1, all inclusive (GLIP's own form)."""


@dataclass(frozen=True)
class Scene:
    """A picture and everything in it."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    things: tuple[Placed, ...]


@cache
def photographs(fresh: bool) -> tuple[Image.Image, ...]:
    """Return the backgrounds, for training or, never seen in training, for evaluation.

    Raises:
        MissingPackage: a package is missing.
    """
    found = []
    for package, file in FRESH_PHOTOGRAPHS if fresh else TRAINING_PHOTOGRAPHS:
        spec = find_spec(package)  # only located: importing these packages takes seconds
        path = Path(next(iter(spec.submodule_search_locations or ()))) / file if spec else None
        if path is None or not path.is_file():
            raise MissingPackage(
                f"photograph {package}/{file} is missing; pip install {PIP_NAME.get(package, package)} "
                "(versions: examples/nano/requirements.txt)"
            )
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((LARGEST_PHOTOGRAPH, LARGEST_PHOTOGRAPH))
        found.append(picture)
    return tuple(found)


def make_scene(
    seed: Sequence[int],
    names: Sequence[str],
    size: tuple[int, int] = (224, 224),
    *,
    fresh: bool = False,
    style: SceneStyle | None = None,
) -> Scene:
    """Compose a scene.

    Args:
        seed: integers; they alone, with the other arguments, decide the scene.
        names: what to put there, repeated for more of a kind; what finds no free place is left out.
        size: (height, width) in pixels.
        fresh: use the photographs kept for evaluation.
        style: how varied.
    """
    rng = np.random.default_rng(seed)
    style = style or SceneStyle()
    canvas = _background(rng, size, photographs(fresh)).astype(np.float32)
    owner = np.full(size, -1, np.int16)
    areas: list[int] = []
    placed: list[str] = []
    for name in names:
        sprite, alpha = _sprite(rng, name, style)
        corner = _free_place(rng, alpha > 0.5, owner, areas, style)
        if corner is None:
            continue
        y, x = corner
        window = np.s_[y : y + alpha.shape[0], x : x + alpha.shape[1]]
        canvas[window] += alpha[..., None] * (sprite - canvas[window])
        owner[window][alpha > 0.5] = len(placed)
        areas.append(int((alpha > 0.5).sum()))
        placed.append(name)
    things = []
    for i, name in enumerate(placed):
        things.append(Placed(name, _extent(owner == i)))
    return Scene(_finish(rng, canvas), tuple(things))


def _extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return the first and last column and row that hold a True: x0, y0, x1, y1, inclusive."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _background(rng: np.random.Generator, size: tuple[int, int], pictures: Sequence[Image.Image]) -> NDArray[np.uint8]:
    """Return a crop of a photograph, or in one of ten cases a plain gradient."""
    height, width = size
    if rng.random() < 0.1:
        corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
        return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR))
    picture = pictures[int(rng.integers(len(pictures)))]
    share = rng.uniform(0.35, 1.0)
    scale = share * min(picture.width / width, picture.height / height)
    w, h = int(width * scale), int(height * scale)
    x, y = int(rng.integers(0, picture.width - w + 1)), int(rng.integers(0, picture.height - h + 1))
    picture = picture.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out = np.asarray(picture, np.float32)
    gain, tint = rng.uniform(0.6, 1.25), rng.uniform(0.85, 1.15, 3)
    return np.clip(out * gain * tint, 0, 255).astype(np.uint8)


def _sprite(rng: np.random.Generator, name: str, style: SceneStyle) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the pictogram as it will look, (h, w, 3) in 0..255, and its opacity, (h, w) in 0..1."""
    picture = pictogram(name)
    side = np.exp(rng.uniform(np.log(style.smallest), np.log(style.largest)))
    stretch = np.exp(rng.normal(0, 0.08))
    scale = side / max(picture.size)
    w, h = max(6, round(picture.width * scale * stretch)), max(6, round(picture.height * scale / stretch))
    picture = picture.resize((w, h), Image.Resampling.BILINEAR)
    if rng.random() < 0.3:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = rng.uniform(-180, 180) if rng.random() < style.turned else rng.normal(0, style.tilt)
    picture = picture.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    if rng.random() < 0.25:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.4 + side / 60)))
    if rng.random() < 0.3:
        opacity = picture.getchannel("A")
        picture = ImageEnhance.Color(picture).enhance(rng.uniform(0.5, 1.4))
        picture.putalpha(opacity)
    pixels = np.asarray(picture, np.float32)
    x0, y0, x1, y1 = _extent(pixels[..., 3] > 8)
    pixels = pixels[y0 : y1 + 1, x0 : x1 + 1]
    color: NDArray[np.float32] = np.clip(pixels[..., :3] * rng.uniform(0.6, 1.2) + rng.uniform(-15, 15), 0, 255)
    opacity_map: NDArray[np.float32] = pixels[..., 3] / np.float32(255)
    return color, opacity_map


def _free_place(
    rng: np.random.Generator, solid: NDArray[np.bool_], owner: NDArray[np.int16], areas: list[int], style: SceneStyle
) -> tuple[int, int] | None:
    """Try a few corners (y, x); take the first that leaves every earlier thing visible enough."""
    room_y, room_x = owner.shape[0] - solid.shape[0], owner.shape[1] - solid.shape[1]
    if room_y < 0 or room_x < 0:
        return None
    for _ in range(12):
        y, x = int(rng.integers(room_y + 1)), int(rng.integers(room_x + 1))
        under = owner[y : y + solid.shape[0], x : x + solid.shape[1]][solid]
        hit, hidden = np.unique(under[under >= 0], return_counts=True)
        if all(
            count <= style.overlap * areas[i] and (owner == i).sum() - count >= VISIBLE_SHARE * areas[i]
            for i, count in zip(hit, hidden, strict=True)
        ):
            return y, x
    return None


def _finish(rng: np.random.Generator, canvas: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Add what a camera does: exposure, noise, focus."""
    canvas = canvas * rng.uniform(0.8, 1.15)
    if rng.random() < 0.4:
        canvas = canvas + rng.normal(0, rng.uniform(1, 8), canvas.shape).astype(np.float32)
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    if rng.random() < 0.15:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8))))
    return image


COUNTS = ("no", "a", "two", "three", "four", "five", "six")
IRREGULAR = {"tooth": "teeth", "mouse face": "mouse faces", "knife": "knives", "leaf": "leaves", "fish": "fish"}


def plural(name: str) -> str:
    """Return the English plural of a name of the catalog, good enough to read."""
    stem, _, last = name.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "" if last in _ALREADY_PLURAL else "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{stem} {last}".strip()


_ALREADY_PLURAL = {"glasses", "sunglasses", "jeans", "gloves", "socks", "headphones", "scissors", "grapes", "cherries"}
_ALREADY_PLURAL |= {"pancakes", "fries", "dice"}


def noun_phrase(name: str, count: int) -> str:
    """Return a name with its number: "a dog", "an owl", "two dogs", "grapes"."""
    if count > 1:
        return f"{COUNTS[count] if count < len(COUNTS) else 'many'} {plural(name)}"
    if name.rpartition(" ")[2] in _ALREADY_PLURAL or name in ("bacon", "french fries"):
        return name
    return f"{'an' if name[0] in 'aeiou' and not name.startswith(('uni', 'one')) else 'a'} {name}"


def caption_of(scene: Scene, seed: Sequence[int], most: int = 4) -> tuple[Caption, tuple[str, ...]] | None:
    """Describe a scene in words: "a photo of a red apple left of two dogs and a drum".

    Relations are true of every pair they join. Only some of the things need be named.

    Returns:
        The caption with one span per phrase, and the object name of every phrase; None for an empty scene.
    """
    rng = np.random.default_rng([*seed, 1])
    counts = Counter(thing.name for thing in scene.things)
    names = [str(name) for name in rng.permutation(sorted(counts))[: int(rng.integers(1, most + 1))]]
    if not names:
        return None
    text = ("", "a photo of ", "there is ", "look at ")[rng.integers(4)]
    spans: list[tuple[int, int]] = []
    for i, name in enumerate(names):
        if i:
            text += f" {_relation(rng, scene, names[i - 1], name)} "
        words = noun_phrase(name, counts[name])
        spans.append((len(text), len(text) + len(words)))
        text += words
    return Caption(text, spans, names), tuple(names)


def _relation(rng: np.random.Generator, scene: Scene, first: str, second: str) -> str:
    def centers(name: str) -> NDArray[np.float64]:
        boxes = np.array([thing.box for thing in scene.things if thing.name == name], float)
        middle: NDArray[np.float64] = (boxes[:, :2] + boxes[:, 2:]) / 2
        return middle

    a, b = centers(first), centers(second)
    true = [
        word
        for word, holds in (
            ("left of", a[:, 0].max() < b[:, 0].min()),
            ("right of", a[:, 0].min() > b[:, 0].max()),
            ("above", a[:, 1].max() < b[:, 1].min()),
            ("below", a[:, 1].min() > b[:, 1].max()),
        )
        if holds
    ]
    return str(rng.choice([*true, "and"]))
