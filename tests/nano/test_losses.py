"""The training losses against cases small enough to work out by hand."""

import math

import pytest
import torch
from glip_export.model.config import HeadConfig
from glip_export.model.head import HeadOutputs, LevelOutputs, decode
from nano.losses import (
    assign,
    centerness_target,
    detection_losses,
    giou,
    make_anchors,
    phrase_contrast,
    token_focal,
)

from glip_deploy.results import boxes as box_geometry


def pairwise_iou(a, b):
    return torch.from_numpy(box_geometry.pairwise_iou(a.numpy(), b.numpy())).float()


def test_anchors_are_the_official_ones_and_what_zero_deltas_decode_to():
    anchors = make_anchors(64, 96, (8, 16))
    assert anchors.counts == (8 * 12, 4 * 6)
    # official cell anchors: stride 8 -> (-28, -28, 35, 35), stride 16 -> (-56, -56, 71, 71)
    assert anchors.boxes[0].tolist() == [-28, -28, 35, 35]
    assert anchors.boxes[96].tolist() == [-56, -56, 71, 71]
    at = 96 + 8  # row 1, column 2 of the second level
    zero = decode(torch.zeros(4), anchors.columns[at], anchors.rows[at], 16)
    assert torch.allclose(zero, anchors.boxes[at])


def test_giou_of_equal_touching_and_distant_boxes():
    a = torch.tensor([[0.0, 0, 9, 9]] * 3)
    b = torch.tensor([[0.0, 0, 9, 9], [10.0, 0, 19, 9], [90.0, 0, 99, 9]])
    assert giou(a, b).tolist() == pytest.approx([1.0, 0.0, -(1000 - 200) / 1000])


def test_centerness_is_one_in_the_middle_and_falls_to_the_edge():
    box = torch.tensor([[0.0, 0, 8, 8]] * 3)
    centers = torch.tensor([[4.0, 4.0], [2.0, 4.0], [0.0, 4.0]])
    assert centerness_target(centers, box).tolist() == pytest.approx([1.0, math.sqrt(2 / 6), 0.0])


def test_token_focal_by_hand_and_padding_is_free():
    logits = torch.tensor([[[0.0], [0.0], [5.0]]])
    targets = torch.tensor([[[1.0], [0.0], [0.0]]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    expected = 0.25 * 0.25 * math.log(2) + 0.75 * 0.25 * math.log(2)
    assert token_focal(logits, targets, mask).item() == pytest.approx(expected)


def test_atss_takes_the_level_that_fits_and_only_locations_inside():
    strides = (8, 16, 32)
    anchors = make_anchors(256, 256, strides)
    box = torch.tensor([[64.0, 64.0, 127.0, 127.0]])  # 64 pixels: as large as the anchors of stride 8
    owner = assign(anchors, box)
    chosen = owner == 0
    assert chosen.any()
    assert anchors.strides[chosen].unique().tolist() == [8]
    centers = anchors.centers[chosen]
    assert bool(((centers > 64) & (centers < 127)).all())
    assert int(chosen.sum()) <= 9


def test_atss_threshold_is_mean_plus_deviation_of_the_candidates():
    # One level with 4 locations, all of them candidates: only the one above mean + std is positive.
    anchors = make_anchors(16, 16, (8,))
    box = torch.tensor([[-20.0, -20.0, 43.0, 43.0]])
    overlap = pairwise_iou(anchors.boxes, box)[:, 0]
    limit = overlap.mean() + overlap.std()
    assert (assign(anchors, box) == 0).tolist() == (overlap >= limit).tolist()
    assert (overlap >= limit).sum() == 1


def test_an_anchor_wanted_twice_takes_what_it_overlaps_most():
    anchors = make_anchors(256, 256, (8, 16))
    boxes = torch.tensor([[60.0, 60, 130, 130], [64.0, 64, 127, 127]])
    both = assign(anchors, boxes)
    alone = [assign(anchors, box[None]) == 0 for box in boxes]
    overlap = pairwise_iou(anchors.boxes, boxes)
    contested = alone[0] & alone[1]
    assert contested.any()
    assert torch.equal(both[contested], overlap[contested].argmax(1))


def test_no_objects_means_background_everywhere():
    anchors = make_anchors(64, 64, (8,))
    assert (assign(anchors, torch.zeros(0, 4)) == -1).all()


def outputs_for(anchors, tokens, logit):
    levels, start = [], 0
    for count in anchors.counts:
        levels.append(
            LevelOutputs(
                logits=logit[:, :, start : start + count],
                deltas=torch.zeros(1, 4, count),
                centerness=torch.zeros(1, 1, count),
                width=0,
            )
        )
        start += count
    return HeadOutputs(levels, torch.zeros(1, tokens, 2))


def test_right_answers_cost_nothing_and_wrong_ones_do():
    config = HeadConfig()
    anchors = make_anchors(256, 256, config.strides)
    at = 10 * 32 + 12
    boxes = anchors.boxes[at].clone()[None, None]
    matched = torch.full((1, len(anchors.boxes)), -1)
    matched[0, at] = 0
    token_map = torch.tensor([[[0.0, 1.0, 0.0]]])
    mask = torch.ones(1, 3)
    right = torch.full((1, 3, len(anchors.boxes)), -20.0)
    right[0, 1, at] = 20.0
    good = detection_losses(outputs_for(anchors, 3, right), anchors, matched, boxes, token_map, mask, config)
    assert good.token.item() == pytest.approx(0, abs=1e-6)
    assert good.box.item() == pytest.approx(0, abs=1e-5)  # zero deltas are this anchor
    swapped = right[:, [1, 0, 2]]
    bad = detection_losses(outputs_for(anchors, 3, swapped), anchors, matched, boxes, token_map, mask, config)
    assert bad.token.item() > 10
    moved = detection_losses(outputs_for(anchors, 3, right), anchors, matched, boxes + 30, token_map, mask, config)
    assert moved.box.item() > 0.3


def test_boxes_of_several_levels_meet_their_own_objects():
    config = HeadConfig()
    anchors = make_anchors(256, 256, config.strides)
    places = [40, anchors.counts[0] + 20, sum(anchors.counts[:2]) + 5, 3]
    boxes = anchors.boxes[places].clone()[None]
    matched = torch.full((1, len(anchors.boxes)), -1)
    matched[0, places] = torch.arange(4)
    quiet = torch.full((1, 2, len(anchors.boxes)), -20.0)
    losses = detection_losses(
        outputs_for(anchors, 2, quiet), anchors, matched, boxes, torch.zeros(1, 4, 2), torch.ones(1, 2), config
    )
    assert losses.box.item() == pytest.approx(0, abs=1e-5)


def test_contrast_compares_the_classes_of_the_prompt_only():
    anchors = make_anchors(64, 64, (8,))
    logit = torch.zeros(1, 3, len(anchors.boxes))
    logit[0, :, 5] = torch.tensor([2.0, 4.0, 0.0])  # class 0 averages tokens 0 and 1, class 1 is token 2
    matched = torch.full((1, len(anchors.boxes)), -1)
    matched[0, 5] = 0
    classes = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    outputs = outputs_for(anchors, 3, logit)
    right = phrase_contrast(outputs, matched, torch.tensor([[0]]), classes)
    wrong = phrase_contrast(outputs, matched, torch.tensor([[1]]), classes)
    assert right.item() == pytest.approx(math.log(1 + math.exp(-3)))
    assert wrong.item() == pytest.approx(3 + math.log(1 + math.exp(-3)))
    assert phrase_contrast(outputs, torch.full_like(matched, -1), torch.tensor([[0]]), classes).item() == 0
