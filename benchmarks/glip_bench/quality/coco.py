"""COCO-format sets: reading them, and average precision by pycocotools.

Widths count a box's last pixel, as the official evaluation writes them (`BoxList.convert("xywh")`): pycocotools, which
multiplies width and height, then computes the same overlaps as GLIP.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glip_bench.quality.lvis import Federation, read_federation
from glip_deploy.errors import MissingPackage, OptionError

__all__ = ["Picture", "Precision", "Set", "average_precision", "read_found", "read_json", "read_set", "xywh"]

NAMES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
RECALLS = ("AR1", "AR10", "AR100")


@dataclass(frozen=True)
class Picture:
    """One picture of a set."""

    id: int
    file: Path


@dataclass(frozen=True)
class Set:
    """A COCO-format detection set, as `instances_val2017.json` is one."""

    pictures: tuple[Picture, ...]
    categories: tuple[tuple[int, str], ...]
    """(id, name), in the file's order; the names are what the prompts ask for."""
    annotations: tuple[Mapping[str, Any], ...]
    """Of these pictures; with id, image_id, category_id, bbox (x, y, width, height), area, iscrowd."""
    federation: Federation | None = None
    """Of an LVIS file."""

    @property
    def numbers(self) -> dict[str, int]:
        """Category id by name."""
        return {name: number for number, name in self.categories}


@dataclass(frozen=True)
class Precision:
    """COCO's figures, 0 to 100; nan where the set has no such object."""

    figures: Mapping[str, float]
    """AP (IoU 0.50 to 0.95), AP50, AP75, AP by size, recall with 1, 10 and 100 boxes a picture."""
    by_class: Mapping[str, float]
    """AP of each category."""


def read_set(annotations: Path, images: Path | None, limit: int | None = None) -> Set:
    """Read a set in the form of COCO or of LVIS, which is recognized by the frequencies of its categories.

    Args:
        annotations: JSON with "images" (id; file_name, or coco_url as in LVIS), "categories" (id, name) and
            "annotations" (image_id, category_id, bbox).
        images: folder the file names are relative to, or only their last parts; None where no picture is needed.
        limit: the first so many pictures only.

    Raises:
        OptionError: not readable, not of this form, without categories or pictures, or a picture is missing.
    """
    content = read_json(annotations)
    if not isinstance(content, dict):
        raise OptionError(f"{annotations} holds a {type(content).__name__}; a COCO-format set is a JSON object")
    try:
        categories = tuple((int(one["id"]), str(one["name"]).strip()) for one in content["categories"])
        listed = [(int(one["id"]), _file_name(one)) for one in content["images"]]
        rows = [_annotation(number, one) for number, one in enumerate(content["annotations"], 1)]
        federation = read_federation(content)
    except KeyError as error:
        raise OptionError(
            f"{annotations} has no {error.args[0]!r}{_place_of(content, error.args[0])}; it needs COCO's images (id,"
            " file_name), categories (id, name), annotations (image_id, category_id, bbox)"
        ) from None
    except (TypeError, ValueError, OverflowError) as error:
        raise OptionError(f"{annotations} is not a COCO-format detection set ({error})") from None
    if not categories or not listed:
        raise OptionError(
            f"{annotations} has {len(categories)} categories and {len(listed)} images; one of each is needed"
        )
    if len(dict(categories)) < len(categories) or len({name for _, name in categories}) < len(categories):
        raise OptionError(f"{annotations} names a category twice; ids and names must differ")
    if len(dict(listed)) < len(listed):
        raise OptionError(f"{annotations} gives several images one id; ids must differ")
    if images is not None and not images.is_dir():
        raise OptionError(f"--images {images} is not a folder; name the one with the set's pictures")
    pictures = tuple(Picture(number, _locate(name, images)) for number, name in listed[:limit])
    for picture in pictures:
        if images is not None and not picture.file.is_file():
            raise OptionError(f"{picture.file} is missing; {annotations} names it; check --images {images}")
    kept = {picture.id for picture in pictures}
    known = {number for number, _ in categories}
    rows = [row for row in rows if row["image_id"] in kept]
    stray = next((row for row in rows if row["category_id"] not in known), None)
    if stray is not None:
        raise OptionError(f"{annotations}: an annotation is of category {stray['category_id']}, which it does not list")
    if not rows:
        raise OptionError(f"{annotations} has no annotations of its {len(pictures)} pictures; there is nothing to find")
    return Set(pictures, categories, tuple(rows), federation)


def _file_name(image: Mapping[str, Any]) -> str:
    """Return a picture's file name; in LVIS, it is the end of an address, with the folder of COCO's split before it."""
    if "file_name" in image or "coco_url" not in image:
        return str(image["file_name"])
    return "/".join(str(image["coco_url"]).split("/")[-2:])


def _locate(name: str, images: Path | None) -> Path:
    if images is None:
        return Path(name)
    whole, last = images / name, images / Path(name).name
    return last if last.is_file() and not whole.is_file() else whole


def _place_of(content: Mapping[str, Any], key: str) -> str:
    """Say in which row a key is missing that the file as a whole need not have."""
    rows = {"file_name": "images", "name": "categories", "bbox": "annotations"}
    rows |= {"image_id": "annotations", "category_id": "annotations"}
    for part in [rows[key]] if key in rows else ["images", "categories"] if key == "id" else []:
        for index, row in enumerate(content[part]):
            if key not in row and not (key == "file_name" and "coco_url" in row):
                return f" in {part}[{index}]"
    return ""


def read_found(file: Path, data: Set) -> list[dict[str, Any]]:
    """Read results in COCO's format, as `glip-detect --coco` and other tools write them.

    Returns:
        image_id, category_id, bbox (x, y, width, height) and score of each.

    Raises:
        OptionError: not readable, not of this form, or of a picture or category that the set does not have.
    """
    rows = read_json(file)
    if not isinstance(rows, list):
        raise OptionError(f"{file} holds a {type(rows).__name__}; results in COCO's format are a list")
    pictures, categories = {picture.id for picture in data.pictures}, set(data.numbers.values())
    found = []
    for index, row in enumerate(rows):
        try:
            x, y, width, height = (float(value) for value in row["bbox"])
            score = float(row["score"])
            if not all(math.isfinite(value) for value in (x, y, width, height, score)):
                raise ValueError("a number is not finite")
            one = {"image_id": int(row["image_id"]), "category_id": int(row["category_id"])}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise OptionError(
                f"{file}, result {index}: {reason}; image_id, category_id, bbox and score are needed"
            ) from None
        if one["image_id"] not in pictures:
            raise OptionError(
                f"{file}, result {index}, is of image {one['image_id']}, which the set does not have;"
                " name the annotations that belong to the results"
            )
        if one["category_id"] not in categories:
            raise OptionError(
                f"{file}, result {index}, is of category {one['category_id']}, which the set does not have"
            )
        found.append({**one, "bbox": [x, y, width, height], "score": score})
    return found


def read_json(path: Path) -> Any:
    """Read an annotation file.

    Raises:
        OptionError: not readable, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror or error}); name an annotation file") from None
    except (ValueError, RecursionError):
        raise OptionError(f"{path} is not JSON; name an annotation file") from None


def xywh(box: Sequence[float], last_pixel: bool = True) -> list[float]:
    """Return x, y, width, height of a box given as x1, y1, x2, y2; by default its last pixel belongs to it."""
    left, top, right, bottom = box
    return [left, top, right - left + last_pixel, bottom - top + last_pixel]


def _annotation(number: int, one: Mapping[str, Any]) -> dict[str, Any]:
    x, y, width, height = (float(value) for value in one["bbox"])
    if not all(math.isfinite(value) for value in (x, y, width, height)):
        raise ValueError(f"annotation {number} has the box {one['bbox']}")
    return {
        "id": number,  # pycocotools takes 0 for "not matched"
        "image_id": int(one["image_id"]),
        "category_id": int(one["category_id"]),
        "bbox": [x, y, width, height],
        "area": float(one.get("area", width * height)),
        "iscrowd": int(one.get("iscrowd", 0)),
    }


def average_precision(data: Set, found: Sequence[Mapping[str, Any]]) -> Precision:
    """Return COCO's figures.

    Args:
        data: the set.
        found: {"image_id", "category_id", "bbox" (x, y, width, height), "score"} each; of a picture and class the best
            100 count.

    Raises:
        MissingPackage: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise MissingPackage("average precision needs pycocotools; pip install 'glip-deploy[bench]'") from None
    if not found:  # pycocotools does not take an empty list
        return Precision(dict.fromkeys((*NAMES, *RECALLS), 0.0), dict.fromkeys(data.numbers, 0.0))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth = COCO()
        truth.dataset = {
            "images": [{"id": picture.id} for picture in data.pictures],
            "categories": [{"id": number, "name": name} for number, name in data.categories],
            "annotations": [dict(row) for row in data.annotations],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(one) for one in found]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = dict(zip((*NAMES, *RECALLS), (_percent(value) for value in evaluation.stats[:9]), strict=True))
    # (IoU, recall, class, size, boxes a picture): all sizes, 100 boxes
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    by_class = {}
    for index, number in enumerate(evaluation.params.catIds):
        values = precision[:, :, index]
        known = values[values > -1]
        by_class[dict(data.categories)[number]] = 100 * float(known.mean()) if known.size else float("nan")
    return Precision(figures, by_class)


def _percent(value: float) -> float:
    """Return a figure in percent; nan for COCO's -1, which means that the set has no such object."""
    return 100 * float(value) if value > -1 else float(np.nan)
