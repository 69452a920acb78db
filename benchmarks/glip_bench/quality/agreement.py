"""Whether two subjects find the same boxes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.results.boxes import pairwise_iou

if TYPE_CHECKING:
    from glip_deploy.results.detections import Detections

__all__ = ["Agreement", "compare_boxes"]

LEAST_IOU = 0.95
MOST_SCORE_DIFFERENCE = 0.01


@dataclass(frozen=True)
class Agreement:
    """How many boxes of a reference another subject found too."""

    matched: int
    of: int
    """Boxes of the reference."""
    found: int
    """Boxes of the other subject."""
    worst_iou: float | None
    """Among the matched; None where none is."""
    worst_score_difference: float | None

    @property
    def same(self) -> bool:
        """Whether every box of each has its partner in the other."""
        return self.matched == self.of == self.found

    def __str__(self) -> str:
        """Return the form of a table: "81 of 81"."""
        extra = self.found - self.matched
        return f"{self.matched} of {self.of}" + (f", {extra} more" if extra else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the form of a result file."""
        return {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(self).items()}


def compare_boxes(
    reference: Detections,
    other: Detections,
    least_iou: float = LEAST_IOU,
    most_score_difference: float = MOST_SCORE_DIFFERENCE,
) -> Agreement:
    """Match boxes one to one: same label, overlap and score within the limits; best overlap first.

    Args:
        reference: of the first subject.
        other: of another one, for the same frame and prompt.
        least_iou: intersection over union of a matched pair.
        most_score_difference: between the two scores.
    """
    iou = pairwise_iou(reference.boxes, other.boxes)
    difference = np.abs(reference.scores[:, None].astype(np.float64) - other.scores[None])
    possible = (reference.labels[:, None] == other.labels[None]) & (iou >= least_iou)
    possible &= difference <= most_score_difference
    rows, columns = np.nonzero(possible)
    left, right = set(range(len(reference))), set(range(len(other)))
    pairs = []
    for index in np.argsort(-iou[rows, columns], kind="stable"):
        pair = int(rows[index]), int(columns[index])
        if pair[0] in left and pair[1] in right:
            left.remove(pair[0])
            right.remove(pair[1])
            pairs.append(pair)
    return Agreement(
        matched=len(pairs),
        of=len(reference),
        found=len(other),
        worst_iou=min((float(iou[pair]) for pair in pairs), default=None),
        worst_score_difference=max((float(difference[pair]) for pair in pairs), default=None),
    )
