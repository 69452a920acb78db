"""What touches the disk: atomic writing, checks of outputs before they are made, hashes, and the cache folder.

A file or folder written through `atomic_file` or `atomic_folder` is there whole or not at all: it grows under a
temporary name beside its target and is renamed when complete.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from glip_deploy.errors import OutputError, reason_of

__all__ = [
    "CACHE_VARIABLE",
    "atomic_file",
    "cache_folder",
    "check_file",
    "check_folder",
    "check_outputs",
    "check_private",
    "deliver_folder",
    "evict_unused",
    "locked_folder",
    "not_written",
    "sha256_of",
    "temporary_sibling",
    "unreadable",
    "write_atomically",
]

CACHE_VARIABLE = "GLIP_DEPLOY_CACHE"
"""Environment variable that moves everything the toolkit caches: prompt embeddings, compiled plugins."""

_UNFINISHED = ".part"
"""End of the name of a folder that is being written."""
_STALE = 3600.0
"""Seconds after which a temporary file in a cache was left by a process that was killed."""
_YOUNG = 60.0
"""Seconds for which a folder that is being written is left alone, whoever made it."""


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(*parts: str) -> Path | None:
    """Return the toolkit's cache folder, or a folder below it; None where the user has no home.

    `GLIP_DEPLOY_CACHE` if it is set, else the platform's own folder for caches (platformdirs): $XDG_CACHE_HOME or
    ~/.cache on Linux, ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows. Nothing is created.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    try:
        if chosen:
            return Path(chosen).expanduser().joinpath(*parts)
        from platformdirs import user_cache_path

        folder = user_cache_path("glip-deploy", appauthor=False)
        # Where there is no home, "~" stays in the path as it is.
        return folder.joinpath(*parts) if folder.is_absolute() else None
    except RuntimeError:  # a "~" and no home, such as a service account's
        return None


@contextmanager
def atomic_file(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it replaces `path` if the block ends well.

    Whatever happens in the block, no temporary file stays and `path` is either the old file or the whole new one. The
    temporary name keeps the suffix, because libraries choose a format by it. Where `path` is a device or a pipe, which
    cannot be replaced, it is given itself.

    Args:
        path: the file to make or replace.
        sync: wait until the bytes are on the disk, for results that must survive a power cut.

    Raises:
        OSError: whatever writing or renaming raised; `not_written` turns it into an error for people.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:32]}.", suffix=f".part{path.suffix[:16]}", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        _default_permissions(partial)
        if sync:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):  # gone already if all went well
            partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str, *, sync: bool = False) -> None:
    """Write a whole file, or leave what was there (text as UTF-8); see `atomic_file` for what may be raised."""
    with atomic_file(path, sync=sync) as partial:
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def temporary_sibling(target: Path) -> Iterator[Path]:
    """Give an empty folder on the same disk as `target`, ready to be renamed to it.

    Missing folders above `target` are made. At the end the folder is removed unless it was renamed, and so are the
    folders made above it unless they hold something. A folder that a killed process left for the same target is
    removed first.

    Raises:
        OSError: the folder cannot be made, or whatever the block raised.
    """
    parent = target.resolve().parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    directory: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name[:32]}-"
        _remove_abandoned(parent, prefix)
        directory = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=_UNFINISHED))
        with _held(directory):
            yield directory
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):  # the first that holds something, the target above all, ends it
            for folder in made:
                folder.rmdir()


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Lock a folder until the block or the process ends; gives whether it could be locked."""
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process has it, or the disk has no locks
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextmanager
def locked_folder(folder: Path, program: str) -> Iterator[bool]:
    """Hold a folder for this process, until the block or the process ends; no file is left for that.

    Args:
        folder: an existing folder.
        program: what may hold it elsewhere, for the message.

    Gives whether it is locked: not on Windows, nor where the disk has no locks.

    Raises:
        OutputError: another process holds it, or it cannot be opened.
    """
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise not_written(folder, error) from error
    locked = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"output folder {folder} is in use by another {program}; wait until that ends, or choose another folder"
            ) from None
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what `temporary_sibling` made in a process that was killed: its lock went with the process."""
    for folder in parent.glob(f"{glob.escape(prefix)}*{_UNFINISHED}"):
        with suppress(OSError):  # gone already, or not ours
            # A folder this young may be about to be locked by the process that made it.
            if folder.is_dir() and not folder.is_symlink() and time.time() - folder.stat().st_mtime > _YOUNG:
                with _held(folder) as abandoned:
                    if abandoned:
                        shutil.rmtree(folder, ignore_errors=True)


def deliver_folder(folder: Path, target: Path, *, overwrite: bool) -> None:
    """Rename a finished folder to `target`, if `overwrite` in place of one that may be there.

    Where the system can, the two change places in one step, so that there is a whole folder at `target` at any moment.
    Elsewhere the old folder is put aside first and removed last: a failure leaves one of the two whole. Folder and
    files get the permissions of new ones.

    Args:
        folder: made by `temporary_sibling(target)`.
        target: where it belongs.
        overwrite: False to fail if there is something; an empty folder may be replaced all the same.

    Raises:
        OSError: it cannot be renamed; `not_written` turns it into an error for people.
    """
    for path in (folder, *folder.rglob("*")):
        _default_permissions(path)
    if not (overwrite and target.exists()):
        folder.rename(target)
        return
    if _exchange(folder, target):  # `temporary_sibling` removes the old one
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:32]}-old-"))
    try:
        target.rename(old / target.name)
        folder.rename(target)
    finally:  # Ctrl-C included
        if not target.exists():
            (old / target.name).rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where that cannot be done."""
    if sys.platform != "linux":
        return False
    import ctypes

    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def check_outputs(inputs: Mapping[Path, str], outputs: Iterable[Path]) -> None:
    """Check that no output is a file that is read or another output, without touching anything.

    Args:
        inputs: files that are read, and what they are, such as "the source itself".
        outputs: files that will be written. Devices and pipes may be named more than once.

    Raises:
        OutputError: an output is one of the inputs, or the same file as another output.
    """
    read = {_identity(path): what for path, what in inputs.items()}
    written = set()
    for path in outputs:
        identity = _identity(path)
        if identity is None:
            continue
        if identity in read:
            raise OutputError(f"output {path} is {read[identity]} and would be overwritten; choose another name")
        if identity in written:
            raise OutputError(f"output {path} is named twice; give each output a name of its own")
        written.add(identity)


def unreadable(path: Path) -> str | None:
    """Return why a path is no file that can be read, as in "PATH does not exist", or None where it is one."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:  # a name that is too long or holds a zero byte, a folder one may not enter
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISDIR(mode):
        return "is a folder"
    return None if os.access(path, os.R_OK) else "cannot be read (permission denied)"


def check_file(path: Path) -> None:
    """Check that a file can be made or replaced, without touching anything.

    Raises:
        OutputError: it is a folder, its folder does not exist, or it may not be written.
    """
    with _refused(path):
        if path.is_dir():
            raise OutputError(f"output {path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise OutputError(f"output {path}: folder {path.parent} does not exist; make it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OutputError(f"output {path} cannot be written (permission denied); choose another place")


def check_folder(path: Path) -> None:
    """Check that files can be made in a folder that may not exist yet, without touching anything.

    Raises:
        OutputError: something above it is a file, or may not be written.
    """
    with _refused(path):
        existing = path
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise OutputError(f"output folder {path}: {existing} is a file; choose another name")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise OutputError(f"output folder {path} cannot be written (permission denied); choose another place")


def check_private(folder: Path) -> None:
    """Refuse a folder in which someone else could have put a file (Windows keeps caches in the user's profile).

    Raises:
        OutputError: it is another user's, or everyone may write to it.
        OSError: it is not there.
    """
    if os.name != "posix":
        return
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise OutputError(
            f"cache folder {folder} belongs to another user (id {status.st_uid}); set {CACHE_VARIABLE} to your own"
        )
    if status.st_mode & stat.S_IWOTH:
        raise OutputError(f"cache folder {folder} can be written by every user; chmod o-w {folder}")


def evict_unused(files: Iterable[Path], limit: int) -> None:
    """Remove the longest unused files of a cache until the others have at most `limit` bytes.

    What `atomic_file` left in a process that was killed is removed after an hour; what is younger may be in the making,
    and stays. Other processes may do the same at the same time.

    Args:
        files: entries of the cache, and temporary files beside them.
        limit: bytes.
    """
    entries = []
    stale = time.time() - _STALE
    for file in files:
        with suppress(OSError):
            status = file.stat()
            if not file.name.startswith("."):
                entries.append((status.st_mtime_ns, status.st_size, file))
            elif status.st_mtime < stale:
                file.unlink()
    excess = sum(size for _, size, _ in entries) - limit
    for _, size, file in sorted(entries):
        if excess <= 0:
            break
        with suppress(OSError):
            file.unlink()
        excess -= size


def not_written(path: Path, error: Exception) -> OutputError:
    """Return the error for a file that could not be written; a full disk is named as such."""
    number = getattr(error, "errno", None)
    # numpy only says how much of an array was taken.
    cut_short = number is None and isinstance(error, OSError) and "requested and" in str(error)
    if cut_short or number in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return OutputError(f"{path} cannot be written: no space left; free some, or write elsewhere")
    return OutputError(f"{path} cannot be written ({reason_of(error)}); choose another place")


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turn what the system refuses, such as a name that is too long or an unreadable folder, into an OutputError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise not_written(path, error) from error


def _identity(path: Path) -> tuple[int, int] | str | None:
    """Return what all names of a file have in common; None for a device or a pipe."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # it does not exist yet
        return os.path.normcase(os.path.join(os.path.realpath(path.parent), path.name))  # noqa: PTH118
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _default_permissions(path: Path) -> None:
    """Give a file or folder made by tempfile, which only its owner may read, the permissions a new one would have."""
    if os.name == "posix":
        mask = os.umask(0)
        os.umask(mask)
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
