"""Boxes whose last pixel belongs to them: areas and overlaps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glip_deploy.results.boxes import areas, pairwise_iou


def test_a_box_includes_its_last_pixel():
    boxes = np.array([[0, 0, 9, 19], [5, 5, 5, 5], [5, 5, 4, 9], [9, 9, 0, 0]], np.float32)
    assert areas(boxes).tolist() == [200, 1, 0, 0]
    assert areas(boxes).dtype == np.float32


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 9, 9], [0, 0, 9, 9], 1),
        ([0, 0, 9, 9], [5, 0, 14, 9], 50 / 150),
        ([3, 3, 3, 3], [3, 3, 3, 3], 1),  # one pixel
        ([0, 0, 9, 9], [10, 0, 19, 9], 0),  # neighbors
        ([0, 0, 9, 9], [9, 9, 18, 18], 1 / 199),
        ([5, 5, 4, 4], [5, 5, 4, 4], 0),  # no area at all
    ],
)
def test_overlaps(a, b, expected):
    with np.errstate(all="raise"):
        found = pairwise_iou(np.array([a], np.float32), np.array([b], np.float32))
    assert found.shape == (1, 1) and found.dtype == np.float64
    assert found[0, 0] == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(0, 9))
def test_the_share_of_common_pixels_is_what_counting_them_gives(seed, first, second):
    def draw(count):
        corner = np.random.default_rng(seed + count).integers(0, 12, (count, 2))
        return np.concatenate([corner, corner + np.random.default_rng(seed).integers(0, 12, (count, 2))], axis=1)

    def pixels(box):
        mask = np.zeros((24, 24), bool)
        mask[box[1] : box[3] + 1, box[0] : box[2] + 1] = True
        return mask

    a, b = draw(first), draw(second)
    counted = [[(pixels(x) & pixels(y)).sum() / (pixels(x) | pixels(y)).sum() for y in b] for x in a]
    np.testing.assert_allclose(pairwise_iou(a, b), np.array(counted).reshape(first, second))
