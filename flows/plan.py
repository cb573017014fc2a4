"""What a run would do, and why: the graph resolved against the store by reading small records only.

A node whose inputs are known has a key; a record under that key is a hit. A node below a miss has no key yet: it is
`maybe` when a record exists that would make it a hit if the rerun inputs came out with the same bytes as before (early
cutoff), and `run` when no record could. The same walk with every input known is what `run` does.

A plan whose stages this machine has seen recorded reads every record in one round of concurrent requests; see
`flows.hints`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from artifacts.digest import canonical_json, digest_bytes
from artifacts.errors import Damaged
from artifacts.record import Record
from artifacts.store import Store
from artifacts.withdrawn import Withdrawal, withdrawals
from flows.graph import Graph, Node
from flows.hints import Hints
from tasks.identity import CodeIdentity, CodeReader, stage_key, stage_payload

Status = Literal["hit", "run", "maybe"]
UNKNOWN = "?"
"""Stands for the digest of an input that a run has to make first."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One field, symbol or input that differs between a wanted stage run and a recorded one."""

    what: str
    """`config.learning_rate`, `tasks/sft.py::sft` or `inputs.model`."""
    recorded: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.what}: {self.recorded} -> {self.wanted}"

    @property
    def in_code(self) -> bool:
        """True for a symbol; false for a field of the config, an input, or the algorithm of the key."""
        return "::" in self.what and not self.what.startswith(("config.", "inputs."))


@dataclass(slots=True, kw_only=True)
class Resolution:
    """What is known of one node."""

    node: Node
    status: Status
    payload: dict[str, Any]
    symbols: dict[str, str]
    key: str | None
    """None while an input is not known."""
    record: Record | None = None
    nearest: Record | None = None
    differences: list[Difference] = field(default_factory=list)
    code_only: Record | None = None
    """The nearest of the records that differ in code and in nothing else."""
    withdrawn: Withdrawal | None = None
    """Why the record that this run would have hit counts as none."""
    damage: str | None = None
    """Why the record under this key cannot be used; a run withdraws it."""

    @property
    def reason(self) -> str:
        """One line for the plan."""
        if self.status == "hit":
            accepted = self.record.equivalent if self.record is not None else None
            return "recorded" if accepted is None else f"recorded (accepted: {accepted['because']})"
        if self.damage is not None:
            return self.damage
        if self.withdrawn is not None:
            return str(self.withdrawn)
        if self.nearest is None:
            return "never run in this store"
        if not self.differences:
            return "inputs are about to be remade"
        more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
        return f"{self.differences[0]}{more}"

    @property
    def seconds_estimate(self) -> float | None:
        """Seconds the body took when it last ran with the nearest config; None when it never ran."""
        known = self.record or (self.withdrawn.record if self.withdrawn else None) or self.nearest
        return known.seconds if known else None


class Planner:
    """Resolves nodes against a store. Code identities and records of a stage are read once."""

    def __init__(self, graph: Graph, store: Store, code: CodeReader | None = None, hints: Hints | None = None) -> None:
        self.graph = graph
        self.store = store
        self._hints = hints
        self._reader = code or CodeReader()
        self._code: dict[str, CodeIdentity] = {}
        self._records: dict[str, list[Record]] = {}
        self._withdrawals: list[Withdrawal] | None = None

    def identity(self, node: Node, inputs: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        """(payload, digests of the code's symbols) of a node, given the tree digest of every input."""
        if node.stage.name not in self._code:
            self._code[node.stage.name] = self._reader.stage(node.stage)
        code = self._code[node.stage.name]
        return stage_payload(node.stage, node.config, inputs, code), code.symbols

    def plan(self, *, explain: bool = True) -> dict[str, Resolution]:
        """Resolve every node, in rounds of concurrent reads: one for what is hinted, one for each level of the rest.

        With `explain`, misses are compared with the nearest record, which lists and reads their stage's records.
        """
        found: dict[str, Resolution] = {}
        recipes = self._recipes() if self._hints else {}
        hinted = self._hints.load(recipes.values()) if self._hints else {}
        keys = [(n.stage.name, hinted[r]) for n in self.graph if (r := recipes.get(n.name)) in hinted]
        damaged: dict[tuple[str, str], Damaged] = {}
        records = self.store.lookup_many(keys, damaged) if keys else {}
        for level in self._levels():
            wanted = [self._unresolved(node, found) for node in level]
            unread = {(r.node.stage.name, r.key) for r in wanted if r.key is not None} - records.keys()
            records.update(self.store.lookup_many(unread, damaged) if unread else {})
            for resolution in wanted:
                if resolution.key is not None:
                    pair = (resolution.node.stage.name, resolution.key)
                    resolution.record = records[pair]
                    resolution.damage = str(damaged[pair]) if pair in damaged else None
                if resolution.record is not None:
                    resolution.status = "hit"
                elif explain:
                    self._explain(resolution)
                found[resolution.node.name] = resolution
        if self._hints:
            seen = {recipes[name]: r.key for name, r in found.items() if r.record is not None and r.key is not None}
            self._hints.remember({recipe: key for recipe, key in seen.items() if hinted.get(recipe) != key})
        return {node.name: found[node.name] for node in self.graph}

    def _recipes(self) -> dict[str, str]:
        """Node -> digest of its stage, code, config and, for every input, the recipe that makes it."""
        recipes: dict[str, str] = {}
        for node in self.graph:
            inputs = {name: recipes[source] for name, source in node.inputs.items()}
            recipes[node.name] = digest_bytes(canonical_json(self.identity(node, inputs)[0]))
        return recipes

    def _levels(self) -> Iterator[list[Node]]:
        depth: dict[str, int] = {}
        for node in self.graph:
            depth[node.name] = 1 + max((depth[source] for source in node.inputs.values()), default=-1)
        for level in range(max(depth.values(), default=-1) + 1):
            yield [node for node in self.graph if depth[node.name] == level]

    def _unresolved(self, node: Node, found: dict[str, Resolution]) -> Resolution:
        inputs = {}
        for name, source in node.inputs.items():
            above = found[source].record
            inputs[name] = above.output if above else UNKNOWN
        payload, symbols = self.identity(node, inputs)
        key = None if UNKNOWN in inputs.values() else stage_key(payload)
        return Resolution(node=node, status="run", payload=payload, symbols=symbols, key=key)

    def _explain(self, resolution: Resolution) -> None:
        stage = resolution.node.stage.name
        if stage not in self._records:
            self._records[stage] = list(self.store.records(stage))
        resolution.withdrawn = self._withdrawn(resolution)
        ranked = [(compare(record, resolution.payload, resolution.symbols), record) for record in self._records[stage]]
        if not ranked:
            return
        name = resolution.node.name
        ranked.sort(key=lambda pair: (len(pair[0]), pair[1].node != name))
        resolution.differences, resolution.nearest = ranked[0]
        if resolution.key is None:
            if not resolution.differences:
                resolution.status, resolution.withdrawn = "maybe", None
            return
        of_code = (record for found, record in ranked if found and all(difference.in_code for difference in found))
        resolution.code_only = next(of_code, None)

    def _withdrawn(self, resolution: Resolution) -> Withdrawal | None:
        """The newest withdrawal of the record under this key or, while an input is not known, of one that may be it."""
        if self._withdrawals is None:
            self._withdrawals = withdrawals(self.store)
        of_stage = [row for row in self._withdrawals if row.kind == resolution.node.stage.name]
        if resolution.key is not None:
            return next((row for row in of_stage if row.key == resolution.key), None)
        name = resolution.node.name
        return next(
            (
                row
                for row in of_stage
                if row.record is not None
                and row.record.node == name
                and not compare(row.record, resolution.payload, resolution.symbols)
            ),
            None,
        )


def compare(record: Record, payload: dict[str, Any], symbols: dict[str, str]) -> list[Difference]:
    """Every field, symbol and input by which a wanted run differs from a recorded one. Unknown inputs are left out.

    Symbols are compared under one key algorithm only, since another one gives every symbol another digest.
    """
    found = []
    old, new = record.payload, payload
    if old["algorithm"] != new["algorithm"]:
        found.append(Difference("algorithm", str(old["algorithm"]), str(new["algorithm"])))
    found.extend(_compare_values("config", old["config"], new["config"]))
    for name in sorted(old["inputs"].keys() | new["inputs"].keys()):
        before, after = old["inputs"].get(name, "absent"), new["inputs"].get(name, "absent")
        if before != after and after != UNKNOWN:
            found.append(Difference(f"inputs.{name}", before[:12], after[:12]))
    if old["code"] != new["code"] and old["algorithm"] == new["algorithm"]:
        for symbol in sorted(record.symbols.keys() | symbols.keys()):
            before, after = record.symbols.get(symbol, "absent"), symbols.get(symbol, "absent")
            if before != after:
                found.append(Difference(symbol, before[:12], after[:12]))
    return found


def _compare_values(where: str, old: Any, new: Any) -> Iterator[Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            if name in old and name in new:
                yield from _compare_values(f"{where}.{name}", old[name], new[name])
            else:
                before, after = ("absent" if name not in side else _short(side[name]) for side in (old, new))
                yield Difference(f"{where}.{name}", before, after)
    elif canonical_json(old) != canonical_json(new):  # 1, 1.0 and true are equal to Python, and three keys
        plain = str(old) != str(new)
        yield Difference(where, _short(old, plain=plain), _short(new, plain=plain))


def _short(value: Any, *, plain: bool = True) -> str:
    text = str(value) if plain else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
