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


def _best(found: Iterable[Mapping[str, Any]], key: str, count: int) -> list[dict[str, Any]]:
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        groups[one[key]].append(dict(one))
    return [one for group in groups.values() for one in sorted(group, key=lambda one: -one["score"])[:count]]


def _evaluate(data: Set, found: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the figures in percent, nan where there is no such class, and AP by class."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise MissingPackage("LVIS needs faster-coco-eval; pip install 'glip-deploy[bench]'") from None
    federation = data.federation
    assert federation is not None
    images = [
        {
            "id": picture.id,
            "neg_category_ids": federation.absent[picture.id],
            "not_exhaustive_category_ids": federation.not_exhaustive[picture.id],
        }
        for picture in data.pictures
    ]
    categories = [
        {"id": number, "name": name, "frequency": federation.frequency[number]} for number, name in data.categories
    ]
    # LVIS has no crowds; an object is never ignored.
    annotations = [{**row, "iscrowd": 0} for row in data.annotations]
    truth = COCO({"images": images, "categories": categories, "annotations": annotations})
    evaluation = COCOeval_faster(truth, truth.loadRes(found), "bbox", lvis_style=True, print_function=lambda _: None)
    evaluation.params.maxDets = [max(1, len(found))]  # the limits above are the only ones
    evaluation.evaluate()
    evaluation.accumulate()
    # (IoU, recall, class): objects of all sizes. -1 for a class without objects, which no mean has.
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    order = [int(number) for number in evaluation.params.catIds]
    groups = {f"AP{letter}": [federation.frequency[n] == letter for n in order] for letter in FREQUENCIES}
    figures = {
        "AP": _mean(precision),
        "AP50": _mean(precision[0]),
        "AP75": _mean(precision[5]),
        **{name: _mean(precision[:, :, np.array(group)]) for name, group in groups.items()},
    }
    names = dict(data.categories)
    return figures, {names[number]: _mean(precision[:, :, index]) for index, number in enumerate(order)}


def _mean(values: Any) -> float:
    known = values[values > -1]
    return 100 * float(known.mean()) if known.size else float("nan")
