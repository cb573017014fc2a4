"""What a file is at one moment, as far as its file system tells: enough to see later whether it was written since.

Hashing a large file once more while it is sent takes as much processor time as the sending. A file system notes every write,
but two writes within one tick of its clock bear the same time. So a stamp speaks for the content only if the last write was
well before it was taken.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

SETTLED_SECONDS = 2.0
"""The coarsest clock of a file system in use."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Equal stamps of which the first is `settled` mean equal content."""

    inode: int
    size: int
    written: int
    """Nanoseconds."""
    changed: int
    """Nanoseconds; a program may set the time of writing, but not this one."""
    settled: bool = field(compare=False)

    @staticmethod
    def of(file: Path | int) -> Stamp:
        """That of a path, or of an open file."""
        found = os.stat(file)
        age = time.time() - max(found.st_mtime, found.st_ctime)
        return Stamp(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, age >= SETTLED_SECONDS)
