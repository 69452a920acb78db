"""GLIP's training losses: token focal, GIoU, centerness; anchors assigned by ATSS.

Sources: GLIP (Li et al., CVPR 2022), section 3.1; ATSS (Zhang et al., CVPR 2020), algorithm 1; the official
`rpn/loss.py`. Boxes are xyxy with inclusive last pixels, so a width is x1 - x0 + 1, as everywhere in GLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from glip_export.model.config import HeadConfig
from glip_export.model.head import ANCHOR_CELLS, HeadOutputs, decode
from torch import Tensor
from torch.nn import functional as F

from glip_deploy.frames.geometry import ceil_div
from glip_deploy.results.boxes import pairwise_iou

__all__ = [
    "Anchors",
    "Losses",
    "assign",
    "centerness_target",
    "detection_losses",
    "giou",
    "make_anchors",
    "phrase_contrast",
    "token_focal",
]

CANDIDATES_PER_LEVEL = 9  # MODEL.ATSS.TOPK
BOX_WEIGHT = 2.0  # MODEL.ATSS.REG_LOSS_WEIGHT


@dataclass(frozen=True)
class Anchors:
    """One square anchor a location, all levels one after another."""

    boxes: Tensor
    """(N, 4)."""
    columns: Tensor
    """(N,) location column, floating point."""
    rows: Tensor
    strides: Tensor
    """(N,) pixels per location."""
    counts: tuple[int, ...]
    """Locations per level."""

    @property
    def centers(self) -> Tensor:
        """(N, 2) x and y."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2


def make_anchors(height: int, width: int, strides: Sequence[int]) -> Anchors:
    """Return the anchors of a canvas; a level has ceil(size / stride) locations a side (its convolutions pad)."""
    columns, rows, steps, counts = [], [], [], []
    for stride in strides:
        h, w = ceil_div(height, stride), ceil_div(width, stride)
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        columns.append(x.flatten().float())
        rows.append(y.flatten().float())
        steps.append(torch.full((h * w,), float(stride)))
        counts.append(h * w)
    x, y, stride_of = torch.cat(columns), torch.cat(rows), torch.cat(steps)
    left, top = (x - ANCHOR_CELLS / 2 + 0.5) * stride_of, (y - ANCHOR_CELLS / 2 + 0.5) * stride_of
    size = ANCHOR_CELLS * stride_of - 1
    boxes = torch.stack((left, top, left + size, top + size), dim=1)
    return Anchors(boxes, x, y, stride_of, tuple(counts))


def assign(anchors: Anchors, boxes: Tensor) -> Tensor:
    """Match anchors to objects (ATSS), on the CPU.

    Of every level the 9 anchors nearest to an object's center are candidates; those whose overlap reaches the
    candidates' mean plus standard deviation, and whose center is inside the object, are positive. An anchor wanted
    twice takes the object it overlaps most.

    Args:
        anchors: N of them.
        boxes: (G, 4), G may be 0.

    Returns:
        (N,) int64 object of every anchor, -1 for background.
    """
    total = anchors.boxes.shape[0]
    if not len(boxes):
        return torch.full((total,), -1, dtype=torch.int64)
    overlap = torch.from_numpy(pairwise_iou(anchors.boxes.numpy(), boxes.numpy())).float()
    distance = torch.cdist(anchors.centers, (boxes[:, :2] + boxes[:, 2:]) / 2)
    picked, start = [], 0
    for count in anchors.counts:
        nearest = distance[start : start + count].topk(min(CANDIDATES_PER_LEVEL, count), dim=0, largest=False).indices
        picked.append(nearest + start)
        start += count
    candidates = torch.cat(picked)  # (K, G)
    overlaps = overlap.gather(0, candidates)
    good = overlaps >= overlaps.mean(0) + overlaps.std(0)
    x, y = anchors.centers[candidates].unbind(-1)
    inside = torch.stack((x - boxes[:, 0], y - boxes[:, 1], boxes[:, 2] - x, boxes[:, 3] - y)).amin(0) > 0.01
    score = torch.full_like(overlap, -1.0)
    score.scatter_(0, candidates, torch.where(good & inside, overlaps, torch.full_like(overlaps, -1.0)))
    best, owner = score.max(dim=1)
    return torch.where(best >= 0, owner, torch.full_like(owner, -1))


def token_focal(logits: Tensor, targets: Tensor, mask: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the sum of the sigmoid focal loss over locations and real tokens.

    Official: `token_sigmoid_binary_focal_loss`.

    Args:
        logits: (B, T, N) alignment of tokens and locations.
        targets: the same shape, 1 where the location's object is named by the token.
        mask: (B, T), one for real tokens.
        alpha: weight of the positives.
        gamma: how much easy ones fade.
    """
    probability = logits.sigmoid()
    wrong = targets * (1 - probability) + (1 - targets) * probability
    weight = (targets * alpha + (1 - targets) * (1 - alpha)) * wrong**gamma
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weight
    return (loss * mask[:, :, None]).sum()


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Return (P,) generalized overlaps, -1 to 1, of paired (P, 4) boxes (Rezatofighi et al., CVPR 2019)."""
    common = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2]) + 1).clamp(min=0).prod(-1)
    union = (a[:, 2:] - a[:, :2] + 1).clamp(min=0).prod(-1) + (b[:, 2:] - b[:, :2] + 1).clamp(min=0).prod(-1) - common
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2]) + 1).clamp(min=0).prod(-1)
    return common / union.clamp(min=1e-7) - (hull - union) / hull.clamp(min=1e-7)


def centerness_target(centers: Tensor, boxes: Tensor) -> Tensor:
    """Return (P,) in 0..1, how central a location is in its object (FCOS, Tian et al., ICCV 2019)."""
    left, right = centers[:, 0] - boxes[:, 0], boxes[:, 2] - centers[:, 0]
    top, bottom = centers[:, 1] - boxes[:, 1], boxes[:, 3] - centers[:, 1]
    x = torch.minimum(left, right) / torch.maximum(left, right).clamp(min=1e-6)
    y = torch.minimum(top, bottom) / torch.maximum(top, bottom).clamp(min=1e-6)
    return (x * y).clamp(min=0).sqrt()


def phrase_contrast(outputs: HeadOutputs, matched: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Return the mean cross-entropy over a prompt's classes at the positive locations.

    Not in GLIP: the focal loss alone needs long to tell names apart, and a run of an hour does not have long. It
    reads the same logits, so nothing of it is left in the model.

    Args:
        outputs: of `Glip.predict`.
        matched: (B, N) int64 object of every location, -1 for background.
        labels: (B, G) int64 class of every object.
        classes: (B, C, T), rows averaging the tokens of a class; all-zero rows are padding.
    """
    logits = torch.cat([level.logits for level in outputs.levels], dim=2).float()
    image, location = (matched >= 0).nonzero(as_tuple=True)
    if not len(image):
        return logits.sum() * 0
    label = labels[image, matched[image, location]]
    scores = (classes[image] @ logits[image, :, location][:, :, None])[..., 0]
    scores = scores.masked_fill(~classes.any(dim=2)[image], -1e4)
    return F.cross_entropy(scores, label)


@dataclass(frozen=True)
class Losses:
    """The three terms, weighted."""

    token: Tensor
    box: Tensor
    centerness: Tensor

    @property
    def total(self) -> Tensor:
        """The sum, which training minimizes."""
        return self.token + self.box + self.centerness


def detection_losses(
    outputs: HeadOutputs,
    anchors: Anchors,
    matched: Tensor,
    boxes: Tensor,
    token_map: Tensor,
    mask: Tensor,
    config: HeadConfig,
) -> Losses:
    """Return the losses of a batch.

    Args:
        outputs: of `Glip.predict`.
        anchors: of the canvas, from `make_anchors(..., config.strides)`.
        matched: (B, N) int64 from `assign`.
        boxes: (B, G, 4), padded to the largest G.
        token_map: (B, G, T), 1 where a token names the object.
        mask: (B, T), one for real tokens.
        config: strides, to decode.
    """
    logits = torch.cat([level.logits for level in outputs.levels], dim=2).float()
    deltas = torch.cat([level.deltas for level in outputs.levels], dim=2).float().transpose(1, 2)
    centerness = torch.cat([level.centerness[:, 0] for level in outputs.levels], dim=1).float()

    image, location = (matched >= 0).nonzero(as_tuple=True)
    owner = matched[image, location]
    count = max(1, len(image))
    targets = torch.zeros_like(logits)
    targets[image, :, location] = token_map[image, owner].to(logits.dtype)
    token = token_focal(logits, targets, mask.to(logits.dtype)) / count

    true = boxes[image, owner]
    nearness = centerness_target(anchors.centers[location], true)
    predicted = torch.cat(
        [
            decode(deltas[image[at], location[at]], anchors.columns[location[at]], anchors.rows[location[at]], stride)
            for stride in config.strides
            for at in [anchors.strides[location] == stride]
        ]
    )
    # `decode` takes one stride at a time, so its rows come level by level.
    order = torch.cat([(anchors.strides[location] == stride).nonzero()[:, 0] for stride in config.strides])
    box = ((1 - giou(predicted, true[order])) * nearness[order]).sum() / nearness.sum().clamp(min=1e-6)
    center = F.binary_cross_entropy_with_logits(centerness[image, location], nearness, reduction="sum") / count
    return Losses(token, BOX_WEIGHT * box, center)
