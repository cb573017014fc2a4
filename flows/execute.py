"""Running a graph, whatever the engine: resolve a node, run it in a worker when it is a miss, and heal damage.

`StudyRun.node` does one node whose inputs are done. The direct engine calls it for every node in order; the Prefect
engine calls it from inside a task run. A worker that finds an input blob missing or damaged makes that input's record
invalid, its producer runs again, and then the worker is tried once more: for as long as that gets anywhere, however many
of its inputs were damaged.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from artifacts.errors import Damaged
from artifacts.record import Record
from artifacts.store import Store
from flows.graph import Graph, Node
from flows.plan import Planner
from flows.workers import WorkerPool
from tasks.identity import stage_key
from tasks.worker import Spec

ATTEMPTS = 3
"""Times that one output is made anew in a run because it is damaged, and that a node is tried again where none had to be."""

Watcher = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one node."""

    node: str
    stage: str
    key: str
    output: str
    """Digest of the output tree."""
    executed: bool
    seconds: float
    """Running time of the body: now if it was executed, when it was recorded otherwise."""


class StageFailed(Exception):
    """A stage did not produce its output. The message is for people; `details` holds a traceback where there is one."""

    def __init__(self, node: str, message: str, details: str = "") -> None:
        super().__init__(f"{node}: {message}")
        self.node = node
        self.details = details


class RunStopped(Exception):
    """The run was asked to end before this stage was done; its checkpoint is in the store."""


@dataclass(slots=True, kw_only=True)
class StudyRun:
    """One run of a graph against a store."""

    graph: Graph
    store: Store
    pool: WorkerPool
    scratch: Path
    watch: Watcher = lambda node, message: None
    """Gets (node name, message) for `cached`, `started`, `progress`, `log`, `done` and `failed` events."""
    on_outcome: Callable[[Outcome], None] = lambda outcome: None
    """Gets every outcome, from the thread that obtained it."""
    checkpoint_seconds: float = 15.0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Node -> why its own stage failed. What was not run because of it is in neither dict."""
    _planner: Planner | None = None
    _priority: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _healing: dict[str, threading.Lock] = field(default_factory=dict)
    _remade: Counter[str] = field(default_factory=Counter)
    """Node -> how often its output was made anew in this run, because it was damaged."""

    @property
    def planner(self) -> Planner:
        """The planner that computes this run's keys."""
        if self._planner is None:
            self._planner = Planner(self.graph, self.store)
        return self._planner

    def adopt_hits(self, records: dict[str, Record]) -> None:
        """Take over the records of nodes that a plan found to be hits, so that they are not looked up again."""
        for name, record in records.items():
            self._cached(self.graph[name], record)

    def node(self, name: str) -> Outcome:
        """The outcome of one node whose inputs are done: recorded already, or run now.

        Raises:
            StageFailed: the body or the commit failed.
            RunStopped: the run is ending.
        """
        with self._lock:
            known = self.outcomes.get(name)
        return known or self._obtain(self.graph[name])

    def _obtain(self, node: Node) -> Outcome:
        left = ATTEMPTS
        while left >= 0:
            before = self._times_remade(node)
            payload, symbols = self._identity(node)
            key = stage_key(payload)
            if (record := self._lookup(node, key)) is not None:
                return self._cached(node, record)
            message = self._work(node, payload, symbols)
            if message["event"] == "done":
                return self._finished(node, key, message)
            if message["event"] == "stopped" and self.pool.closed:
                raise RunStopped(f"{node.name}: {message['message']}")
            if message["event"] == "damaged" and message.get("tree") is not None:
                self._heal(node, message)
            elif message["event"] == "damaged" and message.get("record"):
                self.store.withdraw_damaged(*message["record"], message["message"])
            else:
                self._fail(node.name, message)
            left -= self._times_remade(node) == before
        tries = f"{ATTEMPTS + 1} times, though none of its inputs had to be made anew"
        self._fail(
            node.name, {"message": f"what it reads was damaged {tries}; {self._advice}; last: {message['message']}"}
        )

    def _times_remade(self, node: Node) -> int:
        """How often an input of the node was made anew: while that grows, another attempt may succeed."""
        return sum(self._remade[source] for source in set(node.inputs.values()))

    @property
    def _advice(self) -> str:
        return f"check the disks of the store {self.store.backend.url} and of {self.scratch}, then run the same command again"

    def _lookup(self, node: Node, key: str) -> Record | None:
        try:
            return self.store.lookup(node.stage.name, key)
        except Damaged as error:
            self.watch(node.name, {"event": "log", "message": f"made again, because {error}"})
            self.store.withdraw_damaged(node.stage.name, key, str(error))
            return None

    def _work(self, node: Node, payload: dict[str, Any], symbols: dict[str, str]) -> dict[str, Any]:
        hardware = self.pool.hardware
        spec = Spec(
            store=self.store.backend.url,
            node=node.name,
            module=node.stage.body.__module__,
            attribute=node.stage.body.__name__,
            config=node.config.model_dump(mode="json"),
            inputs=dict(payload["inputs"]),
            payload=payload,
            symbols=symbols,
            scratch=str(self.scratch),
            threads=hardware.threads,
            checkpoint_seconds=self.checkpoint_seconds,
        )
        if not self._priority:
            self._priority = self.graph.depth_below()
        return self.pool.run(
            spec,
            trains=node.stage.trains,
            priority=self._priority[node.name],
            listen=lambda message: self.watch(node.name, message),
        )

    def _finished(self, node: Node, key: str, message: dict[str, Any]) -> Outcome:
        outcome = Outcome(
            node=node.name,
            stage=node.stage.name,
            key=key,
            output=message["output"],
            executed=message["executed"],
            seconds=message["seconds"],
        )
        with self._lock:
            self.outcomes[node.name] = outcome
        self.on_outcome(outcome)
        self.watch(node.name, {"event": "done", "seconds": outcome.seconds, "executed": outcome.executed})
        return outcome

    def _fail(self, name: str, message: dict[str, Any]) -> NoReturn:
        with self._lock:
            self.failures[name] = message["message"]
        self.watch(name, {"event": "failed", "message": message["message"]})
        raise StageFailed(name, message["message"], message.get("traceback", ""))

    def _heal(self, node: Node, message: dict[str, Any]) -> None:
        """Withdraw the record of the input that a worker could not read, and remake it.

        Its old outcome stands until the new one takes its place. The lock is per source: remaking it may find its own
        inputs damaged, further up, and never comes back down.
        """
        for source in dict.fromkeys(node.inputs.values()):
            with self._lock:
                guard = self._healing.setdefault(source, threading.Lock())
            with guard:
                outcome = self.outcomes[source]
                # Looked up before the output is read: a record that another run makes anew meanwhile is not withdrawn.
                record = self.store.lookup(outcome.stage, outcome.key)
                if outcome.output != message["tree"] or self._readable(outcome.output):
                    continue
                if self._remade[source] == ATTEMPTS:
                    often = f"its input {source} was damaged again after it had been made anew {ATTEMPTS} times"
                    self._fail(node.name, {"message": f"{often}; {self._advice}; last: {message['message']}"})
                self._remade[source] += 1
                self.watch(source, {"event": "log", "message": f"made again, because {message['message']}"})
                if record is not None and record.output == outcome.output:
                    self.store.invalidate(record, message["message"])
                self._obtain(self.graph[source])

    def _readable(self, tree: str) -> bool:
        """True when the tree can be read intact now: another node may have healed it already."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="check-", dir=self.scratch))
        try:
            self.store.materialise(tree, folder)
            return True
        except Damaged:
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _identity(self, node: Node) -> tuple[dict[str, Any], dict[str, str]]:
        with self._lock:
            inputs = {name: self.outcomes[source].output for name, source in node.inputs.items()}
            return self.planner.identity(node, inputs)

    def _cached(self, node: Node, record: Record) -> Outcome:
        outcome = Outcome(
            node=node.name,
            stage=node.stage.name,
            key=record.key,
            output=record.output,
            executed=False,
            seconds=record.seconds,
        )
        with self._lock:
            self.outcomes[node.name] = outcome
        self.on_outcome(outcome)
        self.watch(node.name, {"event": "cached", "seconds": record.seconds})
        return outcome


def run_in_order(run: StudyRun) -> None:
    """The direct engine: every node in graph order, one at a time. A failure skips what depends on it, nothing else."""
    skipped: set[str] = set()
    for node in run.graph:
        if skipped.intersection(node.inputs.values()):
            skipped.add(node.name)
            continue
        try:
            run.node(node.name)
        except StageFailed:
            skipped.add(node.name)
