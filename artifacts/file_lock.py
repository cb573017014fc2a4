"""A lock between the processes of one machine: an `flock(2)` on a file, which the kernel releases when its holder dies.

A holder that is merely stopped costs the others an error after `LOCK_SECONDS`, never an endless wait.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from artifacts.errors import StoreUnavailable

LOCK_SECONDS = 20.0
"""Longest wait for another process, which holds a lock for milliseconds when it runs."""

LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What a file system says that has no locks: some network file systems, and some of those in user space."""

_locks: set[FileIO] = set()
"""The files by which this process holds its locks."""


def _after_fork() -> None:
    """A lock lasts as long as anyone has its file open: a child must not hold it when this process is long gone."""
    for lock in _locks:
        lock.close()
    _locks.clear()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of the file `path`, which is made where there is none, for the length of the block.

    Raises:
        StoreUnavailable: another process has held it for `LOCK_SECONDS`; `what` could not be done.
    """
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "ab", buffering=0) as lock, _own(lock):
        _wait(lock.fileno(), what)
        yield


def _wait(descriptor: int, what: str) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"cannot {what}: another process has held the lock of this write for {LOCK_SECONDS:.0f} s; look for a "
                    "stopped process that uses this store"
                ) from error
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise
            raise StoreUnavailable(
                f"cannot {what}: its file system has no locks (flock: {error.strerror}), without which two processes could "
                "overwrite each other's changes; name a store on a disk of this machine, or on an S3 server, with --store"
            ) from error
        time.sleep(0.01)


@contextmanager
def _own(lock: FileIO) -> Iterator[None]:
    """For the length of the block `lock` may hold a lock, which no forked process shares."""
    _locks.add(lock)
    try:
        yield
    finally:
        # To close the file is not enough: a process that is forked in this moment has it open, too.
        if not lock.closed:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_UN)
        _locks.discard(lock)
