"""Prompt embeddings kept: the text branch runs once per distinct prompt, even across processes.

On disk an entry is one file, whole or not there at all whatever another process does. A cache is never worth an
error: what cannot be read is a miss, what cannot be written is kept in memory.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glip_deploy.files import evict_unused, write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DEFAULT_DISK_BYTES", "PromptCache"]

DEFAULT_DISK_BYTES = 256 * 2**20
_log = logging.getLogger(__name__)
_SUFFIX = ".embedding"
"""End of an entry's name. It holds the SHA-256 of bundle, key and array, then the (T, D) float32 array as .npy."""
_DIGEST_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


class PromptCache:
    """Text embeddings by prompt: least recently used in memory, and files that other processes share.

    Safe with several threads and several processes. Embeddings go in and come out as (T, D) float32, T tokens
    and D features, read-only.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        bundle_key: str,
        memory_items: int = 64,
        disk_bytes: int = DEFAULT_DISK_BYTES,
    ) -> None:
        """Open a cache; nothing is touched on disk before the first `put`.

        Args:
            directory: shared by all bundles; None keeps embeddings in memory alone.
            bundle_key: what the embeddings depend on besides the prompt, such as the text graph's SHA-256.
            memory_items: most entries kept in memory; 0 for none.
            disk_bytes: most bytes of entries kept in `directory`, of all bundles together; the longest
                unused go first.

        Raises:
            ValueError: a key that is not letters, digits, "_" and "-", or a negative limit.
        """
        if memory_items < 0 or disk_bytes < 0:
            raise ValueError(f"memory_items {memory_items} and disk_bytes {disk_bytes}: neither may be negative")
        self._bundle_key = _checked(bundle_key, "bundle_key")
        self._root = None if directory is None else Path(directory)
        self._memory_items = memory_items
        self._disk_bytes = disk_bytes
        self._memory: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()
        self._warned = False

    @property
    def directory(self) -> Path | None:
        """Where this bundle's entries lie, or None."""
        return None if self._root is None else self._root / self._bundle_key[:16]

    def get(self, key: str) -> NDArray[np.float32] | None:
        """Return the (T, D) float32 embedding of a prompt, read-only, or None if it is not known."""
        _checked(key, "key")
        with self._lock:
            known = self._memory.get(key)
            if known is not None:
                self._memory.move_to_end(key)
                return known
        embedding = self._read(key)
        if embedding is not None:
            self._remember(key, embedding)
        return embedding

    def put(self, key: str, embedding: NDArray[Any]) -> None:
        """Keep a prompt's (T, D) float32 embedding; a copy is made.

        Raises:
            ValueError: another shape or dtype.
        """
        _checked(key, "key")
        if embedding.ndim != 2 or embedding.dtype != np.float32:
            raise ValueError(f"embedding has shape {embedding.shape} and dtype {embedding.dtype}; (T, D) float32")
        own = np.array(embedding, dtype=np.float32, order="C")
        own.setflags(write=False)
        self._remember(key, own)
        directory = self.directory
        if directory is None:
            return
        content = self._packed(key, own)
        if len(content) > self._disk_bytes:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(directory / (key + _SUFFIX), content)
            evict_unused(directory.parent.glob(f"*/*{_SUFFIX}"), self._disk_bytes)
        except OSError as error:
            self._warn(directory, error)

    def _remember(self, key: str, embedding: NDArray[np.float32]) -> None:
        with self._lock:
            self._memory[key] = embedding
            self._memory.move_to_end(key)
            while len(self._memory) > self._memory_items:
                self._memory.popitem(last=False)

    def _read(self, key: str) -> NDArray[np.float32] | None:
        if self.directory is None:
            return None
        file = self.directory / (key + _SUFFIX)
        try:
            with file.open("rb") as stream:
                # A file beyond the limit was not written here, and must not fill the memory.
                ours = os.fstat(stream.fileno()).st_size <= self._disk_bytes
                content = stream.read() if ours else b""
        except OSError:
            return None
        embedding = self._unpacked(key, content)
        # A folder that may not be written, or another process that was quicker, is not worth a warning.
        with suppress(OSError):
            if embedding is None:
                _log.info("removing a damaged prompt cache entry: %s", file)
                file.unlink()
            else:
                os.utime(file)  # eviction goes by this time
        return embedding

    def _packed(self, key: str, embedding: NDArray[np.float32]) -> bytes:
        stream = io.BytesIO()
        np.save(stream, embedding, allow_pickle=False)
        return self._digest(key, stream.getvalue()) + stream.getvalue()

    def _unpacked(self, key: str, content: bytes) -> NDArray[np.float32] | None:
        digest, array = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest != self._digest(key, array):
            return None
        embedding: NDArray[np.float32] = np.load(io.BytesIO(array), allow_pickle=False)
        embedding.setflags(write=False)
        return embedding

    def _digest(self, key: str, array: bytes) -> bytes:
        return hashlib.sha256(f"{self._bundle_key} {key}\n".encode() + array).digest()

    def _warn(self, directory: Path, error: OSError) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            _log.warning(
                "prompt embeddings cannot be kept in %s (%s), so the next process encodes them again;"
                " free or allow the directory, or set GLIP_DEPLOY_CACHE to another",
                directory,
                error.strerror or error,
            )


def _checked(key: str, name: str) -> str:
    if not _NAME.fullmatch(key):
        raise ValueError(f"{name} is {key!r}; 1 to 128 letters, digits, '_' and '-' are legal")
    return key
