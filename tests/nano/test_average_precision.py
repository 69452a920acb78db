"""COCO's average precision on cases whose answer is known."""

import math

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
    assert (result.ap, result.ap50) == pytest.approx((100, 100))


def test_nothing_found_wrong_names_and_absent_classes():
    truth = [found((HERE, "dog", 1))]
    assert average_precision([found()], truth).ap50 == 0
    assert average_precision([found((HERE, "cat", 0.9))], truth).ap50 == 0
    # a class that is nowhere in the truth does not count, as in COCO
    assert average_precision([found((HERE, "dog", 0.9), (THERE, "cat", 0.9))], truth).ap50 == pytest.approx(100)


def test_a_second_box_on_the_same_object_is_a_false_positive():
    truth = [found((HERE, "dog", 1), (THERE, "dog", 1))]
    twice = [found((HERE, "dog", 0.9), (HERE, "dog", 0.8), (THERE, "dog", 0.7))]
    # recalls up to 0.5 at precision 1 (51 of 101 points), the rest at 2/3
    assert average_precision(twice, truth).ap50 == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_a_loose_box_counts_at_low_overlaps_only():
    truth = [found((HERE, "dog", 1))]
    loose = [found(([0.0, 0, 9, 6], "dog", 0.9))]  # overlap 0.7
    result = average_precision(loose, truth)
    assert result.ap50 == pytest.approx(100)
    assert result.ap == pytest.approx(50)  # 0.5, 0.55, 0.6, 0.65, 0.7


def test_scores_are_ranked_over_all_pictures():
    truth = [found((HERE, "dog", 1)), found((HERE, "dog", 1))]
    detected = [found((THERE, "dog", 0.9), (HERE, "dog", 0.1)), found((HERE, "dog", 0.5))]
    # ranked: false, true, true -> precisions 0, 1/2, 2/3; interpolated 2/3 everywhere
    assert average_precision(detected, truth).ap50 == pytest.approx(100 * 2 / 3)


def test_nothing_there_is_not_a_number():
    result = average_precision([found((HERE, "dog", 0.9))], [found()])
    assert math.isnan(result.ap) and math.isnan(result.ap50)
