"""Flickr30K Entities in its own files: sentences with marked phrases, and boxes by phrase number in XML."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from glip_bench.quality.grounding import Picture
from glip_deploy.errors import OptionError
from glip_deploy.prompts.syntax import Caption

__all__ = ["read_entities"]

PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+) ([^\]]*)\]")
"""A phrase as in "[/EN#283585/people An African group]": its number, its kinds, its words."""
EDGES = ("xmin", "ymin", "xmax", "ymax")


def read_entities(list_file: Path, images: Path, limit: int | None = None) -> list[Picture]:
    """Read the sentences of the pictures that a list names, as the official evaluation does.

    A phrase without boxes (of the scene, not visible, not visual) is not asked for; neither is a sentence without any
    other. Official `flickr/flickr_eval.py`, `Flickr30kEntitiesRecallEvaluator`.

    Args:
        list_file: `test.txt`, `val.txt` or another list of picture numbers, beside the folders `Sentences` (NUMBER.txt)
            and `Annotations` (NUMBER.xml).
        images: folder of NUMBER.jpg.
        limit: the first so many sentences only.

    Raises:
        OptionError: a file is missing or not of this form, or there is no phrase with a box.
    """
    if not images.is_dir():
        raise OptionError(f"--images {images} is not a folder; name the one with the set's pictures")
    found: list[Picture] = []
    for number in _text(list_file).split():
        if limit is not None and len(found) >= limit:
            break
        picture = images / f"{number}.jpg"
        if not picture.is_file():
            raise OptionError(f"{picture} is missing; {list_file} names it; check --images {images}")
        boxes = _boxes(list_file.parent / "Annotations" / f"{number}.xml")
        sentences = list_file.parent / "Sentences" / f"{number}.txt"
        for line in _text(sentences).splitlines():
            one = _sentence(line, picture, boxes, sentences)
            if one is not None:
                found.append(one)
    if not found:
        raise OptionError(f"{list_file} names no picture with a phrase that has boxes; there is nothing to find")
    return found[:limit]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"{file} cannot be read ({error.strerror or error}); Flickr30K Entities has a list of pictures beside"
            " Sentences/NUMBER.txt and Annotations/NUMBER.xml"
        ) from None
    except UnicodeDecodeError:
        raise OptionError(f"{file} is not UTF-8 text; copy it again") from None


def _boxes(file: Path) -> dict[str, NDArray[np.float64]]:
    """Return the boxes of each phrase number, (N, 4) xyxy, as they stand in the file."""
    boxes: dict[str, list[list[int]]] = {}
    try:
        for thing in ElementTree.fromstring(_text(file)).iter("object"):
            frame = thing.find("bndbox")
            if frame is None:
                continue
            box = [int(frame.findtext(edge, "")) for edge in EDGES]
            for name in thing.findall("name"):
                boxes.setdefault((name.text or "").strip(), []).append(box)
    except (ElementTree.ParseError, ValueError) as error:
        raise OptionError(f"{file} is not an annotation of Flickr30K Entities ({error}); copy it again") from None
    return {number: np.array(rows, np.float64) for number, rows in boxes.items()}


def _sentence(line: str, picture: Path, boxes: dict[str, NDArray[np.float64]], file: Path) -> Picture | None:
    """Return the caption without its marks, and its phrases that have boxes; None if there are none."""
    text, end = "", 0
    spans: list[tuple[int, int]] = []
    targets: list[NDArray[np.float64]] = []
    kinds: list[tuple[str, ...]] = []

    def add(piece: str) -> None:
        nonlocal text
        words = " ".join(piece.split())
        text += (" " if text and words else "") + words

    for match in PHRASE.finditer(line):
        add(line[end : match.start()])
        add(match[3])
        end = match.end()
        words = " ".join(match[3].split())
        if match[1] in boxes and words:
            spans.append((len(text) - len(words), len(text)))
            targets.append(boxes[match[1]])
            kinds.append(tuple(match[2].strip("/").split("/")))
    add(line[end:])
    if "[/EN#" in text:
        raise OptionError(f"{file} has a phrase that is not marked as [/EN#NUMBER/KIND WORDS]; copy it again")
    return Picture(picture, Caption(text, spans), tuple(targets), tuple(kinds)) if spans else None
