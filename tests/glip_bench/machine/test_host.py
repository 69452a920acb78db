"""Cutting frames, and describing the machine."""

import numpy as np
import pytest
from glip_bench.machine.host import describe_machine, versions
from glip_bench.measuring.details import crop_to
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


def test_machine_and_versions_are_real():
    machine = describe_machine()
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert versions()["onnxruntime"].count(".") == 2


@pytest.mark.parametrize("key", ["python", "numpy", "onnxruntime"])
def test_versions_names(key):
    assert key in versions()
