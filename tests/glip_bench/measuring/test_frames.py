"""Cutting frames to size."""

import numpy as np
from glip_bench.measuring.frames import crop_to
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None, max_examples=30)
@given(*[st.integers(1, 60)] * 4)
def test_a_frame_has_the_size_asked_for(height, width, new_height, new_width):
    picture = np.full((height, width, 3), 7, np.uint8)
    frame = crop_to(picture, (new_height, new_width))
    assert frame.shape == (new_height, new_width, 3)
    assert (frame == 7).all()


def test_the_middle_is_kept():
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 200
    assert (crop_to(picture, (10, 10)) == 200).all()
