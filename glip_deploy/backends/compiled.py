"""Compiled graphs kept on disk: OpenVINO takes seconds to compile a graph, and a fraction of that to load it again.

OpenVINO's own cache (its property CACHE_DIR) takes a file with zeros in it for whole, and then gives other scores. Here
every entry carries the SHA-256 of its content and is written whole or not at all; the C++ runtime reads and writes the
same files. What cannot be read is a miss, what cannot be written is compiled again by the next process.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from glip_deploy.files import evict_unused, write_atomically

__all__ = ["CACHE_BYTES", "CompiledCache", "compiled_key"]

CACHE_BYTES = 4 * 2**30
"""Most bytes of compiled graphs that are kept; the longest unused go first."""
FOLDER = "openvino"
_MAGIC = b"GLIPOVC1"
_SUFFIX = ".compiled"
_HEADER = len(_MAGIC) + 32
_log = logging.getLogger(__name__)


def compiled_key(parts: Iterable[str]) -> str:
    """Return the hex key of all that a compiled graph depends on: versions, CPU, options, hashes of its files."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class CompiledCache:
    """Compiled graphs by key; see `compiled_key`.

    Args:
        directory: the toolkit's cache; None keeps nothing.
        limit: most bytes kept.
    """

    def __init__(self, directory: Path | None, limit: int = CACHE_BYTES) -> None:
        self._folder = None if directory is None else directory / FOLDER
        self._limit = limit

    @property
    def keeps(self) -> bool:
        """Whether there is a folder to keep anything in."""
        return self._folder is not None

    def get(self, key: str) -> bytes | None:
        """Return a compiled graph, or None if it is not known."""
        if self._folder is None:
            return None
        file = self._folder / (key + _SUFFIX)
        try:
            with file.open("rb") as stream:
                header, data = stream.read(_HEADER), stream.read()  # no copy: there may be a gigabyte
        except OSError:
            return None
        whole = header == _MAGIC + hashlib.sha256(data).digest()
        with suppress(OSError):  # a folder we may not write to is no reason to complain
            if whole:
                os.utime(file)  # what is longest unused goes by this time
            else:
                _log.info("removing a damaged compiled graph: %s", file)
                file.unlink()
        return data if whole else None

    def put(self, key: str, data: bytes) -> None:
        """Keep a compiled graph."""
        if self._folder is None or _HEADER + len(data) > self._limit:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(self._folder / (key + _SUFFIX), b"".join((_MAGIC, hashlib.sha256(data).digest(), data)))
            evict_unused(self._folder.glob("*" + _SUFFIX), self._limit)
        except OSError as error:
            _log.info("a compiled graph cannot be kept in %s (%s)", self._folder, error.strerror or error)

    def remove(self, key: str) -> None:
        """Forget an entry that OpenVINO cannot load."""
        if self._folder is not None:
            with suppress(OSError):
                (self._folder / (key + _SUFFIX)).unlink()
