"""A lock on a directory, so that two trainings don't mix their files in it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"  # the name of the file that is locked; it says who holds the lock

_FLOCK = "hhqqi"  # the system's struct flock: kind, and where the part of the file begins, its start, length and holder

# A process can lock a file twice, and would lose both locks when it closes the file once. So it asks here first.
_held: set[Path] = set()


class DirectoryInUse(OSError):
    """Another training is writing in the directory."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory. The system releases it when the process ends, in whatever way.

    The lock belongs to this process alone: one that it has forked and that outlives it doesn't hold it. Where the file
    system has no locks, there is a warning and no lock.

    :param directory: an existing directory.
    :return: a context in which the lock is held.
    :raises DirectoryInUse: if it is held already; it names the holder.
    """
    path = directory.resolve() / LOCK
    process = os.getpid()
    holder = f"process {process} on {socket.gethostname()}"
    if path in _held:
        raise _in_use(directory, "this very process")
    descriptor = _acquire(path, directory)
    _held.add(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
        yield
    finally:
        if os.getpid() == process:
            _held.discard(path)
            with suppress(FileNotFoundError):  # somebody has removed the whole directory
                path.unlink()
        os.close(descriptor)


def in_use(directory: Path) -> bool:
    """
    :param directory: a directory.
    :return: whether somebody holds its lock. The system is only asked: the lock is not taken, not even for a moment.
    """
    path = directory.resolve() / LOCK
    if path in _held:
        return True
    try:
        with path.open("rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    except OSError:  # nobody has locked it, or it can't be told
        return False
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def _acquire(path: Path, directory: Path) -> int:
    """
    :return: a descriptor of the file that is at the path and is locked.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file after it was opened here: what is locked is then no longer it.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
                os.close(descriptor)
                raise _in_use(directory, holder or "another process") from None
            warnings.warn(
                f"{directory} is not locked, since its file system has no locks ({error}): see that no other training "
                "writes in it.",
                stacklevel=4,
            )
            return descriptor
        os.close(descriptor)


def _in_use(directory: Path, holder: str) -> DirectoryInUse:
    return DirectoryInUse(
        f"Expected a directory that no other training writes in, but {holder} is writing in {directory}: wait for its "
        "end or stop it, or choose another directory."
    )
