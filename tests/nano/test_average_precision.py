"""COCO's average precision on cases whose answer is known."""

import numpy as np
import pytest
from nano.average_precision import Found, average_precision

HERE = [0.0, 0, 9, 9]
THERE = [50.0, 50, 79, 79]


def found(*items):
    boxes = np.array([box for box, _, _ in items], float).reshape(-1, 4)
    return Found(boxes, tuple(name for _, name, _ in items), np.array([score for _, _, score in items]))


def test_perfect_detections_are_100():
    truth = [found((HERE, "dog", 1), (THERE, "cat", 1))]
    result = average_precision([found((HERE, "dog", 0.4), (THERE, "cat", 0.9))], truth)
    assert (result.ap, result.ap50, result.classes) == (100, 100, 2)


def test_nothing_found_wrong_names_and_absent_classes():
    truth = [found((HERE, "dog", 1))]
    assert average_precision([found()], truth).ap50 == 0
    assert average_precision([found((HERE, "cat", 0.9))], truth).ap50 == 0
    # a class that is nowhere in the truth does not count, as in COCO
    assert average_precision([found((HERE, "dog", 0.9), (THERE, "cat", 0.9))], truth).ap50 == 100


def test_a_second_box_on_the_same_object_is_a_false_positive():
    truth = [found((HERE, "dog", 1), (THERE, "dog", 1))]
    twice = [found((HERE, "dog", 0.9), (HERE, "dog", 0.8), (THERE, "dog", 0.7))]
    # recalls up to 0.5 at precision 1 (51 of 101 points), the rest at 2/3
    assert average_precision(twice, truth).ap50 == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_a_loose_box_counts_at_low_overlaps_only():
    truth = [found((HERE, "dog", 1))]
    loose = [found(([0.0, 0, 9, 6], "dog", 0.9))]  # overlap 0.7
    result = average_precision(loose, truth)
    assert result.ap50 == 100
    assert result.ap == pytest.approx(50)  # 0.5, 0.55, 0.6, 0.65, 0.7


def test_scores_are_ranked_over_all_pictures():
    truth = [found((HERE, "dog", 1)), found((HERE, "dog", 1))]
    detected = [found((THERE, "dog", 0.9), (HERE, "dog", 0.1)), found((HERE, "dog", 0.5))]
    # ranked: false, true, true -> precisions 0, 1/2, 2/3; interpolated 2/3 everywhere
    assert average_precision(detected, truth).ap50 == pytest.approx(100 * 2 / 3)


def test_two_implementations_agree():
    """pycocotools, as glip-bench has it, on scenes of many near misses."""
    from pathlib import Path

    from glip_bench.quality.coco import Picture, Set
    from glip_bench.quality.coco import average_precision as by_pycocotools

    names = ("cat", "dog", "bus")
    rng = np.random.default_rng(0)

    def some(count):
        low = rng.uniform(0, 60, (count, 2))
        return np.concatenate([low, low + rng.uniform(8, 40, (count, 2))], axis=1), rng.integers(0, 3, count)

    truth, detected, rows, results = [], [], [], []
    for k in range(40):
        boxes, labels = some(4)
        near = np.concatenate([boxes + rng.normal(0, 2, boxes.shape), some(3)[0]])
        guessed = np.concatenate([labels, rng.integers(0, 3, 3)])
        scores = rng.random(7)
        truth.append(Found(boxes, tuple(names[i] for i in labels), np.ones(4)))
        detected.append(Found(near, tuple(names[i] for i in guessed), scores))
        for box, label in zip(boxes, labels, strict=True):
            size = box[2:] - box[:2] + 1  # the last pixel is part of it
            row = {"id": len(rows) + 1, "image_id": k, "category_id": int(label), "bbox": [*box[:2], *size]}
            rows.append({**row, "area": float(size.prod()), "iscrowd": 0})
        for box, label, score in zip(near, guessed, scores, strict=True):
            one = {"image_id": k, "category_id": int(label), "bbox": [*box[:2], *(box[2:] - box[:2] + 1)]}
            results.append({**one, "score": float(score)})
    data = Set(tuple(Picture(k, Path()) for k in range(40)), tuple(enumerate(names)), tuple(rows))
    ours, theirs = average_precision(detected, truth), by_pycocotools(data, results).figures
    assert 5 < theirs["AP"] < 95
    assert (ours.ap, ours.ap50) == pytest.approx((theirs["AP"], theirs["AP50"]), abs=0.01)
