"""Sources of frames, sinks of results, and the loop between them."""

from __future__ import annotations

from glip_deploy.video.base import Frame, Sink, Source
from glip_deploy.video.open import open_source
from glip_deploy.video.pipeline import RunSummary, StageTimes, detect_stream, run

__all__ = ["Frame", "RunSummary", "Sink", "Source", "StageTimes", "detect_stream", "open_source", "run"]
