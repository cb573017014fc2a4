"""What a collection found and did, as a table for people: objects and bytes of each kind, and of each stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from artifacts.collect import KINDS, Report
from artifacts.mark import Tally
from flows.display import byte_size, clock

Row = tuple[str, Tally, str]
"""Name, how much, and a remark."""
ROOTS = {
    "run": ("run", "runs"),
    "active": ("run under way", "runs under way"),
    "pin": ("pin", "pins"),
    "intent": ("writer", "writers"),
    "young": ("young record", "young records"),
}


def collection_table(report: Report) -> str:
    """The report, aligned. What is unused is told twice, by kind and by stage; the rows below say what becomes of it."""
    rows = [
        ("", "objects", "size", ""),
        *((name, f"{t.objects:,}", byte_size(t.bytes), note) for name, t, note in _rows(report)),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {objects:>{widths[1]}}  {size:>{widths[2]}}{note and f'  {note}'}".rstrip()
        for name, objects, size, note in rows
    )


def _rows(report: Report) -> Iterator[Row]:
    roots = [_root(name, count) for name, count in report.roots.items() if count]
    yield "in use", _sum(report.in_use.values()), f"kept by {', '.join(roots) or 'nothing'}"
    yield f"not in use, younger than {span(report.grace)}", report.young, ""
    yield "unused", _sum(report.unused.values()), ""
    for kind, tally in report.unused.items():
        yield f"  {KINDS[kind]}", tally, ""
    for stage, tally in sorted(report.by_stage.items(), key=lambda item: (-item[1].bytes, item[0])):
        yield f"  of stage {stage}" if not stage.startswith("(") else f"  of {stage[1:-1]}", tally, ""
    verb = "to delete now" if report.dry_run else "deleted"
    yield verb, report.ready if report.dry_run else report.deleted, ""
    waiting = _sum([report.marked, report.waiting])
    if waiting.objects and report.next_seconds is not None:
        yield "waiting", waiting, f"run gc again in {span(max(report.next_seconds, 0.0))}"
    verb = "to remove" if report.dry_run else "removed"
    for kind, tally in report.leftovers.items():
        yield f"{verb}: {kind}", tally, "by age alone"


def span(seconds: float) -> str:
    """`7d`, `1d12h`; below a day as `clock` has it."""
    days, hours = divmod(round(seconds / 3600), 24)
    return clock(seconds) if not days else f"{days}d{hours}h" if hours else f"{days}d"


def _root(name: str, count: int) -> str:
    return f"{count:,} {ROOTS[name][count != 1]}"


def _sum(tallies: Iterable[Tally]) -> Tally:
    several = list(tallies)
    return Tally(sum(t.objects for t in several), sum(t.bytes for t in several))
