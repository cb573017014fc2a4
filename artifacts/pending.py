"""What a collection found unused, and since when: kept in the store between its two visits.

`v1/trash/pending.json` names shards, each a list of keys and the time (the store's) at which they were first found unused.
Shards are never changed; the index is replaced by compare-and-swap. It is only a memory: losing it costs a grace period.

The index also says when it was written, which is when the last visit was by the store's clock. That clock may be wrong, where
the store is a folder, so one reading of it is not enough to call anything old that may be in use: see `Pending.surely`.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Mapping
from itertools import groupby

from artifacts.backend import Backend
from artifacts.digest import canonical_json, parse_canonical
from artifacts.errors import Conflict, NotFound, TooLarge
from artifacts.mark import PENDING

INDEX = f"{PENDING}.json"
SHARD_KEYS = 20_000
SHARD = re.compile(re.escape(PENDING) + "-[0-9a-f]{32}")


class Pending:
    """The pending objects as this collection found them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._etag: str | None = None
        self.shards: list[tuple[float, str]] = []
        """(time of marking, key of the shard)."""
        self.visited: float | None = None
        """When the last visit was; None where that is not known."""
        try:
            stored = backend.get(INDEX)
        except NotFound:
            return
        except TooLarge as error:
            self._etag = error.etag
            return
        self._etag = stored.etag
        try:
            self.shards, self.visited = read_index(stored.data)
        except ValueError:
            pass  # a damaged memory is no memory: everything waits for another grace period

    def surely(self, now: float) -> float:
        """A time that has passed, even if the clock that shows `now` was set ahead after the last visit.

        Without a last visit no time has: nothing is older than that.
        """
        return -math.inf if self.visited is None else min(now, self.visited)

    def since(self, unused: Mapping[str, int], now: float) -> dict[str, float]:
        """When each of the unused objects was first found unused: `now` for those that no shard names."""
        times = dict.fromkeys(unused, now)
        for time, shard in self.shards:
            for key in self._keys(shard):
                if key in times:
                    times[key] = min(times[key], time)
        return times

    def replace(self, times: Mapping[str, float], now: float) -> None:
        """Remember these instead, and this visit.

        Raises:
            Conflict: another collection has done so meanwhile.
        """
        written: list[tuple[float, str]] = []
        for time, keys in groupby(sorted(times, key=lambda key: (times[key], key)), key=times.__getitem__):
            some = list(keys)
            for start in range(0, len(some), SHARD_KEYS):
                name = f"{PENDING}-{uuid.uuid4().hex}"
                self._backend.put(name, canonical_json({"keys": some[start : start + SHARD_KEYS]}))
                written.append((time, name))
        old = [key for _, key in self.shards]
        body = {"schema": 1, "nonce": uuid.uuid4().hex, "visited": now, "shards": [list(row) for row in written]}
        data = canonical_json(body)
        try:
            self._etag = self._backend.put(INDEX, data, if_absent=self._etag is None, if_match=self._etag)
        except (Conflict, NotFound):
            # The refusal may answer a retry of our own write: the nonce tells.
            stored = self._backend.get_many([INDEX])[INDEX]
            if stored is None or stored.data != data:
                self._backend.delete_many([key for _, key in written])
                raise Conflict(
                    f"another collection of the store {self._backend.url} finished meanwhile; run it again later"
                ) from None
            self._etag = stored.etag
        self.shards = written
        self._backend.delete_many(old)

    def _keys(self, shard: str) -> list[str]:
        try:
            return read_shard(self._backend.get(shard).data)
        except (NotFound, TooLarge, ValueError):
            return []


def read_index(data: bytes) -> tuple[list[tuple[float, str]], float | None]:
    """(time of marking, key) of the shards in an index, and when it was written.

    Shards are deleted one day, so nothing else can be named. An index that does not say when it was written, as those of
    earlier versions, is as old as the newest shard in it.

    Raises:
        ValueError: the bytes are not an index.
    """
    try:
        body = parse_canonical(data)
        shards = [(time, key) for time, key in body["shards"]]
        visited = body["visited"] if "visited" in body else max((time for time, _ in shards), default=None)
    except (TypeError, KeyError) as error:
        raise ValueError(f"not an index: {error!r}") from error
    for time, key in shards:
        if type(time) not in (int, float) or not SHARD.fullmatch(str(key)):
            raise ValueError(f"{str(key)[:80]!r} is not a shard")
    if type(visited) not in (int, float, type(None)):
        raise ValueError(f"the time of the visit is {str(visited)[:80]!r}")
    return [(float(time), key) for time, key in shards], None if visited is None else float(visited)


def read_shard(data: bytes) -> list[str]:
    """The keys in a shard.

    Raises:
        ValueError: the bytes are not a shard.
    """
    body = parse_canonical(data)
    keys = body.get("keys") if isinstance(body, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("not a shard")
    return keys
