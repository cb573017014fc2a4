"""What a person sees while a study runs: which stage, how far, how long left.

On a terminal, live bars; elsewhere, plain lines, at most one each ten seconds for a stage. Everything goes to standard
error, so that standard output stays for results. How long is left is reckoned from what the same stages took before
(their records, or the other arm's in this run) and from the progress of those that are running.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from flows.graph import Graph

LINE_SECONDS = 10.0


@dataclass(slots=True)
class Transfer:
    """Bytes on their way to or from the store."""

    what: str
    since: float
    first: int
    """Bytes that were done when it was first heard of."""
    done: int
    total: int

    def text(self, now: float) -> str:
        """`storing 1.2 of 8.0 GB (15 %), 41s left`."""
        rate = (self.done - self.first) / max(now - self.since, 1e-6)
        left = f", {clock((self.total - self.done) / rate)} left" if rate > 0 else ""
        percent = 100 * self.done // max(self.total, 1)
        return f"{self.what} {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB ({percent} %){left}"


@dataclass(slots=True)
class _Running:
    since: float
    done: int = 0
    total: int = 0
    first: tuple[float, int] | None = None
    """Time and count of the first progress report: rates leave out the start-up."""
    metrics: dict[str, float] = field(default_factory=dict)
    shown: float = 0.0
    transfer: Transfer | None = None
    """What is on its way to or from the store, before or after the body."""

    def left(self, now: float) -> float | None:
        """Seconds left at the rate so far, or None before there is a rate."""
        if self.first is None or self.done <= self.first[1] or not self.total:
            return None
        rate = (self.done - self.first[1]) / max(now - self.first[0], 1e-6)
        return max(self.total - self.done, 0) / rate


class Display:
    """Collects the events of a run and shows them."""

    def __init__(self, graph: Graph, estimates: dict[str, float], workers: int, out: TextIO = sys.stderr) -> None:
        self._stages = {node.name: node.stage.name for node in graph}
        self._estimates = dict(estimates)
        self._by_stage: dict[str, float] = {}
        self._workers = workers
        self._out = out
        self._lock = threading.RLock()
        self._running: dict[str, _Running] = {}
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._started = time.monotonic()
        self._live: Any = None
        self._mute = False

    def __call__(self, node: str, message: dict[str, Any]) -> None:
        """Take in one event of a node."""
        with self._lock:
            handler = getattr(self, f"_on_{message['event']}", None)
            if handler is not None:
                handler(node, message)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show live bars for the length of the block when the output is a terminal."""
        if not self._out.isatty():
            yield
            return
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(file=self._out), get_renderable=self._table, refresh_per_second=4) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def _on_cached(self, node: str, message: dict[str, Any]) -> None:
        if node not in self._finished:
            self._finished.add(node)

    def _on_started(self, node: str, message: dict[str, Any]) -> None:
        self._running[node] = _Running(time.monotonic())
        self._line(f"{node}: started")

    def _on_progress(self, node: str, message: dict[str, Any]) -> None:
        running = self._running.setdefault(node, _Running(time.monotonic()))
        now = time.monotonic()
        running.done, running.total, running.metrics = message["done"], message["total"], message["metrics"]
        if running.first is None:
            running.first = (now, running.done)
        if self._live is None and now - max(running.shown, running.since) >= LINE_SECONDS:
            running.shown = now
            self._line(f"{node}: {self._how_far(running, now)}")

    def _on_transfer(self, node: str, message: dict[str, Any]) -> None:
        running = self._running.setdefault(node, _Running(time.monotonic()))
        now, done, total = time.monotonic(), message["done"], message["total"]
        if running.transfer is None or running.transfer.what != message["what"]:
            running.transfer = Transfer(message["what"], now, done, done, total)
        running.transfer.done = done
        if self._live is None and now - max(running.shown, running.transfer.since) >= LINE_SECONDS:
            running.shown = now
            self._line(f"{node}: {self._how_far(running, now)}")
        if done >= total:
            running.transfer = None

    def _on_log(self, node: str, message: dict[str, Any]) -> None:
        self._line(f"{node}: {message['message']}")

    def _on_done(self, node: str, message: dict[str, Any]) -> None:
        self._running.pop(node, None)
        self._finished.add(node)
        if message["executed"]:
            self._by_stage[self._stages[node]] = message["seconds"]
        how = f"done in {clock(message['seconds'])}" if message["executed"] else "done by another worker"
        self._line(f"{node}: {how}; {self._overall()}")

    def _on_failed(self, node: str, message: dict[str, Any]) -> None:
        self._running.pop(node, None)
        self._failed.add(node)
        self._line(f"{node}: FAILED: {message['message']}")

    def _how_far(self, running: _Running, now: float) -> str:
        if running.transfer is not None:
            return running.transfer.text(now)
        if not running.total:
            return "running"
        left = running.left(now)
        metrics = "".join(f", {name} {value:.4g}" for name, value in running.metrics.items())
        after = "" if left is None else f", {clock(left)} left"
        return f"{running.done}/{running.total} ({100 * running.done // running.total} %){after}{metrics}"

    def _overall(self) -> str:
        left = self._seconds_left()
        after = "" if left is None else f", about {clock(left)} left"
        return f"{len(self._finished)}/{len(self._stages)} stages{after}"

    def _seconds_left(self) -> float | None:
        """Work left divided by the workers; None while some stage has never been timed anywhere."""
        now = time.monotonic()
        total = longest = 0.0
        for node, stage in self._stages.items():
            if node in self._finished or node in self._failed:
                continue
            expected = self._estimates.get(node, self._by_stage.get(stage))
            if node in self._running:
                left = self._running[node].left(now)
                if left is None and expected is not None:
                    left = max(expected - (now - self._running[node].since), 0.0)
            else:
                left = expected
            if left is None:
                return None
            total += left
            longest = max(longest, left)
        return max(total / self._workers, longest)

    def _line(self, text: str) -> None:
        stamp, text = f"[{clock(time.monotonic() - self._started)}]", printable(text)
        if self._live is not None:
            self._live.console.print(f"{stamp} {text}", highlight=False, markup=False)
        elif not self._mute:
            try:
                print(f"{stamp} {text}", file=self._out, flush=True)
            except OSError:
                self._mute = True  # nobody reads any more; the run itself goes on

    def _table(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        with self._lock:
            now = time.monotonic()
            for node, running in sorted(self._running.items(), key=lambda item: item[1].since):
                shown = running.transfer or running
                bar = ProgressBar(total=shown.total or 1, completed=shown.done, width=24)
                table.add_row(node, bar, self._how_far(running, now))
            table.add_row("study", ProgressBar(len(self._stages), len(self._finished), width=24), self._overall())
        return table


class TransferLine:
    """Shows the `transfer` events of one command: a line that is written over on a terminal, else one each ten seconds."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._transfer: Transfer | None = None
        self._shown = time.monotonic()

    def __call__(self, message: dict[str, Any]) -> None:
        """Take in one event."""
        now, done, total = time.monotonic(), message["done"], message["total"]
        if self._transfer is None:
            self._transfer = Transfer(message["what"], now, done, done, total)
        self._transfer.done = done
        terminal = self._out.isatty()
        if terminal or now - self._shown >= LINE_SECONDS:
            self._shown = now
            end = "" if terminal and done < total else "\n"
            start = "\r\033[K" if terminal else ""
            with contextlib.suppress(OSError):
                print(f"{start}{self._transfer.text(now)}", end=end, file=self._out, flush=True)


def say(text: str) -> None:
    """One line on standard error; a run goes on when nobody reads it any more."""
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """A result for people, on standard output."""
    print(printable(text), flush=True)


def tell_result(plain: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """The result of a command: one line of JSON for scripts, or `text` for people."""
    tell(json.dumps(plain) if as_json else text)


def printable(text: str) -> str:
    """`text` without what would steer a terminal, or turn the order of letters: it may come from a store, or a model."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def clock(seconds: float) -> str:
    """`7s`, `1m05s`, `2h03m`."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def byte_size(size: float) -> str:
    """`512 bytes`, `3.0 KB`, `1.2 GB`."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`, `3 audit entries`."""
    ending = "" if count == 1 else "s"
    if ending and noun.endswith("ry"):
        noun, ending = noun[:-1], "ies"
    return f"{count:,} {noun}{ending}"
