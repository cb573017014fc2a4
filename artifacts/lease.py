"""A lease on one key, so that two workers do not do the same expensive work at once.

The lease is one small object; every change of it is a compare-and-swap on its ETag, so it needs no clock that hosts
agree on. It is *advisory*: correctness comes from create-only records, a lease only saves duplicate work. Rules:

* stale means: its ETag has not changed for its time to live on *my own* monotonic clock since I first saw it;
* on the same machine a holder whose process is gone is stale at once, so a killed run can be restarted without waiting;
* a heartbeat rewrites it with a fresh nonce; a refused heartbeat means that it was lost, and the body must stop;
* release writes `state: free` by compare-and-swap; nothing is ever deleted, and nobody has to clean up by hand;
* `fence` grows by one with every holder; what a holder publishes carries it, and older fences are refused.
"""

from __future__ import annotations

import os
import random
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from artifacts.backend import Backend, Entry, Object
from artifacts.clock import SYSTEM, Clock
from artifacts.digest import canonical_json, parse_canonical
from artifacts.errors import Conflict, LeaseLost, NotFound, TooLarge

MAX_FENCE = 2**53
TIME_TO_LIVE = 30.0
"""Seconds without a heartbeat after which a lease may be taken over."""

WRITE_ATTEMPTS = 4
"""Times that a holder writes its lease anew over an earlier beat of its own."""


def lease_key(key: str) -> str:
    """The object key of the lease on `key`."""
    return f"v1/lease/{key}.json"


def this_process() -> dict[str, object]:
    """What identifies this process to others on the same machine; empty where the system cannot tell."""
    return process_identity(os.getpid())


def process_identity(pid: int) -> dict[str, object]:
    """Boot, process-id namespace, id and start time of the process `pid`; empty if it is gone or cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return {}
    status = _status(pid)
    if status is None or status[0] in "ZX":
        return {}
    return {"machine": f"{boot} {namespace}", "pid": pid, "started": int(status[19])}


def is_gone(holder: dict[str, object]) -> bool:
    """True only when `holder` ran on this very machine and its process certainly no longer exists.

    A process whose `/proc` entry may not be read (another user's, under `hidepid`) exists.
    """
    mine, pid = this_process(), holder.get("pid")
    if not mine or holder.get("machine") != mine["machine"] or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    status = _status(pid)
    return status is not None and (status[0] in "ZX" or int(status[19]) != holder.get("started"))


def _status(pid: int) -> list[str] | None:
    """The fields of `/proc/PID/stat` from the state on; None if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


@dataclass(slots=True)
class Lease:
    """One worker's view of the lease on `key`. Use `acquire`, then `renew` on every beat, then `release`."""

    backend: Backend
    key: str
    time_to_live: float = TIME_TO_LIVE
    clock: Clock = SYSTEM
    holder: dict[str, object] = field(default_factory=lambda: this_process())
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    last_fence: Callable[[], int] = lambda: 0
    """The highest fence seen elsewhere; asked where the lease itself cannot tell, being absent or damaged."""
    fence: int = 0
    _etag: str | None = None
    _deadline: float = 0.0
    _seen: tuple[str, float] | None = None

    def try_acquire(self) -> bool:
        """Take the lease if it is free, stale, damaged, or its holder is known to be gone; say whether it is now held."""
        try:
            stored = self.backend.get(self._path)
        except NotFound:
            self._await_removal()
            return self._write(self.last_fence() + 1, "held", None)
        except TooLarge as error:
            return self._write(self.last_fence() + 1, "held", error.etag)
        body = _parse(stored.data)
        if body is None:
            return self._write(self.last_fence() + 1, "held", stored.etag)
        if body["state"] == "held" and not is_gone(dict(body["holder"])):
            now = self.clock.monotonic()
            if self._seen is None or self._seen[0] != stored.etag:
                self._seen = (stored.etag, now)
            if now - self._seen[1] < float(str(body["time_to_live"])):
                return False
        return self._write(int(str(body["fence"])) + 1, "held", stored.etag)

    def take_over(self, is_old: Callable[[Entry], bool]) -> bool:
        """Take the lease at once if its last change `is_old` by the store's clock; say whether it is now held.

        For collections: what has not beaten for days need not be watched for a time to live.
        """
        try:
            stored = self.backend.get(self._path)
        except NotFound:
            return self._write(self.last_fence() + 1, "held", None)
        except TooLarge as error:
            stored = Object(b"", error.etag)
        body = _parse(stored.data)
        fence = self.last_fence() if body is None else int(str(body["fence"]))
        # Listed after it was read: what is old now has not changed since, or the write is refused.
        entries = list(self.backend.list(self._path))
        return all(is_old(entry) for entry in entries) and self._write(fence + 1, "held", stored.etag)

    def _await_removal(self) -> None:
        """Wait while a collection is removing the lease: its request may arrive late, and would take a new one away."""
        from artifacts.intent import wait_until_spared

        wait_until_spared(self.backend, frozenset({self._path}), self.clock)

    def remove(self, delete: Callable[[str], None]) -> None:
        """Have `delete` delete the lease while it is held: whoever waits for it makes a new one.

        The condemned list has to name it until no request of that deletion can arrive any more.
        """
        if self.held:
            delete(self._path)
            self._etag = None

    def renew(self) -> None:
        """Prove that the holder is alive.

        Raises:
            LeaseLost: somebody else holds the lease now, or it is gone from the store.
        """
        if self._etag is None or not self._write(self.fence, "held", self._etag):
            self._etag = None
            self.confirm()
            raise LeaseLost(f"the lease on {self.key[:12]} was changed by something else")

    def confirm(self) -> None:
        """Ask the store whether this lease is still the one that stands. Only reads, so any thread may call it.

        Raises:
            LeaseLost: it is not; the message says what is there instead.
        """
        try:
            body = _parse(self.backend.get(self._path).data)
        except NotFound:
            raise LeaseLost(
                f"the lease on {self.key[:12]} is gone from the store {self.backend.url}; was the store removed?"
            ) from None
        except TooLarge:
            body = None
        if body is None:
            raise LeaseLost(f"the lease on {self.key[:12]} in the store {self.backend.url} was overwritten")
        if body["owner"] != self.owner or body["fence"] != self.fence:
            raise LeaseLost(f"the lease on {self.key[:12]} was taken over by another worker")

    def exists(self) -> bool:
        """True when the store has a lease object for the key, whoever holds it."""
        return self.backend.size(self._path) is not None

    def release(self) -> None:
        """Mark the lease free. A lease that was lost is left to its new holder."""
        if self._etag is not None:
            self._write(self.fence, "free", self._etag)
            self._etag = None

    @property
    def held(self) -> bool:
        """True while the last confirmed heartbeat is younger than the time to live."""
        return self.seconds_left > 0

    @property
    def seconds_left(self) -> float:
        """Seconds until the lease runs out unless a heartbeat is confirmed; 0 when it is not held."""
        return 0.0 if self._etag is None else max(0.0, self._deadline - self.clock.monotonic())

    @property
    def _path(self) -> str:
        return lease_key(self.key)

    def _write(self, fence: int, state: str, etag: str | None) -> bool:
        """Write the lease if it still is as `etag` says (None: not there); False when somebody else was faster."""
        nonce = uuid.uuid4().hex
        body = canonical_json(
            {
                "owner": self.owner,
                "fence": fence,
                "beat": nonce,
                "state": state,
                "time_to_live": self.time_to_live,
                "holder": self.holder,
            }
        )
        for _ in range(WRITE_ATTEMPTS):
            sent = self.clock.monotonic()
            try:
                if etag is None:
                    self._etag = self.backend.put(self._path, body, if_absent=True)
                else:
                    self._etag = self.backend.put(self._path, body, if_match=etag)
            except (Conflict, NotFound):
                # The refusal may answer a retry of this write, or come of an earlier beat whose reply was lost.
                try:
                    stored = self.backend.get(self._path)
                except (NotFound, TooLarge):
                    return False
                standing = _parse(stored.data)
                if standing is None or (standing["owner"], standing["fence"]) != (self.owner, fence):
                    return False
                if standing["beat"] != nonce:
                    etag = stored.etag
                    continue
                self._etag = stored.etag
            self.fence = fence
            self._deadline = sent + self.time_to_live
            return True
        return False


class Heartbeat:
    """Renews a held lease, three times per time to live, and reports its loss once.

    One thread beats. Another watches the deadline, because a beat that hangs in the store reports nothing. The beating
    thread is the only one to write the lease until `stop` has joined it; only then may the lease be released, so a
    heartbeat can never race its own release.
    """

    def __init__(self, lease: Lease, on_lost: Callable[[str], None]) -> None:
        self._lease = lease
        self._on_lost = on_lost
        self._ended = threading.Event()
        self._reported = threading.Lock()
        name = f"lease-{lease.key[:8]}"
        self._tasks = [lease.clock.start(self._beat, name), lease.clock.start(self._watch, f"{name}-deadline")]

    def stop(self) -> None:
        """End the heartbeat and wait for a beat that is under way."""
        self._ended.set()
        for task in self._tasks:
            task.join()

    def _beat(self) -> None:
        pause = self._until_next()
        while not self._lease.clock.wait(self._ended, pause):
            try:
                self._lease.renew()
                pause = self._until_next()
            except LeaseLost as error:
                self._report(str(error))
                return
            except Exception as error:  # noqa: BLE001 - an unreachable store is fatal only once the lease has run out
                if not self._lease.held:
                    self._report(f"no heartbeat reached the store for {self._lease.time_to_live:.0f} s: {error}")
                    return
                pause = min(1.0, self._lease.time_to_live / 10)

    def _until_next(self) -> float:
        """A third of the time to live; less where the request that wrote the lease took most of it."""
        return min(self._lease.time_to_live / 3, self._lease.seconds_left / 2)

    def _watch(self) -> None:
        while not self._lease.clock.wait(self._ended, self._lease.seconds_left):
            if not self._lease.held:
                self._report(f"no heartbeat was confirmed by the store for {self._lease.time_to_live:.0f} s")
                return

    def _report(self, reason: str) -> None:
        if self._reported.acquire(blocking=False):
            self._on_lost(reason)


def wait_for(
    attempt: Callable[[], bool],
    stop: Callable[[], str | None],
    longest_pause: float = 2.0,
    clock: Clock = SYSTEM,
) -> bool:
    """Call `attempt` with growing, jittered pauses until it succeeds; False when `stop` asks to end first."""
    pause = 0.05
    while not attempt():
        if stop() is not None:
            return False
        clock.sleep(random.uniform(0.5, 1.0) * pause)
        pause = min(longest_pause, pause * 1.6)
    return True


def _parse(data: bytes) -> dict[str, object] | None:
    """The fields of a lease; None when the bytes are not one, which protects nobody and may be replaced."""
    try:
        body = parse_canonical(data)
        if body["state"] not in ("held", "free") or not isinstance(body["holder"], dict):
            raise ValueError("unknown state or holder")
        return {
            "state": body["state"],
            "owner": str(body["owner"]),
            "fence": checked_fence(body["fence"]),
            "beat": str(body["beat"]),
            "holder": body["holder"],
            "time_to_live": min(max(float(body["time_to_live"]), 0.0), 3600.0),
        }
    except (ValueError, TypeError, KeyError, OverflowError):
        return None


def checked_fence(fence: object) -> int:
    """A fence as it was stored. One near the limit of integers could not be counted on from, and would need a person.

    Raises:
        ValueError: it is none.
    """
    if type(fence) is not int or not 0 <= fence < MAX_FENCE:
        raise ValueError(f"the fence is {str(fence)[:80]!r}")
    return fence
