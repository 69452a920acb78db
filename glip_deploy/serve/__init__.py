"""glip-serve: a bundle behind a web page and an HTTP service."""

from __future__ import annotations
