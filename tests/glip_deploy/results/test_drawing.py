"""Drawing: places, colors and sizes of outlines and labels, and that any input can be drawn."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glip_deploy.errors import FrameError
from glip_deploy.results.detections import Detections
from glip_deploy.results.drawing import (
    _FALLBACK_FONTS,
    _font,
    _ink,
    _installed,
    _missing,
    _place,
    _tag,
    annotate,
    class_color,
)


def found(boxes, *, labels=None, phrases=None, scores=None):
    count = len(boxes)
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.linspace(0.9, 0.4, count, dtype=np.float32) if scores is None else np.array(scores, np.float32),
        labels=np.arange(count) if labels is None else np.array(labels),
        phrases=["thing"] * count if phrases is None else phrases,
    )


def gray(height=200, width=300):
    return np.full((height, width, 3), 128, np.uint8)


def test_nothing_found_gives_an_equal_copy():
    frame = gray()
    out = annotate(frame, Detections.empty())
    assert np.array_equal(out, frame) and not np.shares_memory(out, frame)


def test_outline_lies_on_the_box_in_the_color_of_its_class_and_the_frame_is_untouched():
    frame = gray()
    out = annotate(frame, found([[50, 80, 250, 180]], labels=[3]))
    assert (frame == 128).all()
    assert tuple(out[180, 150]) == class_color(3)
    assert tuple(out[130, 50]) == tuple(out[130, 250]) == class_color(3)
    assert (out[190:, :] == 128).all() and (out[:, 260:] == 128).all() and (out[:, :40] == 128).all()


def test_the_label_sits_on_a_tag_of_that_color_above_the_box():
    out = annotate(gray(), found([[50, 80, 250, 180]], labels=[1]))
    above = out[60:79, 50:120].reshape(-1, 3)
    assert (above == class_color(1)).all(axis=1).mean() > 0.25


def test_the_id_of_an_object_is_part_of_its_label():
    boxes = found([[50, 80, 250, 180]])
    tracked, renamed = replace(boxes, track=np.array([7])), replace(boxes, phrases=["thing #7"])
    assert np.array_equal(annotate(gray(), tracked), annotate(gray(), renamed))
    assert not np.array_equal(annotate(gray(), tracked), annotate(gray(), boxes))
    long = replace(tracked, phrases=["a" * 60])  # the phrase is cut short, not the id
    assert np.array_equal(annotate(gray(), long), annotate(gray(), replace(long, phrases=["a" * 47 + "…"])))
    assert not np.array_equal(annotate(gray(), long), annotate(gray(), replace(long, track=np.array([8]))))


def test_at_the_upper_edge_the_label_moves_inside():
    out = annotate(gray(), found([[50, 0, 250, 180]], labels=[1]))
    assert (out[3:16, 54:90] == class_color(1)).all(axis=2).mean() > 0.25


def test_the_better_box_is_drawn_over_the_worse():
    out = annotate(gray(), found([[50, 80, 250, 180]] * 2, labels=[5, 2], scores=[0.3, 0.8]))
    assert tuple(out[180, 150]) == class_color(2)


def test_lines_grow_with_the_picture():
    def thickness(height, width):
        box = [width * 0.25, height * 0.25, width * 0.75, height * 0.75]
        out = annotate(gray(height, width), found([box]))
        return int((out[height // 2, : width // 2] == class_color(0)).all(axis=1).sum())

    assert thickness(100, 100) == 1
    assert thickness(2160, 3840) > 2 * thickness(720, 1280)


def test_colors_are_distinct_and_do_not_change():
    colors = [class_color(i) for i in range(80)]
    assert colors == [class_color(i) for i in range(80)]
    assert len(set(colors)) == 80
    first = np.array(colors[:12], float)
    distances = np.linalg.norm(first[:, None] - first[None], axis=2)
    assert distances[~np.eye(12, dtype=bool)].min() > 40


@pytest.mark.parametrize("label", [*range(40), 79, 1202])
def test_text_contrasts_with_its_tag(label):
    def luminance(color):
        c = np.array(color) / 255
        return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    color = class_color(label)
    low, high = sorted((luminance(color), luminance(_ink(color))))
    assert (high + 0.05) / (low + 0.05) >= 4.5


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 80), st.integers(1, 25)),
    box=st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)),
)
def test_a_label_that_fits_is_kept_inside_the_picture(size, box):
    x0, x1 = sorted((box[0], box[2]))
    y0, y1 = sorted((box[1], box[3]))
    left, top, right, bottom = _place(size, (x0, y0, x1, y1), (100, 100), 2, [])
    assert left >= 0 and top >= 0 and right <= 100 and bottom <= 100
    assert (right - left, bottom - top) == size


def test_labels_avoid_each_other():
    taken = []
    for _ in range(4):
        taken.append(_place((40, 12), (30, 50, 90, 90), (200, 200), 2, taken))
    overlaps = [
        (a, b)
        for i, a in enumerate(taken)
        for b in taken[:i]
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]
    assert overlaps == []


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    boxes=st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32) for _ in range(4)]), min_size=1, max_size=4),
)
def test_any_box_on_any_picture_can_be_drawn(shape, boxes):
    out = annotate(gray(*shape), found(boxes))
    assert out.shape == (*shape, 3) and out.dtype == np.uint8


@pytest.mark.parametrize(
    "phrase", ["кошка", "一只猫", "éléphant", "😀", "مرحبا", "a\nb\tc", "", "x" * 500, "\x00\u200b", "\ud800"]
)
def test_any_label_can_be_drawn(phrase):
    out = annotate(gray(), found([[50, 80, 250, 180]], phrases=[phrase]))
    assert (out[60:79, 50:70] == class_color(0)).all(axis=2).any()


def test_ascii_looks_the_same_everywhere():
    assert _font("person", 20).getname()[0] == "Aileron"


def test_letters_beyond_latin_use_an_installed_font_that_has_them():
    if not any(_installed(name, 20) and not _missing(_installed(name, 20), "кошка") for name in _FALLBACK_FONTS):
        pytest.skip("no installed font has Cyrillic letters")
    assert _missing(_font("кошка", 20), "кошка") == 0


def test_without_installed_fonts_it_still_draws(monkeypatch):
    from glip_deploy.results import drawing as draw

    monkeypatch.setattr(draw, "_installed", lambda name, size: None)
    draw._font.cache_clear()
    draw._tag.cache_clear()
    try:
        assert _tag("кошка", "0.50", (9, 9, 9), 17).size[0] > 20
    finally:
        draw._font.cache_clear()
        draw._tag.cache_clear()


@pytest.mark.parametrize("frame", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_other_arrays_are_refused(frame):
    with pytest.raises(FrameError, match=r"\(H, W, 3\) uint8 RGB"):
        annotate(frame, Detections.empty())
