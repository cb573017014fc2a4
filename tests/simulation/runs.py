"""A run of the graph in one simulated process, as `flows` does it: announce, execute or adopt, heal what is damaged, remember."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.digest import canonical_json
from artifacts.errors import Damaged, StoreError
from artifacts.intent import wait_until_spared
from artifacts.mark import ACTIVE_RUNS, record_key
from artifacts.sole_writer import SoleWriter
from tasks.worker import Spec, Surroundings, execute
from tests.simulation.ledger import TIME_TO_LIVE, Work
from tests.simulation.machine import CLOCK

if TYPE_CHECKING:
    from tests.simulation.scenario import Node, Schedule

EXPECTED = ("StoreUnavailable", "LeaseLost")
"""Errors that a worker may fail with, and be started again."""
ATTEMPTS = 3
"""Times that one output is made anew because it is damaged, and that a stage is tried again where none had to be."""

NOT_YET = "0" * 64
"""Stands for an output in the note of a run under way."""


class RunFailed(Exception):
    """A stage did not end well."""


class Run:
    """The stages in turn."""

    def __init__(self, schedule: Schedule, nodes: list[Node], *, remember: bool) -> None:
        self._schedule = schedule
        self._store = schedule.store
        self._nodes = {node.name: node for node in nodes}
        self._remember = remember
        self._process = schedule.world.current
        self._active = f"{ACTIVE_RUNS}{uuid.uuid4().hex}.json"
        self._note = SoleWriter(self._store.backend, self._active)
        self._outputs: dict[str, str] = {}
        self._named: dict[str, dict[str, str]] = {}
        self._remade: Counter[str] = Counter()

    def run(self) -> bool:
        """Every stage; False if the run failed."""
        try:
            for name in self._nodes:
                self._obtain(name)
            if self._remember:
                self._store.put_run(self._describe(complete=True))
                self._schedule.named |= {(node["stage"], node["key"]) for node in self._named.values()}
                self._store.backend.delete(self._active)
        except RunFailed:
            return False
        except (StoreError, OSError) as error:
            self._schedule.world.note(f"the run failed: {error}")
            return False
        return True

    def _obtain(self, name: str) -> None:
        """The output of a stage, executed or adopted; what it finds damaged is withdrawn and made again."""
        schedule, node = self._schedule, self._nodes[name]
        left = ATTEMPTS
        while left >= 0:
            before = sum(self._remade[source] for source in node.above)
            spec = self._spec(node)
            self._named[name] = {"stage": "counting", "key": spec.key, "output": self._outputs.get(name, NOT_YET)}
            if self._remember:
                self._announce()
            schedule.ledger.work[self._process] = Work("counting", spec.key, node.config.interval, node.deaf)
            message = self._execute(spec)
            schedule.world.note(f"{name}: {message['event']} {message.get('message', '')}")
            if message["event"] == "done":
                self._outputs[name] = self._named[name]["output"] = message["output"]
                schedule.ledger.reported("counting", spec.key, message["output"], self._process, relied=self._remember)
                return
            if message["event"] == "damaged" and message["tree"] is not None:
                self._heal(node, message)
            elif message["event"] == "damaged" and message["record"] is not None:
                self._store.withdraw_damaged(*message["record"], message["message"])
            else:
                break
            left -= sum(self._remade[source] for source in node.above) == before
        schedule.world.counts[f"workers that {message['event']}"] += 1
        if message["event"] == "failed" and message["kind"] not in EXPECTED:
            schedule.ledger.violated(f"crash: {message['kind']}: {message['message']}")
        raise RunFailed

    def _heal(self, node: Node, message: dict[str, Any]) -> None:
        for source in node.above:
            tree = self._outputs[source]
            record = self._store.lookup("counting", self._named[source]["key"])
            if tree != message["tree"] or self._readable(tree):
                continue
            if self._remade[source] == ATTEMPTS:
                raise RunFailed
            self._remade[source] += 1
            self._schedule.world.counts["stages healed"] += 1
            if record is not None and record.output == tree:
                self._store.invalidate(record, message["message"])
            self._obtain(source)

    def _readable(self, tree: str) -> bool:
        folder = Path(tempfile.mkdtemp(prefix="check-", dir=self._schedule.folder))
        try:
            self._store.materialise(tree, folder)
            return True
        except Damaged:
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _describe(self, *, complete: bool) -> dict[str, Any]:
        return {"experiment": "e", "complete": complete, "nodes": self._named, "config": {}}

    def _announce(self) -> None:
        """Say which records the run will rely on, and wait while a collection deletes one of them."""
        self._note.write(canonical_json({"schema": 1, **self._describe(complete=False)}))
        keys = frozenset(record_key(node["stage"], node["key"]) for node in self._named.values())
        wait_until_spared(self._store.backend, keys, CLOCK)

    def _execute(self, spec: Spec) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []

        def send(message: dict[str, Any]) -> None:
            messages.append(message)

        around = Surroundings(
            clock=CLOCK,
            open_store=lambda url: self._store,
            require_code=lambda spec, stage: None,
            end_process=lambda status: self._exit(),
        )
        execute(spec, send, self._schedule.stops[self._process], around)
        return messages[-1]

    def _exit(self) -> None:
        self._schedule.world.counts["ended themselves"] += 1
        self._schedule.ledger.gave_up(self._process)
        self._schedule.world.end(self._process)

    def _spec(self, node: Node) -> Spec:
        config = node.config.model_dump(mode="json")
        inputs = {name: self._outputs[name] for name in node.above}
        payload = {"algorithm": 1, "stage": "counting", "code": "0" * 64, "config": config, "inputs": inputs}
        return Spec(
            store="memory://simulation",
            node=node.name,
            module="tests.simulation.stages",
            attribute="counting",
            config=config,
            inputs=inputs,
            payload=payload,
            symbols={},
            scratch=str(self._schedule.folder / self._process.machine),
            time_to_live=TIME_TO_LIVE,
            checkpoint_seconds=0.0,
        )
