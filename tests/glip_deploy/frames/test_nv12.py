"""NV12: what is read of it, and its colors against BT.601 in floating point, OpenCV and swscale."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glip_deploy import Detector
from glip_deploy.errors import FrameError, OptionError
from glip_deploy.frames import make_canvas
from glip_deploy.frames.nv12 import nv12_planes, nv12_to_rgb


def by_definition(both):
    """BT.601 of limited range in floating point, color values repeated; (H, W, 3) RGB, not rounded."""
    height, width = both.shape[0] * 2 // 3, both.shape[1]
    luma, chroma = both[:height].astype(float), both[height:].astype(float).reshape(height // 2, width // 2, 2) - 128
    light = 255 / 219 * np.maximum(luma - 16, 0)
    u, v = (chroma[..., i].repeat(2, axis=0).repeat(2, axis=1) * 255 / 112 for i in range(2))
    red, blue = 0.299, 0.114
    green = 1 - red - blue
    return np.stack(
        [
            light + (1 - red) * v,
            light - (1 - blue) * blue / green * u - (1 - red) * red / green * v,
            light + (1 - blue) * u,
        ],
        axis=-1,
    ).clip(0, 255)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_colors_are_bt601(half_height, half_width, seed):
    both = np.random.default_rng(seed).integers(0, 256, (half_height * 3, half_width * 2), dtype=np.uint8)
    found = nv12_to_rgb(both)
    assert found.dtype == np.uint8
    assert np.abs(found - by_definition(both)).max() <= 0.7  # rounded, by factors of three decimals


def test_opencvs_integers():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    both = np.random.default_rng(6).integers(0, 256, (390, 254), dtype=np.uint8)
    np.testing.assert_array_equal(nv12_to_rgb(both), cv2.cvtColor(both, cv2.COLOR_YUV2RGB_NV12))


def test_black_white_and_the_primaries():
    for luma, u, v, wanted in (
        (16, 128, 128, (0, 0, 0)),
        (235, 128, 128, (255, 255, 255)),
        (0, 128, 128, (0, 0, 0)),
        (81, 90, 240, (254, 0, 0)),
        (145, 54, 34, (0, 255, 1)),
        (41, 240, 110, (0, 0, 255)),
    ):
        both = np.full((3, 2), luma, np.uint8)
        both[2] = u, v
        assert np.abs(nv12_to_rgb(both).astype(int) - wanted).max() <= 1, (luma, u, v)


def test_a_decoders_frame():
    """PyAV gives NV12; swscale's own conversion to RGB agrees to a few levels, as it is less exact."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    rows, columns = np.mgrid[0:64, 0:96]
    picture = np.stack([rows * 3, columns * 2, 255 - rows - columns], axis=-1).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="nv12")
    found = nv12_to_rgb(frame.to_ndarray())
    theirs = frame.reformat(format="rgb24").to_ndarray()
    assert np.abs(found.astype(int) - theirs).max() <= 4
    assert np.abs(found.astype(int) - picture).mean() < 3


def test_planes_may_come_in_three_shapes():
    both = np.random.default_rng(0).integers(0, 256, (9, 8), dtype=np.uint8)
    wanted = nv12_to_rgb(both)
    luma, chroma = both[:6], both[6:]
    for frame in (
        both[..., None],
        (luma, chroma),
        [luma[..., None], chroma[..., None]],
        (luma, chroma.reshape(3, 4, 2)),
    ):
        np.testing.assert_array_equal(nv12_to_rgb(frame), wanted)
    with_gaps = np.zeros((9, 11), np.uint8)
    with_gaps[:, :8] = both
    np.testing.assert_array_equal(nv12_to_rgb(with_gaps[:, :8]), wanted)
    assert nv12_planes(both)[0].base is both


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((8, 6, 3), np.uint8), r"has shape \(8, 6, 3\); legal is \(H \* 3 / 2, W\)"),
        (np.zeros((8, 6), np.uint8), r"has shape \(8, 6\)"),
        (np.zeros((9, 7), np.uint8), r"has shape \(9, 7\).*even"),
        (np.zeros((3, 6), np.uint8)[:0], r"has shape \(0, 6\)"),
        (np.zeros((9, 6), np.float32), "dtype float32; legal is uint8"),
        ((np.zeros((6, 6), np.uint8), np.zeros((6, 6), np.uint8)), r"has shapes \(6, 6\) and \(6, 6\)"),
        ((np.zeros((5, 6), np.uint8), np.zeros((3, 6), np.uint8)), r"has shapes \(5, 6\)"),
        ((np.zeros((6, 6), np.uint8),) * 3, "must be a numpy array or a pair of them"),
        (b"123", "not bytes"),
        (np.broadcast_to(np.uint8(0), (30_000, 30_000)), "600000000 pixels, more than the"),
    ],
)
def test_what_is_no_nv12(frame, message):
    with pytest.raises(FrameError, match=message):
        nv12_to_rgb(frame)


def test_a_detector_takes_it(tiny_bundle):
    both = np.random.default_rng(5).integers(0, 256, (96, 96), dtype=np.uint8)
    with Detector.open(tiny_bundle, cache_dir=None, shortest_side=96) as detector:
        wanted = detector.detect(nv12_to_rgb(both), ["person", "dog"], 0.01, color="rgb")
        for frame in (both, (both[:64], both[64:])):
            found = detector.detect(frame, ["person", "dog"], 0.01, color="nv12")
            assert len(found) == len(wanted) > 0
            np.testing.assert_array_equal(found.boxes, wanted.boxes)
        with pytest.raises(OptionError, match='resize is "gpu", which only backend tensorrt does'):
            make_canvas([both], color="nv12", method="gpu")
