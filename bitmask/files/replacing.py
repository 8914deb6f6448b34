"""Replacing a file so that a reader, or a crash at any moment, finds the old file whole or the new one whole."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of an empty file in the same directory, which takes the place of `path` when the body succeeds.

    It is on disk before it is renamed, and keeps the mode of the file that it replaces; a symbolic link stays one. If
    the body fails, nothing is left of it. What is mapped from the old file stays readable.

    Raises:
        OSError: the directory is missing or not writable, the disk is full; the old file is untouched then.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"path: got the directory {target}, expected a file")
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:64]}.", suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, _mode_of(target))
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync(target.parent)


def _mode_of(target: Path) -> int:
    """The mode of the file that is replaced; for a new one what the process would give it."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def _sync(path: Path) -> None:
    """Write a file, or the entries of a directory, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
