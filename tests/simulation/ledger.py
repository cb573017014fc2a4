"""What must never happen, whatever the schedule. Every change of the store and every step of a body is looked at.

Each violation names the property it breaks:

* `complete`      a record stands without one of the objects of its output, or with wrong bytes;
* `one output`    two outputs stand, or are reported, for one key;
* `lease`         a lease is taken from a live holder, released by another, or revived after its release; a fence repeats;
* `gave up`       a body is stopped for a lost lease that its worker has kept all the time;
* `stops`         a body takes a step after its lease has run out (a deaf one: later than one beat after that);
* `pointer`       a checkpoint pointer moves under an older fence, or is remade by a worker that lost its lease long ago;
* `no rerun`      a body runs for a key whose record stood when its worker took the lease, or was not looked up;
* `once`          a body runs while another holds the lease, or again after one that ended well on the same machine;
* `in use`        a record is deleted that a run under way has found, or that a finished run names;
* `withdrawn`     a record is withdrawn that was intact all the time, or another one than a person asked for;
* `collected`     after collections with nobody else at work, something unused is left, or something needed is not;
* `resume`        a body goes on from another step than the newest checkpoint, or repeats more than one interval.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from artifacts.digest import digest_bytes
from tasks.stage import StageStopped
from tests.simulation.scheduler import Ended, Process, World

TIME_TO_LIVE = 30.0
BEAT = TIME_TO_LIVE / 3
LOST_REQUESTS = 3
"""Requests to the checkpoints that a save may have under way when it learns nothing of the loss: read, write, retry."""


@dataclass(eq=False, slots=True)
class Body:
    """One run of a body, from its start or a checkpoint."""

    name: str
    key: str
    by: Process
    lease_taken: float
    ended: str = ""
    """`well`, `lost` (well, but its lease had run out by then) or `badly`; empty while it runs or if it was killed."""
    deaf: bool = False

    def step(self, done: int, seconds: float) -> None:
        """Take the step after `done`."""
        ledger().step(self, done, seconds)


@dataclass(slots=True)
class _Lease:
    by: Process
    owner: str
    fence: int
    state: str
    at: float
    taken: float
    longest: float = 0.0
    """Longest time between two beats."""


@dataclass(slots=True)
class _Standing:
    output: str
    commit: str
    at: float
    parts: frozenset[str]
    inputs: tuple[str, ...]
    """Trees that it was made from: kept with it, even where the records that made them were withdrawn."""
    damaged: bool = False
    """True once something of it was."""


@dataclass(slots=True)
class Work:
    """What a process is doing: the key it works on, and whether its body ignores requests to stop."""

    stage: str
    key: str
    interval: int
    deaf: bool = False


@dataclass(slots=True)
class Ledger:
    """Everything that happened in one schedule, as far as a property needs it."""

    world: World
    objects: dict[str, tuple[bytes, str, float]] = field(default_factory=dict)
    """The server's objects."""
    violations: list[str] = field(default_factory=list)
    work: dict[Process, Work] = field(default_factory=dict)
    standing: dict[str, _Standing] = field(default_factory=dict)
    """Action record's object -> what it says."""
    leases: dict[str, _Lease] = field(default_factory=dict)
    bodies: dict[str, list[Body]] = field(default_factory=lambda: defaultdict(list))
    pointers: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Key -> step of the newest checkpoint that the pointer names."""
    reached: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Key -> most steps that a body has taken."""
    steps: int = 0
    relied: set[str] = field(default_factory=set)
    """Records that a run has found, or made, and announced before that it would."""
    rotten: set[str] = field(default_factory=set)
    """Objects that rotted, and were not put again since."""
    contents: dict[str, frozenset[str]] = field(default_factory=dict)
    """Output -> its tree and blobs, as far as its tree was ever there."""
    withdrawn: set[str] = field(default_factory=set)
    """Records that were withdrawn for a reason, and do not stand."""
    outputs: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Record -> outputs that stood, and were withdrawn."""
    forgetting: dict[Process, str] = field(default_factory=dict)
    """Commit of the record that a person wants withdrawn."""
    _lost: dict[tuple[Process, str], int] = field(default_factory=dict)
    _brought_back: set[str] = field(default_factory=set)
    """Checkpoints that are named again after they were removed."""
    _looked: dict[tuple[Process, str], bool] = field(default_factory=dict)
    _renewed: dict[tuple[Process, str], float] = field(default_factory=dict)
    _fences: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def violated(self, what: str) -> None:
        """Write down that a property does not hold."""
        self.world.note(f"VIOLATED {what}")
        self.violations.append(f"{what} (at {self.world.now:.3f})")

    # The server's changes

    def read(self, key: str, found: bool, by: Process) -> None:
        """Somebody asked for an object."""
        if key.startswith("v1/act/"):
            self._looked[by, key] = found and key in self.standing
        elif key.startswith("v1/wip/"):
            self._count_lost(key, by)

    def changed(self, key: str, before: bytes | None, after: bytes | None, by: Process) -> None:
        """Somebody put or deleted an object."""
        kind = key.split("/")[1]
        if kind == "act":
            self._record(key, before, after, by)
        elif kind in ("cas", "tree", "parts"):
            self._part(key, after)
        elif kind == "lease":
            self._lease(key.split("/")[2].removesuffix(".json"), after, by)
        elif kind == "wip":
            self._count_lost(key, by)
            if key.endswith("/LATEST"):
                self._pointer(key.split("/")[2], before, after, by)

    def rots(self, key: str) -> None:
        """An object is about to change or to vanish, by nobody's doing."""
        self.rotten.add(key)
        for standing in self.standing.values():
            standing.damaged = standing.damaged or key in standing.parts

    def _record(self, key: str, before: bytes | None, after: bytes | None, by: Process) -> None:
        if after is None or after.startswith(b"withdrawn"):
            self._withdrawal(key, by)
            return
        body = json.loads(after)
        output, was = body["output"], self.standing.get(key)
        if was is not None and was.output != output:
            self.violated(f"one output: the record {key[:30]} was replaced by one of another output")
        parts = self._objects_of(output)
        damaged, inputs = not parts.isdisjoint(self.rotten), tuple(body["payload"]["inputs"].values())
        self.standing[key] = _Standing(output, body["commit"], self.world.now, parts, inputs, damaged)
        self.withdrawn.discard(key)
        self._check_complete(key)

    def _withdrawal(self, key: str, by: Process) -> None:
        was = self.standing.pop(key, None)
        if was is None:
            return
        if by in self.forgetting:
            if self.forgetting[by] != was.commit:
                self.violated(f"withdrawn: the record {key[:30]}, another one than was to be forgotten")
        elif key in self.relied and not was.damaged:
            what = "withdrawn" if by.name.startswith(("w", "r")) else "in use"
            self.violated(f"{what}: the record {key[:30]} was deleted, and nothing was wrong with it")
        if by in self.forgetting or was.damaged:
            self.withdrawn.add(key)
        self.outputs[key].add(was.output)
        stage_key = key.split("/")[3].removesuffix(".json")
        self.bodies.pop(stage_key, None)
        self.reached.pop(stage_key, None)

    def _part(self, key: str, after: bytes | None) -> None:
        if after is not None and "/cas/" in key and digest_bytes(after) != key[-64:]:
            self.violated(f"complete: {key[:20]} was stored with other bytes than its name says")
        if after is not None and digest_bytes(after) == key[-64:]:
            self.rotten.discard(key)
        if after is None:
            for record, standing in self.standing.items():
                if key in standing.parts:
                    self._check_complete(record)

    def _objects_of(self, output: str) -> frozenset[str]:
        tree = f"v1/tree/{output[:2]}/{output}"
        if tree in self.objects and tree not in self.rotten:
            files = [digest for _path, _size, digest in json.loads(self.objects[tree][0])]
            self.contents[output] = frozenset([tree, *(f"v1/cas/{digest[:2]}/{digest}" for digest in files)])
        return self.contents.get(output, frozenset([tree]))

    def _check_complete(self, record: str) -> None:
        for name in sorted(self._objects_of(self.standing[record].output)):
            stored = self.objects.get(name)
            if name not in self.rotten and (stored is None or digest_bytes(stored[0]) != name[-64:]):
                self.violated(f"complete: the record {record[:30]} stands without {name[:20]}")

    def _lease(self, key: str, after: bytes | None, by: Process) -> None:
        was = self.leases.get(key)
        if after is None:
            if was is not None and was.state == "held" and was.by is not by:
                self.violated(f"lease: that of {was.by.name} was deleted")
            self.leases.pop(key, None)
            self._fences.pop(key, None)
            return
        body = json.loads(after)
        now, owner, fence, state = self.world.now, body["owner"], body["fence"], body["state"]
        same = was is not None and was.owner == owner
        if same and was.state == "free" and state == "held":
            self.violated("lease: revived after its release")
        if was is not None and not same:
            if state == "free":
                self.violated("lease: released by one who does not hold it")
            gone = not was.by.alive and was.by.machine == by.machine
            if was.state == "held" and now < was.at + TIME_TO_LIVE and not gone:
                self.violated(f"lease: taken from {was.by.name}, which had {was.at + TIME_TO_LIVE - now:.1f} s left")
            if was.state == "held":
                self._lost[was.by, key] = 0
        if not same and fence <= self._fences[key]:
            self.violated(f"lease: fence {fence} was used before")
        self._fences[key] = max(fence, self._fences[key])
        longest = max(was.longest, now - was.at) if same else 0.0
        self.leases[key] = _Lease(by, owner, fence, state, now, was.taken if same else now, longest)
        self._lost.pop((by, key), None)
        if state == "held":
            self._renewed[by, key] = now

    def _pointer(self, key: str, before: bytes | None, after: bytes | None, by: Process) -> None:
        if after is None:
            self.pointers[key] = 0
            return
        body = json.loads(after)
        if before is not None and json.loads(before)["fence"] > body["fence"]:
            self.violated(f"pointer: moved by {by.name} under fence {body['fence']} after a claim under a later one")
        if before is None and self._lost.get((by, key), 0) > LOST_REQUESTS:
            self.violated(f"pointer: remade by {by.name}, which had lost its lease")
        newest = body["checkpoints"][0] if body["checkpoints"] else {"name": "", "step": 0}
        # A late duplicate of the request that made the pointer may bring it back after everything was discarded.
        if before is None and f"v1/wip/{key}/{newest['name']}/manifest.json" not in self.objects:
            self._brought_back.add(newest["name"])
        self.pointers[key] = 0 if newest["name"] in self._brought_back else newest["step"]

    def _count_lost(self, name: str, by: Process) -> None:
        key = name.split("/")[2]
        if (by, key) in self._lost:
            self._lost[by, key] += 1

    # What bodies do

    @contextmanager
    def body(self, done: int) -> Iterator[Body]:
        """A body begins, having restored the checkpoint after `done` steps."""
        by = self.world.current
        work = self.work[by]
        lease = self.leases.get(work.key)
        body = Body(
            f"{by.name}-{len(self.bodies[work.key])}", work.key, by, lease.taken if lease else 0.0, deaf=work.deaf
        )
        self._check_start(body, work, done)
        self.bodies[work.key].append(body)
        self.world.note(f"body begins at step {done}")
        try:
            yield body
        except Ended:
            raise
        except BaseException as error:
            body.ended = "badly"
            if isinstance(error, StageStopped) and "lease" in str(error) and self._was_kept(body):
                self.violated(f"gave up: {error}")
            raise
        body.ended = "well" if self._time_left(body) > 0 else "lost"
        self.world.note(f"body ended {body.ended}")

    def _check_start(self, body: Body, work: Work, done: int) -> None:
        if self._time_left(body) <= 0:
            return  # its process was stopped for long while it began; that it takes no step is looked at below
        record = f"v1/act/{work.stage}/{work.key}.json"
        if self._looked.get((body.by, record)) is not False:
            self.violated("no rerun: a body runs although its record was not looked up and found missing")
        standing = self.standing.get(record)
        if standing is not None and standing.at < body.lease_taken:
            self.violated("no rerun: a body runs for a key whose record stood when its worker took the lease")
        for other in self.bodies[work.key]:
            if other.ended == "" and other.by.alive and self._time_left(other) > 0:
                self.violated(f"once: a body runs while that of {other.by.name} has the lease")
            if (
                other.ended == "well"
                and not other.by.alive
                and other.by.machine == body.by.machine
                and standing is None
                and not self._somebody_else_at(work.key, body.by)
            ):
                self.violated(f"once: the output that {other.by.name} left on this machine was made again")
        if done != self.pointers[work.key]:
            self.violated(f"resume: from step {done}, the newest checkpoint is of step {self.pointers[work.key]}")
        if self.reached[work.key] - done > work.interval:
            self.violated(f"resume: from step {done} after {self.reached[work.key]} steps, interval {work.interval}")

    def _somebody_else_at(self, key: str, by: Process) -> bool:
        """True when another process of the machine is at the same key: it may have taken over what the dead one left."""
        return any(
            process.alive and process is not by and process.machine == by.machine and work.key == key
            for process, work in self.work.items()
        )

    def _was_kept(self, body: Body) -> bool:
        """True when the lease was renewed in time whenever it had to be, and is the worker's own.

        Not known after a jump of the clock, which may have been in the middle of a request that renewed it.
        """
        if self.world.now - self.world.resumed <= TIME_TO_LIVE:
            return False
        held = self.leases.get(body.key)
        kept = held is not None and held.by is body.by and held.longest <= BEAT + 2.0
        return kept and self.world.now - held.at <= BEAT + 2.0

    def _time_left(self, body: Body) -> float:
        """Seconds until the lease under which a body runs has run out, as its worker knows it."""
        left = self._renewed.get((body.by, body.key), -1e9) + TIME_TO_LIVE - self.world.now
        return min(0.0, left) if (body.by, body.key) in self._lost else left

    def step(self, body: Body, done: int, seconds: float) -> None:
        """A body takes a step: it lasts `seconds`, in which anything may happen."""
        left = self._time_left(body)
        if self.work[body.by].deaf:
            late = min(self.world.now - max(body.by.stopped_until, self.world.resumed), -left)
            if late > BEAT + 1.0:
                self.violated(f"stops: a deaf body was not ended {late:.1f} s after its lease had run out")
        elif left < 0:
            self.violated(f"stops: a step {-left:.1f} s after the lease had run out")
        self.steps += 1
        self.world.wait(None, seconds)
        self.world.point("step")
        self.reached[body.key] = max(self.reached[body.key], done + 1)

    # What workers report

    def gave_up(self, process: Process) -> None:
        """A worker ends itself because its lease was lost: what its body left is not kept."""
        for body in self.bodies[self.work[process].key]:
            if body.by is process:
                body.ended = "lost"

    def reported(self, stage: str, key: str, output: str, by: Process, *, relied: bool = True) -> None:
        """A worker says that the stage is done."""
        record = f"v1/act/{stage}/{key}.json"
        standing = self.standing.get(record)
        if (standing is None or standing.output != output) and output not in self.outputs[record]:
            self.violated(f"one output: {by.name} reports an output that does not stand for the key")
        if relied:
            self.relied.add(record)

    def check_end(self) -> None:
        """After the last process has ended."""
        for record in self.standing:
            self._check_complete(record)

    def check_collected(self, needed: set[str]) -> None:
        """After collections of everything that is not needed: `needed` are the records that a run names.

        Where such a record was withdrawn, what stands in its place is needed, and its output is not.
        """
        records = set(self.standing)
        parts = {part for record in needed & records for part in self.standing[record].parts}
        kinds = ("v1/act/", "v1/cas/", "v1/tree/", "v1/parts/", "v1/wip/", "v1/lease/", "v1/intent/", "v1/run/active-")
        left = {key for key in self.objects if key.startswith(kinds)}
        if missing := (needed | parts) - left:
            self.violated(f"collected: {len(missing)} objects that a run needs are gone, such as {min(missing)[:30]}")
        inputs = {tree for record in needed & records for tree in self.standing[record].inputs}
        if extra := left - needed - parts - {part for tree in inputs for part in self._objects_of(tree)}:
            self.violated(f"collected: {len(extra)} unused objects are left, such as {min(extra)[:30]}")


_LEDGER: list[Ledger] = []


def ledger() -> Ledger:
    """The ledger of the simulation that is running."""
    return _LEDGER[-1]


def open_ledger(new: Ledger) -> Ledger:
    """Make `new` the ledger of the simulation that is running."""
    _LEDGER[:] = [new]
    return new
