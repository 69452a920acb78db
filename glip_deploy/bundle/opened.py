"""The folder and files of a bundle as they were when it was opened, whatever is put in their place meanwhile.

A bundle is hashed when it is opened, and its graphs are loaded later, by libraries that take a path. In between another
process may replace it. `OpenedFolder` reads on from the folder that was opened, and tells whether a file in it is still
the one that was hashed.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["FileState", "OpenedFolder"]


class FileState(NamedTuple):
    """What changes when a file is written, or replaced by another."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int
    """Nanoseconds, as `modified`; also moves when a file is renamed or gets another link."""


class OpenedFolder:
    """A folder that stays the same one under `path`, even if another is renamed to the name by which it was opened.

    On Linux a descriptor is held, and `path` goes through it. Elsewhere `path` is the name itself.

    Args:
        name: the folder.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, name: Path) -> None:
        self.name = name
        self.path = name
        """Where its files can be read."""
        self._descriptor: int | None = None
        if sys.platform == "linux":
            self._descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            through = Path(f"/proc/self/fd/{self._descriptor}")
            with suppress(OSError):  # without /proc the name has to do
                if through.samefile(name):
                    self.path = through

    def state(self, file: str) -> FileState:
        """Return the state of a file.

        Raises:
            OSError: it is not there.
        """
        status = (self.path / file).stat()
        return FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def renames(self) -> tuple[str, int, int]:
        """What changes when the folder is renamed, or another one is put in its place.

        A library that resolves the path twice may fail because the folder was renamed in between, or read another file:
        ONNX Runtime resolves the folder of a graph to its name before it opens the weights there.
        """
        try:
            status = self.path.stat()  # renaming a folder sets its ctime
            return os.path.realpath(self.path), status.st_ino, status.st_ctime_ns
        except OSError:
            return "", 0, 0

    def shown(self, text: str) -> str:
        """Return a message with the folder's name in place of the path that goes through the descriptor."""
        return text if self.path == self.name else text.replace(f"{self.path}/", f"{self.name}/")

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)
