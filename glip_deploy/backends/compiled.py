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

from glip_deploy.files import write_atomically

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
            content = file.read_bytes()
        except OSError:
            return None
        data = content[_HEADER:]
        whole = content[: len(_MAGIC)] == _MAGIC and hashlib.sha256(data).digest() == content[len(_MAGIC) : _HEADER]
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
            self._evict()
        except OSError as error:
            _log.info("a compiled graph cannot be kept in %s (%s)", self._folder, error.strerror or error)

    def remove(self, key: str) -> None:
        """Forget an entry that OpenVINO cannot load."""
        if self._folder is not None:
            with suppress(OSError):
                (self._folder / (key + _SUFFIX)).unlink()

    def _evict(self) -> None:
        entries = []
        for file in self._folder.glob("*" + _SUFFIX) if self._folder else ():
            with suppress(OSError):  # another process may be evicting too
                status = file.stat()
                entries.append((status.st_mtime_ns, status.st_size, file))
        excess = sum(size for _, size, _ in entries) - self._limit
        for _, size, file in sorted(entries):
            if excess <= 0:
                break
            with suppress(OSError):
                file.unlink()
            excess -= size
