"""Replacing a file so that a reader, or a crash at any moment, finds the old file whole or the new one whole."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Set
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
    temporary = target.parent / f".{target.name[:64]}.{secrets.token_hex(8)}.tmp"
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        os.chmod(temporary, mode)  # the body may have made a file of its own
        sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync(target.parent)


def sync(path: Path) -> None:
    """Write a file, or the entries of a directory, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def moved_in(source: Path, directory: Path, stale: Set[str], retired: Path, last: str) -> None:
    """Move all files of `source` to `directory`, and those they replace or that are stale to the new folder `retired`.

    An error undoes it. The file named `last`, without which the others are not read, goes first and comes last: a
    process that is killed between leaves no mixture that could be taken for whole, and both, old and new, in a folder.
    """
    new = sorted((entry.name for entry in source.iterdir()), key=lambda name: name == last)
    old = sorted({name for name in {*new, *stale, last} if (directory / name).exists()}, key=lambda name: name != last)
    retired.mkdir()
    moves = [(directory / name, retired / name) for name in old] + [(source / name, directory / name) for name in new]
    done = []
    try:
        for move in moves:
            done.append(move)
            os.rename(*move)
    except BaseException:
        for before, after in reversed(done):
            with suppress(FileNotFoundError):
                os.rename(after, before)
        raise
    sync(directory)
