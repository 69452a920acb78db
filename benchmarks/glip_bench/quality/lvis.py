"""LVIS: what is known of each picture, and average precision by class frequency, by faster-coco-eval.

Pictures of LVIS are not searched for all of its 1,203 classes. A detection counts only if its class is annotated in the
picture or known to be absent from it; one that matches nothing is passed over where not every object of its class is
annotated. As in the official evaluation (`maskrcnn_benchmark/data/datasets/evaluation/lvis/lvis_eval.py`), a width is
x2 - x1 here; COCO's counts the last pixel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.errors import MissingPackage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from glip_bench.quality.coco import Precision, Set

__all__ = ["CLASSES_PER_PROMPT", "DETECTIONS", "Federation", "lvis_precision", "read_federation"]

CLASSES_PER_PROMPT = 40
"""Official `TEST.CHUNKED_EVALUATION` for LVIS."""
DETECTIONS = 300
"""Boxes of a prompt (official `MODEL.ATSS.DETECTIONS_PER_IMG` for LVIS), and of a picture over all prompts."""
DETECTIONS_OF_CLASS = 10_000
"""Boxes of a class over all pictures that fixed AP counts, with no limit for a picture (Dave et al., "Evaluating
Large-Vocabulary Object Detectors: The Devil is in the Details", 2021)."""
FREQUENCIES = ("r", "c", "f")
"""Rare, common and frequent classes: in fewer than 10, fewer than 100, and more of the training pictures."""


@dataclass(frozen=True)
class Federation:
    """What LVIS says about classes and pictures beyond COCO's form."""

    frequency: Mapping[int, str]
    """"r", "c" or "f" by category."""
    absent: Mapping[int, tuple[int, ...]]
    """By picture: the categories that are known not to be in it."""
    not_exhaustive: Mapping[int, tuple[int, ...]]
    """By picture: the categories of which some objects are not annotated."""


def read_federation(content: Mapping[str, Any]) -> Federation | None:
    """Return what an annotation file has of LVIS; None for a file in COCO's plain form, without frequencies.

    Raises:
        ValueError: a category without a legal frequency, or a picture without its lists of categories.
    """
    if not any("frequency" in one for one in content["categories"]):
        return None
    frequency = {}
    for one in content["categories"]:
        frequency[int(one["id"])] = one.get("frequency")
        if one.get("frequency") not in FREQUENCIES:
            raise ValueError(
                f"category {one['id']} has the frequency {one.get('frequency')!r}; legal in an LVIS file is r, c or f"
            )
    lists: dict[str, dict[int, tuple[int, ...]]] = {"neg_category_ids": {}, "not_exhaustive_category_ids": {}}
    for name, by_picture in lists.items():
        for one in content["images"]:
            if not isinstance(one.get(name), list):
                raise ValueError(f"image {one['id']} has no {name!r}, which LVIS lists for every image")
            by_picture[int(one["id"])] = tuple(int(number) for number in one[name])
    return Federation(frequency, lists["neg_category_ids"], lists["not_exhaustive_category_ids"])


def lvis_precision(data: Set, found: Sequence[Mapping[str, Any]]) -> Precision:
    """Return LVIS's figures.

    Args:
        data: a set with a `Federation`.
        found: {"image_id", "category_id", "bbox" (x, y, width, height), "score"} each, as many as there are.

    Returns:
        AP, AP50, AP75 and AP of rare, common and frequent classes with the best 300 boxes of each picture; and fixed
        AP, for which the best 10,000 of each class count instead. AP of each class is that of the first kind.

    Raises:
        MissingPackage: faster-coco-eval is not installed.
    """
    from glip_bench.quality.coco import Precision

    figures, by_class = _evaluate(data, _best(found, "image_id", DETECTIONS))
    fixed, _ = _evaluate(data, _best(found, "category_id", DETECTIONS_OF_CLASS))
    kept = ("AP", *(f"AP{letter}" for letter in FREQUENCIES))
    return Precision({**figures, **{f"fixed {name}": fixed[name] for name in kept}}, by_class)


def _best(found: Iterable[Mapping[str, Any]], key: str, count: int) -> list[Mapping[str, Any]]:
    groups: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for one in found:
        groups[one[key]].append(one)
    return [one for group in groups.values() for one in sorted(group, key=lambda one: -one["score"])[:count]]


def _evaluate(data: Set, found: Iterable[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the figures in percent, nan where there is no such class, and AP by class."""
    federation = data.federation
    assert federation is not None
    boxes: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for one in found:
        boxes[one["category_id"]].append(one)
    objects: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in data.annotations:
        objects[row["category_id"]].append(row)
    searched: dict[int, set[int]] = defaultdict(set)
    for picture in data.pictures:
        for number in federation.absent[picture.id]:
            searched[number].add(picture.id)
    classes = {}
    for number, name in data.categories:
        pictures = searched[number] | {row["image_id"] for row in objects[number]}
        mine = [dict(one) for one in boxes[number] if one["image_id"] in pictures]
        classes[name] = _precision_of_class(number, pictures, objects[number], mine, federation)
    by_frequency = {
        f"AP{letter}": [classes[name] for number, name in data.categories if federation.frequency[number] == letter]
        for letter in FREQUENCIES
    }
    every = list(classes.values())
    figures = {
        "AP": _mean(every),
        "AP50": _mean([rows[:1] for rows in every]),
        "AP75": _mean([rows[5:6] for rows in every]),
        **{name: _mean(some) for name, some in by_frequency.items()},
    }
    return figures, {name: _mean([rows]) for name, rows in classes.items()}


def _precision_of_class(
    number: int,
    pictures: Iterable[int],
    objects: Sequence[Mapping[str, Any]],
    found: list[dict[str, Any]],
    federation: Federation,
) -> NDArray[np.float64]:
    """Return precision by (IoU 0.50 to 0.95, recall), empty for a class without objects.

    Classes are independent of each other. All at once, over pictures that were never searched for them, would take
    gigabytes for a thousand pictures.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise MissingPackage("LVIS needs faster-coco-eval; pip install 'glip-deploy[bench]'") from None
    if not objects:
        return np.zeros((0, 0))
    images = [
        {
            "id": picture,
            "neg_category_ids": [number],
            "not_exhaustive_category_ids": federation.not_exhaustive[picture],
        }
        for picture in sorted(pictures)
    ]
    category = {"id": number, "frequency": federation.frequency[number]}
    # LVIS has no crowds; an object is never ignored.
    annotations = [{**row, "iscrowd": 0} for row in objects]
    truth = COCO({"images": images, "categories": [category], "annotations": annotations})
    evaluation = COCOeval_faster(truth, truth.loadRes(found), "bbox", lvis_style=True, print_function=lambda _: None)
    evaluation.params.maxDets = [max(1, len(found))]  # how many count was decided before
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"][:, :, 0, 0, 0])  # objects of all sizes


def _mean(classes: Sequence[NDArray[np.float64]]) -> float:
    means = [float(rows.mean()) for rows in classes if rows.size]
    return 100 * sum(means) / len(means) if means else float("nan")
