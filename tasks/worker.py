"""Run one stage in this process: lease, restore, body, commit. Knows the store and the stage, and no workflow engine.

The order is the contract: take the lease (or adopt what another worker commits meanwhile), materialise the inputs
verified, run the body from its newest mid-stage checkpoint, store the output tree, publish the record, release. A body
that was asked to stop, or whose lease was lost, ends at its next checkpoint; a lost lease that it ignores for one beat
ends the process. Who lost a lease to another worker waits for that worker's record and adopts it. Code that changed while
the body ran is never published. If publishing fails, the finished output stays in the scratch folder (see
`artifacts.scratch`), and the retry publishes it without running the body again.

    python -m tasks.worker SPEC.json          runs one stage by hand (debugging, torchrun, other engines)
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from artifacts import scratch
from artifacts.checkpoints import StoredCheckpoints
from artifacts.clock import Clock, Timer
from artifacts.errors import Damaged, LeaseLost, StoreError, StoreUnavailable
from artifacts.lease import TIME_TO_LIVE, Heartbeat, Lease, wait_for
from artifacts.record import Record, payload_key
from artifacts.store import Store, Tree, new_record
from artifacts.upload import Moved
from tasks.inputs import Inputs
from tasks.stage import Stage, StageContext, StageError, StageStopped
from tasks.surroundings import Surroundings, environment
from tasks.transfers import reporting

COMMIT_ATTEMPTS = 6
"""Times that a commit is tried, with doubling pauses from one second, while the store does not answer: 31 s of pauses, so
that a server may restart under any request of it (see `artifacts.retry.PATIENT`)."""

LEASES = 3
"""Times that a worker takes the lease, each after having lost it to another worker."""

LOST_STATUS = 76
"""Exit status of a worker that ended itself because its body went on after the lease was lost."""

Send = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Everything a worker needs to run one stage. Plain data, so that it travels as JSON."""

    store: str
    node: str
    """Name of the node in the graph, for messages."""
    module: str
    attribute: str
    """`module.attribute` is the declared `Stage`."""
    config: dict[str, Any]
    inputs: dict[str, str]
    """Input name -> digest of its tree."""
    payload: dict[str, Any]
    symbols: dict[str, str]
    scratch: str
    device: str = "cpu"
    threads: int = 1
    accelerator: str | None = None
    """Index of the one GPU that this worker may see; None on a CPU."""
    time_to_live: float = TIME_TO_LIVE
    checkpoint_seconds: float = 15.0

    @property
    def key(self) -> str:
        """Key of the stage run."""
        return payload_key(self.payload)


@dataclass(slots=True)
class Stop:
    """Why the body has to end, set from signals and threads, read by the body between steps."""

    reason: str | None = None

    def request(self, reason: str) -> None:
        """Ask the body to end; the first reason stays."""
        self.reason = self.reason or reason

    def __call__(self) -> str | None:
        return self.reason


@dataclass(slots=True)
class _Attempt:
    spec: Spec
    store: Store
    stage: Stage
    send: Send
    stop: Stop
    around: Surroundings = field(default_factory=Surroundings)
    lost: Stop = field(default_factory=Stop)
    """Why the lease was lost, as long as it is."""
    in_body: bool = False
    exit: Timer | None = None
    """Ends this process should the body not end by itself after the lease was lost."""

    def run(self) -> dict[str, Any]:
        """Lease, body, commit. Returns the `done` message."""
        if (standing := self._lookup()) is not None:
            return self._adopted(standing)
        scratch.sweep(self.scratch)
        for left in reversed(range(LEASES)):
            lease = self._new_lease()
            try:
                return self._run_leased(lease)
            except (LeaseLost, StageStopped) as error:
                if isinstance(error, LeaseLost):
                    self.lost.request(str(error))
                if self.lost() is None or self.stop() is not None or not left:
                    raise
            if not lease.exists():
                raise LeaseLost(self.lost())
            self.send({"event": "log", "message": f"{self.lost()}; waiting for the stage's result"})
            self.lost = Stop()
        raise AssertionError("unreachable")

    @property
    def scratch(self) -> Path:
        """The folder of all attempts on this machine."""
        return Path(self.spec.scratch)

    @property
    def clock(self) -> Clock:
        """The clock of this worker's surroundings."""
        return self.around.clock

    def _new_lease(self) -> Lease:
        backend, key = self.store.backend, self.spec.key
        fences = StoredCheckpoints(backend, key, 0)
        return Lease(backend, key, self.spec.time_to_live, self.clock, last_fence=fences.stored_fence)

    def _run_leased(self, lease: Lease) -> dict[str, Any]:
        adopted: list[Record] = []

        def take_or_adopt() -> bool:
            if lease.try_acquire():
                return True
            if (record := self._lookup()) is not None:
                adopted.append(record)
            return bool(adopted)

        if not take_or_adopt():
            self.send({"event": "log", "message": "another worker holds the lease on this stage; waiting for it"})
            if not wait_for(take_or_adopt, self.stop, clock=self.clock):
                raise StageStopped(self.stop() or "stopped")
        if adopted:
            return self._adopted(adopted[0])
        heartbeat = Heartbeat(lease, self._on_lost)
        try:
            if (standing := self._lookup()) is not None:
                self._discard_checkpoints(lease)
                return self._adopted(standing)
            return self._execute(lease)
        finally:
            heartbeat.stop()
            try:
                lease.release()
            except StoreUnavailable as error:
                self.send({"event": "log", "message": f"the lease was not released, and runs out by itself: {error}"})

    def _execute(self, lease: Lease) -> dict[str, Any]:
        self._require_planned_code()
        key = self.spec.key
        checkpoints = StoredCheckpoints(self.store.backend, key, lease.fence, confirm=self._confirming(lease))
        checkpoints.claim()
        attempt = scratch.finished_attempt(self.scratch, key)
        if attempt is None:
            attempt = scratch.new_attempt(self.scratch, key, f"{lease.fence}-{lease.owner[:8]}")
            self._run_body(attempt, checkpoints, lease)
            attempt.finish(checkpoints.seconds)
        else:
            self.send({"event": "log", "message": "an earlier attempt finished the body; storing its output"})
        record = self._publish(attempt.out, attempt.seconds, lease)
        self._discard_checkpoints(lease)
        scratch.clear(self.scratch, key)
        return _done(record, executed=True)

    def _discard_checkpoints(self, lease: Lease) -> None:
        """Remove the checkpoints of a committed stage, unless another worker took the lease before the commit.

        That one may be resuming from them. Whoever takes the lease after this confirmation finds the record.
        """
        try:
            lease.confirm()
            StoredCheckpoints(self.store.backend, self.spec.key, lease.fence).discard()
        except LeaseLost:
            pass
        except StoreUnavailable as error:
            self.send({"event": "log", "message": f"checkpoints of the finished stage were left behind: {error}"})

    def _run_body(self, attempt: scratch.Attempt, checkpoints: StoredCheckpoints, lease: Lease) -> None:
        with attempt.work() as work:
            read = Inputs(self.store, work / "inputs")
            inputs = {
                name: read.read(tree, self._reporting(f"reading {name}")) for name, tree in self.spec.inputs.items()
            }
            timed = _TimedCheckpoints(checkpoints, self.clock, read.require_unchanged)
            context = StageContext(
                out=attempt.out,
                work=work,
                checkpoints=timed,
                on_progress=self._on_progress,
                on_log=lambda message: self.send({"event": "log", "message": message}),
                stop_requested=lambda: self._why_stop(lease),
                device=self.spec.device,
                checkpoint_seconds=self.spec.checkpoint_seconds,
            )
            config = self.stage.config.model_validate(self.spec.config)
            self.in_body = True
            try:
                if (reason := self._why_stop(lease)) is not None:
                    raise StageStopped(reason)
                self.stage.body(context, config, **inputs)
            finally:
                self.in_body = False
                self._end_grace()
            timed.count()
            read.require_unchanged()
        try:
            self._require_planned_code()
        except StageError:
            # The body may have imported the edited source late, so that its checkpoints are not of the planned code.
            checkpoints.discard()
            raise

    def _why_stop(self, lease: Lease) -> str | None:
        """Why the body must not go on; asked between steps. A process that was stopped for long finds out by itself."""
        if not lease.held:
            self.lost.request(f"the lease ran out: no heartbeat was confirmed for {lease.time_to_live:.0f} s")
        return self.stop() or self.lost()

    def _confirming(self, lease: Lease) -> Callable[[], None]:
        def confirm() -> None:
            try:
                lease.confirm()
            except LeaseLost as error:
                self.lost.request(str(error))
                raise

        return confirm

    def _require_planned_code(self) -> None:
        self.around.require_code(self.spec, self.stage)

    def _publish(self, out: Path, seconds: float, lease: Lease) -> Record:
        where = (self.stage.name, self.spec.key)
        pause = 1.0
        for attempt in range(1, COMMIT_ATTEMPTS + 1):
            try:
                make_record = partial(self._record, seconds=seconds, lease=lease)
                return self.store.publish(out, make_record, self._reporting("storing"), where=where)
            except StoreUnavailable as error:
                if attempt == COMMIT_ATTEMPTS or self.stop():
                    raise StoreUnavailable(
                        f"{error} (the finished output is kept in {out} and is published on retry)"
                    ) from error
                self.send(
                    {"event": "log", "message": f"storing the output failed, trying again in {pause:.0f} s: {error}"}
                )
                self.clock.sleep(pause)
                pause *= 2
        raise AssertionError("unreachable")

    def _reporting(self, what: str) -> Moved:
        return reporting(self.send, what, self.clock.monotonic)

    def _record(self, tree: Tree, seconds: float, lease: Lease) -> Record:
        return new_record(
            stage=self.stage.name,
            key=self.spec.key,
            payload=self.spec.payload,
            node=self.spec.node,
            output=tree.digest,
            size=tree.size,
            fence=lease.fence,
            symbols=self.spec.symbols,
            environment=environment(self.spec),
            seconds=round(seconds, 3),
            finished=round(self.clock.time(), 3),
        )

    def _lookup(self) -> Record | None:
        return self.store.lookup(self.stage.name, self.spec.key)

    def _adopted(self, record: Record) -> dict[str, Any]:
        scratch.clear(self.scratch, self.spec.key)
        return _done(record, executed=False)

    def _on_progress(self, done: int, total: int, metrics: dict[str, float]) -> None:
        self.send({"event": "progress", "done": done, "total": total, "metrics": metrics})

    def _on_lost(self, reason: str) -> None:
        self.lost.request(reason)
        if self.in_body:
            self.exit = self.clock.later(self.spec.time_to_live / 3, self._end_deaf_body)

    def _end_deaf_body(self) -> None:
        if self.in_body:
            self.around.end_process(LOST_STATUS)

    def _end_grace(self) -> None:
        if self.exit is not None:
            self.exit.cancel()
            self.exit = None


class _TimedCheckpoints:
    """Checkpoints that also remember how long the body has run, over all attempts, and are made of intact inputs alone."""

    def __init__(self, stored: StoredCheckpoints, clock: Clock, require_intact: Callable[[], None]) -> None:
        self._stored = stored
        self._require_intact = require_intact
        self._clock = clock
        self._since = clock.monotonic()

    def count(self) -> None:
        """Add the time since the last call to the body's running time."""
        now = self._clock.monotonic()
        self._stored.seconds += now - self._since
        self._since = now

    def save(self, step: int, directory: Path) -> None:
        self._require_intact()
        self.count()
        self._stored.save(step, directory)

    def restore(self, into: Path) -> int | None:
        step = self._stored.restore(into)
        self._since = self._clock.monotonic()
        return step


def execute(spec: Spec, send: Send, stop: Stop, around: Surroundings | None = None) -> int:
    """Run the stage of `spec`; every outcome is sent as one message. Returns the process's exit status."""
    around = around or Surroundings()
    try:
        stage = load_stage(spec)
        if spec.payload["stage"] != stage.name:
            raise StageError(f"{spec.node}: the spec is for stage {spec.payload['stage']!r}, found {stage.name!r}")
        store = around.open_store(spec.store)
        store.say = lambda text: send({"event": "log", "message": text})
        send(_Attempt(spec, store, stage, send, stop, around).run())
        return 0
    except StageStopped as error:
        send({"event": "stopped", "message": str(error)})
        return 75
    except Damaged as error:
        record = None if error.record is None else list(error.record)
        send({"event": "damaged", "message": str(error), "tree": error.tree, "record": record})
    except (StageError, StoreError) as error:
        send({"event": "failed", "message": str(error), "kind": type(error).__name__})
    except Exception as error:  # noqa: BLE001 - whatever a body raises is reported with its traceback, and fails the stage
        message = f"{type(error).__name__}: {error}"
        send({"event": "failed", "message": message, "kind": type(error).__name__, "traceback": traceback.format_exc()})
    return 1


def load_stage(spec: Spec) -> Stage:
    """Import the declared stage that a spec names."""
    found = getattr(importlib.import_module(spec.module), spec.attribute, None)
    if not isinstance(found, Stage):
        raise StageError(f"{spec.node}: {spec.module}.{spec.attribute} is not a declared stage")
    return found


def _done(record: Record, *, executed: bool) -> dict[str, Any]:
    return {
        "event": "done",
        "executed": executed,
        "output": record.output,
        "size": record.size,
        "seconds": record.seconds,
    }


def install_signals(stop: Stop) -> None:
    """Turn SIGTERM and SIGINT into stop requests; the handler only sets a flag."""
    signal.signal(signal.SIGTERM, lambda number, frame: stop.request("SIGTERM"))
    signal.signal(signal.SIGINT, lambda number, frame: stop.request("SIGINT"))


def main() -> None:
    """Run the spec in the file named on the command line, printing one JSON message a line."""
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    stop = Stop()
    install_signals(stop)
    sys.exit(execute(spec, lambda message: print(json.dumps(message), flush=True), stop))


if __name__ == "__main__":
    main()
