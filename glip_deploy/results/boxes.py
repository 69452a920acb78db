"""The geometry of boxes, in GLIP's convention: the last pixel belongs to a box, so a width is `x2 - x1 + 1`.

Official: `maskrcnn_benchmark/structures/bounding_box.py` (`BoxList.area`), `structures/boxlist_ops.py` (`boxlist_iou`)
and, on the GPU, `csrc/cuda/ml_nms.cu` (`devIoU`); all of them add the 1 (`TO_REMOVE`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["areas", "iou", "pairwise_iou"]


def areas(boxes: NDArray[Any]) -> NDArray[Any]:
    """Return the areas, in square pixels, of (N, 4) boxes (x1, y1, x2, y2): (N,), of the dtype of the boxes.

    A box whose corners are the wrong way round has no area.
    """
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2] + 1, 0)
    product: NDArray[Any] = sides[:, 0] * sides[:, 1]
    return product


def iou(a: NDArray[Any], b: NDArray[Any], areas_a: NDArray[Any], areas_b: NDArray[Any]) -> NDArray[Any]:
    """Return the intersection over union of boxes given by coordinate, for arrays of any shape that broadcast.

    The operations and their order are those of the official `devIoU`, so that a float32 result lies on the same side
    of a threshold as the official one.

    Args:
        a: (4, ...), x1, y1, x2, y2 of some boxes, in pixels.
        b: (4, ...), the same of the others.
        areas_a: (...), what `areas` gives for the boxes of `a`.
        areas_b: (...), the same for `b`.

    Returns:
        (...) of the dtype of the boxes, in [0, 1]; NaN where neither box has an area (numpy warns of that 0 / 0).
    """
    width = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0]) + 1
    height = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1]) + 1
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    ratio: NDArray[Any] = shared / (areas_a + areas_b - shared)
    return ratio


def pairwise_iou(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Return the intersection over union of every box of `a` with every box of `b`.

    Official: `boxlist_iou`, here in float64.

    Args:
        a: (N, 4) boxes, x1, y1, x2, y2 in pixels.
        b: (M, 4) boxes.

    Returns:
        (N, M) float64 in [0, 1]; 0 where neither box has an area.
    """
    left, right = np.asarray(a, np.float64).reshape(-1, 4), np.asarray(b, np.float64).reshape(-1, 4)
    with np.errstate(invalid="ignore"):
        ratio = iou(left.T[:, :, np.newaxis], right.T[:, np.newaxis], areas(left)[:, np.newaxis], areas(right))
    known: NDArray[np.float64] = np.nan_to_num(ratio)
    return known
