"""Directories that are replaced as a whole: whatever stops the process, the old one or the new one is there.

A directory can't be replaced in one step. The new one is written beside it under another name (``<name>.partial``), the
old one is moved aside (``<name>.previous``), and the new one takes its place. Whoever reads asks :func:`present`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREVIOUS, PARTIAL = ".previous", ".partial"


def present(directory: Path) -> Path:
    """
    :param directory: a directory that may be being replaced.
    :return: where it can be read: at its place, or moved aside if a process died before the new one took that place.
    """
    previous = _beside(_itself(directory), PREVIOUS)
    return previous if previous.exists() and not directory.exists() else directory


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Write a directory anew. What was written is on the disk when the block is left, and survives a loss of power.

    :param directory: the directory, which need not exist. Of a link the directory that it leads to is replaced.
    :return: a context that gives an empty directory to write files in. If the block ends without an error, it takes
        the place of ``directory``; else it is removed, and ``directory`` is as it was.
    :raises OSError: if the files can't be written.
    """
    directory = _itself(directory)
    partial, previous = _beside(directory, PARTIAL), _beside(directory, PREVIOUS)
    new_parents = [parent for parent in directory.parents if not parent.exists()]
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        if directory.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(directory, previous)
        try:
            os.replace(partial, directory)
        except BaseException:
            if previous.exists():
                os.replace(previous, directory)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for parent in (directory.parent, *(parent.parent for parent in new_parents)):
        sync(parent)
    shutil.rmtree(previous, ignore_errors=True)


def remove(directory: Path) -> None:
    """Remove a directory in one step, such that nobody ever reads a half of it.

    :param directory: the directory, which need not exist.
    :raises OSError: if it can't be removed.
    """
    directory = _itself(directory)
    partial = _beside(directory, PARTIAL)
    for path in (directory, _beside(directory, PREVIOUS)):
        if path.exists():
            shutil.rmtree(partial, ignore_errors=True)
            os.replace(path, partial)
            shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """
    :param parent: a directory in which processes may have died in the middle of writing. What they left is removed.
    """
    moved_aside = [path for path in parent.glob(f"*{PREVIOUS}") if path.with_suffix("").exists()]
    for path in (*parent.glob(f"*{PARTIAL}"), *moved_aside):
        shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names that a directory is, has reached the disk.

    :param path: the file or directory.
    :raises OSError: if the disk reports an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems without this call for directories
            raise
    finally:
        os.close(descriptor)


def _beside(directory: Path, ending: str) -> Path:
    return directory.with_name(directory.name + ending)


def _itself(directory: Path) -> Path:
    """Where a directory really is. A link to it stays one, and what is written beside it is on its own file system."""
    return directory.resolve() if directory.is_symlink() else directory
