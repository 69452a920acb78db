"""The objects that a visitor sees, followed from frame to frame of whatever stream is watched."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from glip_deploy.video.tracking import WEAK, Tracker

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from glip_deploy.results.detections import Detections
    from glip_deploy.serve.broadcast import Taken

__all__ = ["Tracks"]


class Tracks:
    """The ids of one visitor, from 1; none is given twice while the connection lasts.

    Raises:
        MissingPackage: the packages of the extra `track` are not installed.
    """

    def __init__(self) -> None:
        self._tracker = Tracker()
        self._stream: object = None
        # The last frame of one source may be under way in another thread when the first of the next one comes.
        self._lock = threading.Lock()

    @staticmethod
    def limits(taken: Taken) -> NDArray[np.float32]:
        """Return (C,) float32: what a score must exceed to be looked for, so that objects stay known while it dips."""
        return WEAK * taken.limits

    def follow(self, found: Detections, taken: Taken, stream: object, time: float) -> Detections:
        """Return the detections of the next frame that are above the visitor's thresholds, with their tracks.

        Args:
            found: in the frame, down to `limits` or below, as other visitors may have lower thresholds.
            taken: the prompt of the frame.
            stream: what the frame is from; in another one than before no object is the same.
            time: of the frame, in seconds by the stream's clock.
        """
        with self._lock:
            if stream is not self._stream:
                self._tracker.reset()
                self._stream = stream
            own = found[found.scores > self.limits(taken)[found.labels]]
            return self._tracker.update(own, taken.encoded.phrases, taken.limits.tolist(), time=time)
