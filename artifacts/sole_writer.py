"""An object that one writer writes again and again, such as the note of a run under way.

A server may carry out a request a second time, seconds later. A plain write that comes back like that would undo the ones
that followed it, and what only they named could be collected. So every write is conditional on the one before.
"""

from __future__ import annotations

from artifacts.backend import Backend
from artifacts.errors import Conflict, NotFound, StoreUnavailable

ATTEMPTS = 5


class SoleWriter:
    """Writes one object, whose key nobody else writes to."""

    def __init__(self, backend: Backend, key: str) -> None:
        self._backend = backend
        self._key = key
        self._etag: str | None = None
        """Of what stands there; None where nothing does."""

    def write(self, data: bytes) -> None:
        """Have the object be `data`.

        Raises:
            StoreUnavailable: the store does not answer, or others do write there.
        """
        for _ in range(ATTEMPTS):
            try:
                self._etag = self._backend.put(self._key, data, if_absent=self._etag is None, if_match=self._etag)
                return
            except (Conflict, NotFound):
                # It may answer the second attempt of a write whose first reply was lost.
                standing = self._backend.get_many([self._key])[self._key]
                self._etag = None if standing is None else standing.etag
                if standing is not None and standing.data == data:
                    return
        raise StoreUnavailable(f"{self._key} in {self._backend.url} is written by somebody else too; run it again")
