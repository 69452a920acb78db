"""Which graphs of a bundle are loaded, for engines on the CPU, whose clones share them."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

from glip_deploy.bundle.contract import BACKBONE_GRAPH, HEAD_GRAPH, IMAGE_GRAPH, TEXT_GRAPH

if TYPE_CHECKING:
    from glip_deploy.bundle.manifest import Bundle

__all__ = ["LoadedGraphs"]

_log = logging.getLogger(__name__)
Graph = TypeVar("Graph")


class LoadedGraphs(ABC, Generic[Graph]):
    """The graphs of a bundle, as an engine loads them.

    The text graph is loaded by the first prompt that is not in a cache. The image branch is loaded whole; the first
    frame with several prompts loads its two parts instead, and they serve single prompts too from then on, so that no
    weight is in memory twice.

    Args:
        bundle: whose graphs they are. The image branch is loaded at once.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._lock = threading.Lock()
        self._text: Graph | None = None
        self._image: Graph | None = self._load(IMAGE_GRAPH)
        self._parts: tuple[Graph, Graph] | None = None
        self._warned = False

    @abstractmethod
    def _load(self, graph: str) -> Graph:
        """Load a graph, named by its file in the bundle."""

    @property
    def text(self) -> Graph:
        """The text branch."""
        with self._lock:
            if self._text is None:
                self._text = self._load(TEXT_GRAPH)
            return self._text

    @property
    def image(self) -> Graph | None:
        """The image branch as a whole; None once its parts are loaded."""
        with self._lock:
            return self._image

    @property
    def parts(self) -> tuple[Graph, Graph] | None:
        """The backbone and the head; None, with a warning the first time, if the bundle is not split."""
        with self._lock:
            if self._parts is None and self._bundle.is_split:
                self._image = None  # first, so that its memory is free for the parts
                try:
                    self._parts = self._load(BACKBONE_GRAPH), self._load(HEAD_GRAPH)
                except BaseException:
                    self._image = self._load(IMAGE_GRAPH)
                    raise
            if self._parts is None and not self._warned:
                self._warned = True
                _log.warning(
                    "bundle %s lacks backbone.onnx and head.onnx, so its image branch runs whole for every prompt of a"
                    " frame; export it again with glip-export to make that faster",
                    self._bundle.path,
                )
            return self._parts

    def in_use(self) -> list[Graph]:
        """Return the graphs that are loaded now."""
        with self._lock:
            return [graph for graph in (self._text, self._image, *(self._parts or ())) if graph is not None]
