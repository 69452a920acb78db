"""The bundle on disk: its manifest, the contract of its graphs, and the record of engines built from it."""

from __future__ import annotations

from glip_deploy.bundle.contract import IMAGE_GRAPH, TEXT_GRAPH, Candidates, ImageInputs, Stage
from glip_deploy.bundle.manifest import FORMAT, FORMAT_VERSION, MANIFEST, TOKENIZER, Bundle

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "IMAGE_GRAPH",
    "MANIFEST",
    "TEXT_GRAPH",
    "TOKENIZER",
    "Bundle",
    "Candidates",
    "ImageInputs",
    "Stage",
]
