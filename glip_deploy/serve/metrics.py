"""What a server counts, in the form of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector

if TYPE_CHECKING:
    from glip_deploy.serve.models import Model, Places

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_FRAMES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counters of one application.

    Args:
        models: by name, whose queues are shown.
        places: of the requests that are under way.
    """

    def __init__(self, models: Mapping[str, Model], places: Places) -> None:
        self._registry = CollectorRegistry()
        names: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter(
            "glip_requests", "Requests answered, by path and status.", ["path", "method", "status"], **names
        )
        self.seconds = Histogram(
            "glip_request_seconds",
            "Time from a request's header to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            **names,
        )
        self._batch = Histogram("glip_batch_frames", "Frames looked at together.", ["model"], buckets=_FRAMES, **names)
        self._stage = Histogram(
            "glip_stage_seconds", "Time of each step of a batch.", ["model", "stage"], buckets=_SECONDS, **names
        )
        self._registry.register(_Queues(models, places))
        ProcessCollector(registry=self._registry)
        for name, model in models.items():
            model.observe = self._observer(name)

    def _observer(self, name: str) -> Callable[[int, dict[str, float]], None]:
        def observe(frames: int, seconds: dict[str, float]) -> None:
            self._batch.labels(name).observe(frames)
            for stage, took in seconds.items():
                self._stage.labels(name, stage).observe(took)

        return observe

    def text(self) -> bytes:
        """Return all of them as Prometheus reads them."""
        return generate_latest(self._registry)


class _Queues:
    """The queues as they are at the moment."""

    def __init__(self, models: Mapping[str, Model], places: Places) -> None:
        self._models, self._places = models, places

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Give the gauges."""
        under_way = GaugeMetricFamily("glip_requests_under_way", "Requests that hold a place.", self._places.taken)
        waiting = GaugeMetricFamily("glip_frames_waiting", "Frames in the queue.", labels=["model"])
        for name, model in self._models.items():
            waiting.add_metric([name], model.waiting)
        return [under_way, waiting]
