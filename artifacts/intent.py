"""What a writer is about to rely on, and what a collection is about to delete: how the two keep out of each other's way.

No lock is held while data travels. Each side announces first and looks second:

* a writer puts `v1/intent/<uuid>.json`, naming every object it wants, *before* it asks which of them exist, and then reads
  `v1/trash/condemned.json`; while that list names one of its objects, it waits;
* a collection puts that list, *then* lists the intents (and whatever else may have come to rely on something), and spares
  what they name; only then does it delete, proving with a beat before each batch that the list is still its own.

So one of the two always sees the other. A collection that died with a list standing needs no person: a list whose ETag has
not changed for `TAKEOVER_SECONDS` on the writer's own clock is set free by compare-and-swap, which the collection, should
it wake up, finds out at its next beat. A beat lasts `BEAT_LASTS_SECONDS` for it: the long rest of the takeover time is for
deletions that were already under way. The list is set free, never deleted, because a delete has no condition.
"""

from __future__ import annotations

import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from artifacts.backend import Backend
from artifacts.clock import SYSTEM, Clock
from artifacts.digest import canonical_json, parse_canonical
from artifacts.errors import Conflict, NotFound, StoreUnavailable, TooLarge
from artifacts.lease import is_gone

Say = Callable[[str], None]
"""Gets one line for people."""

INTENTS = "v1/intent/"
INTENT = re.compile(re.escape(INTENTS) + r"[0-9a-f]+\.json")
"""The name of an intent. Whatever else lies beside them was put there by something else, and protects nothing."""
CONDEMNED = "v1/trash/condemned.json"

TAKEOVER_SECONDS = 600.0
"""Time without a beat after which a collection is taken for dead."""

SETTLE_SECONDS = 20.0
"""The same where the collecting process ran on this machine and is gone: only requests it had sent can still arrive."""

BEAT_LASTS_SECONDS = 60.0
"""How long a collection may go on deleting after its last confirmed beat."""


@dataclass(frozen=True, slots=True)
class Condemned:
    """The list of objects that a collection is deleting, as it stands in the store."""

    etag: str
    state: str
    """`held` while a collection deletes; `free` otherwise; `damaged` when nothing more is known of it."""
    owner: str = ""
    beat: str = ""
    holder: dict[str, object] | None = None
    """The collecting process, see `artifacts.lease.this_process`."""
    keys: frozenset[str] = frozenset()

    def names_any(self, keys: frozenset[str]) -> bool:
        """True when one of `keys` is being deleted, or may be."""
        return self.state == "damaged" or (self.state == "held" and not self.keys.isdisjoint(keys))

    @property
    def patience(self) -> float:
        """Seconds without a change after which the list may be set free."""
        return SETTLE_SECONDS if self.holder is not None and is_gone(self.holder) else TAKEOVER_SECONDS

    def reason_to_wait(self, url: str, clock: Clock) -> str:
        """What a process waits for that needs something on the list, and until when, in one line."""
        latest = time.strftime("%H:%M:%S", time.localtime(clock.time() + self.patience))
        if self.state == "damaged":
            return (
                f"waiting: {CONDEMNED} in the store {url} is damaged, so what is being deleted is not known; "
                f"it is put right at {latest} at the latest, and then this goes on"
            )
        return (
            f"waiting: a collection is deleting something in the store {url} that is needed here; this goes on when it is "
            f"done, or at {latest} if it shows no more life"
        )


@contextmanager
def intent(
    backend: Backend, keys: Iterable[str], clock: Clock = SYSTEM, say: Say = lambda text: None
) -> Iterator[None]:
    """Rely on `keys`, existing or not, for the length of the block: no collection deletes one of them meanwhile.

    Enter it before asking which of them exist. What is put inside the block and keeps the objects from then on (a record,
    a run, a pin) must be there when the block ends. Entering waits while a collection is deleting one of them, and `say` is
    told so.

    Raises:
        StoreUnavailable: the intent cannot be written.
    """
    wanted = frozenset(keys)
    name = f"{INTENTS}{uuid.uuid4().hex}.json"
    backend.put(name, canonical_json({"schema": 1, "keys": sorted(wanted)}))
    try:
        wait_until_spared(backend, wanted, clock, say)
        yield
    finally:
        try:
            backend.delete(name)
        except StoreUnavailable:
            pass  # what the block did stands; an intent that is left behind is removed by a later collection


def wait_until_spared(
    backend: Backend, keys: frozenset[str], clock: Clock = SYSTEM, say: Say = lambda text: None
) -> bool:
    """Return once no collection is deleting one of `keys`, which the caller has announced already; True if it waited.

    After a wait the objects may be gone: whoever saw them before has to look again.
    """
    seen: tuple[str, float] | None = None
    pause = 0.05
    while (condemned := read_condemned(backend)) is not None and condemned.names_any(keys):
        now = clock.monotonic()
        if seen is None:
            say(condemned.reason_to_wait(backend.url, clock))
        if seen is None or seen[0] != condemned.etag:
            seen = (condemned.etag, now)
        if now - seen[1] >= condemned.patience:
            set_free(backend, condemned)
            continue
        clock.sleep(random.uniform(0.5, 1.0) * pause)
        pause = min(2.0, pause * 1.6)
    return seen is not None


def read_condemned(backend: Backend) -> Condemned | None:
    """The list of condemned objects; None where there never was one."""
    try:
        stored = backend.get(CONDEMNED)
    except NotFound:
        return None
    except TooLarge as error:
        return Condemned(error.etag, "damaged")
    try:
        body = parse_canonical(stored.data)
        if body["state"] not in ("held", "free") or not isinstance(body["holder"], dict):
            raise ValueError("unknown state or holder")
        keys = frozenset(str(key) for key in body["keys"])
        return Condemned(stored.etag, body["state"], str(body["owner"]), str(body["beat"]), body["holder"], keys)
    except (ValueError, TypeError, KeyError):
        return Condemned(stored.etag, "damaged")


def set_free(backend: Backend, condemned: Condemned) -> bool:
    """Take the list from its collection, whose next beat is refused, so that it stops; False if it has shown life since."""
    body = {"state": "free", "owner": "", "beat": uuid.uuid4().hex, "holder": {}, "keys": []}
    try:
        backend.put(CONDEMNED, canonical_json(body), if_match=condemned.etag)
    except (Conflict, NotFound):
        return False  # it changed: look again
    return True
