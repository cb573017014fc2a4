"""What a store says to people: nothing in it steers a terminal, runs in a browser, or ends a command in a traceback."""

from __future__ import annotations

import json
import sqlite3
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from artifacts.audit import verify
from artifacts.checkpoints import StoredCheckpoints
from artifacts.digest import canonical_json, seal
from artifacts.errors import Damaged, LeaseLost
from artifacts.keep import forget, pins
from artifacts.lease import Lease
from artifacts.memory import MemoryBackend
from artifacts.record import Record, payload_key
from artifacts.store import Store
from artifacts.trail import note, read_trail
from flows import cli
from flows.display import Display, printable, tell
from flows.export import export_report
from flows.graph import Graph, Node
from flows.hints import Hints
from flows.plan import Planner
from tasks.identity import CodeReader
from tests import toy_stages
from tests.hostile import BLOB, GOOD, KEY, LATEST, MALFORMED, PAYLOAD, changed, put_listing, row, tree

EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\x9b31m"
"""Sets the title, clears the screen, turns the order of letters, and switches colour with an eight-bit code."""
SCRIPT = '<script>alert(1)</script><img src=x onerror="alert(2)">'


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty local store."""
    return Store.open(str(tmp_path / "store"))


def put_record(store: Store, **fields: Any) -> Record:
    """A record with a hostile payload, under its right key."""
    payload = {**PAYLOAD, **fields.pop("payload", {})}
    record = replace(GOOD, key=payload_key(payload), payload=payload, **fields)
    store.backend.put(f"v1/act/toy/{record.key}.json", record.encode())
    return record


def steers(text: str) -> list[str]:
    """The characters in a text that a terminal does not simply show."""
    return [c for c in text if not c.isprintable() and c not in "\n\t"]


def test_text_is_shown_as_it_is_or_escaped() -> None:
    """Letters of every script pass; what steers, turns or cannot be written is escaped, and line feeds stay."""
    assert printable("Größe 中 \t1\n2") == "Größe 中 \t1\n2"
    assert printable(EVIL) == r"\x1b]0;owned\x07\x1b[2J\u202egnp.exe\x9b31m"
    assert printable("a\udcff\r\x00b") == r"a\udcff\r\x00b"


def test_commands_print_nothing_that_steers(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hostile names and values anywhere in a store: `ls`, `show`, `verify`, `repair` and their errors stay plain text."""
    digest = put_listing(store, tree([row("a")]))
    record = put_record(store, output=digest, payload={"config": {"x": EVIL, "y": {EVIL: EVIL}}})
    nodes = {"n": {"stage": "toy", "key": record.key, "output": digest}}
    store.put_run({"experiment": "e", "complete": True, "config": {}, "nodes": nodes})
    note(store.backend, EVIL, EVIL, label=EVIL, records=[EVIL])
    (tmp_path / "store" / "v1" / "pin").mkdir()
    for folder in ("run", "pin", "audit", "wip", "act/toy"):
        target = tmp_path / "store" / "v1" / folder / f"{EVIL}\udcff.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"{}")
    at = ["--store", store.backend.url]
    for arguments in (
        ["ls"], ["ls", "--audit"], ["show", "n"], ["show", EVIL], ["verify"], ["repair", "--dry-run"], ["repair"],
        ["gc", "--dry-run"], ["unpin", EVIL], ["forget", "--undo", EVIL], ["export", "n", str(tmp_path / "out")],
        ["ls", "--json"], ["ls", "--audit", "--json"], ["verify", "--json"],
    ):  # fmt: skip
        assert cli.main([*arguments, *at]) in (0, 1, 2)
        captured = capsys.readouterr()
        assert captured.out + captured.err and steers(captured.out + captured.err) == [], arguments


def test_why_shows_a_hostile_record(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest record may hold anything in its config: the explanation names the field, and steers nothing."""
    graph = Graph()
    node = Node(name="n", stage=toy_stages.source, config=toy_stages.TextConfig())
    graph.add(node)
    planner = Planner(graph, store, CodeReader(packages=("tests",)))
    payload = {**planner.identity(node, {})[0], "config": {"text": EVIL + SCRIPT, "more": {EVIL: [EVIL]}}}
    record = replace(GOOD, stage="source", key=payload_key(payload), payload=payload)
    store.backend.put(f"v1/act/source/{record.key}.json", record.encode())
    found = planner.plan()["n"]
    assert {d.what for d in found.differences} >= {"config.text", "config.more"}
    tell("\n".join([found.reason, *map(str, found.differences)]))
    assert steers(capsys.readouterr().out) == []


def test_what_workers_say_steers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Log lines and failures of stages, which may repeat what a model wrote, are escaped."""
    display = Display(Graph(), {}, 1, out=sys.stderr)
    display("n", {"event": "log", "message": EVIL})
    display("n", {"event": "failed", "message": EVIL})
    said = capsys.readouterr().err
    assert said.count("owned") == 2 and steers(said) == []


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.tags.update(name for name, _ in attrs if name.startswith("on"))


def test_the_report_shows_a_hostile_environment_as_text(store: Store, tmp_path: Path) -> None:
    """Host, device and versions of a record, which the exporter puts into the page, are escaped."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("<h1>Report</h1><!-- run-record -->")
    digest = store.put_tree(tmp_path / "out").digest
    where = {"host": SCRIPT, "device": SCRIPT, "accelerator": SCRIPT, "versions": {SCRIPT: SCRIPT}}
    record = put_record(store, output=digest, environment=where)
    graph = Graph()
    graph.add(Node(name="report", stage=toy_stages.source, config=toy_stages.TextConfig()))
    page = export_report(store, graph, {"report": record}, tmp_path / "page").read_text()
    parser = _Tags()
    parser.feed(page)
    assert not {"script", "img", "onerror"} & parser.tags and page.count("&lt;script&gt;") == 4


UNPRINTABLE: dict[str, bytes] = {
    "a symbol with an escape sequence": changed(symbols={EVIL: BLOB}),
    "a version with an escape sequence": changed(environment={"versions": {EVIL: "1"}}),
    "a payload without code": changed(payload={"stage": "toy", "algorithm": 1, "config": {}, "inputs": {}}),
    "an input that is a number": changed(payload={**PAYLOAD, "inputs": {"a": 5}}),
    "an input's name with an escape sequence": changed(payload={**PAYLOAD, "inputs": {EVIL: BLOB}}),
}


@pytest.mark.parametrize("harm", UNPRINTABLE)
def test_records_that_could_not_be_compared(harm: str) -> None:
    """What `why` would stumble over or could not show is no record."""
    with pytest.raises(Damaged, match="not a record .ValueError"):
        Record.decode(UNPRINTABLE[harm], "toy", KEY)


PINS: dict[str, bytes] = {
    **MALFORMED,
    **{f"nodes: {name}": seal({"schema": 1, "label": "x", "by": "b", "at": 1.0, "because": "", "nodes": nodes})
       for name, nodes in {"a list": [], "null": None, "text": {"a": "b"}, "no key": {"a": {"stage": "toy"}}}.items()},
    "a label that steers": seal({"schema": 1, "label": EVIL, "by": "b", "at": 1.0, "because": "", "nodes": {}}),
    "nobody's": seal({"schema": 1, "label": "x", "by": None, "at": 1.0, "because": "", "nodes": {}}),
}  # fmt: skip


@pytest.mark.parametrize("harm", PINS)
def test_hostile_pin(harm: str, store: Store) -> None:
    """A pin that is not one is found by verification, and keeps no command from its work."""
    store.commit(GOOD)
    store.backend.put("v1/pin/x.json", PINS[harm])
    assert pins(store) == []
    assert [f.kind for f in verify(store).findings if f.key == "v1/pin/x.json"] == ["pin"]
    forget(store, GOOD, "test")


@pytest.mark.parametrize("fence", [2**53, 2**64 - 1, -1, 1e300, "9" * 400, True])
def test_fences_that_cannot_be_counted_on_from(fence: Any, store: Store, tmp_path: Path) -> None:
    """A fence near or beyond every limit, in a lease or in a pointer, shuts nobody out and needs nobody."""
    body = {"state": "free", "owner": "x", "beat": "b", "holder": {}, "time_to_live": 1.0, "fence": fence}
    store.backend.put(f"v1/lease/{KEY}.json", canonical_json(body))
    store.backend.put(LATEST, seal({"fence": fence, "checkpoints": []}))
    checkpoints = StoredCheckpoints(store.backend, KEY, 0)
    lease = Lease(store.backend, KEY, last_fence=checkpoints.stored_fence)
    assert lease.try_acquire() and lease.fence == 1
    checkpoints.fence = 2
    checkpoints.claim()
    with pytest.raises(LeaseLost):
        StoredCheckpoints(store.backend, KEY, 1).keep_intact(tmp_path)


@pytest.mark.parametrize("name", ["../../../x", "0" * 5000 + "-0123456789ab", 7, None, "a\0b"])
def test_a_pointer_to_somewhere_else_ends_no_verification(name: Any, store: Store, tmp_path: Path) -> None:
    """A checkpoint's name that leads out, or that no file system takes, is damage of the pointer, and means no checkpoint."""
    store.backend.put(LATEST, seal({"fence": 1, "checkpoints": [{"name": name, "step": 1, "digest": BLOB}]}))
    assert [(f.kind, f.key) for f in verify(store).findings] == [("checkpoint", LATEST)]
    assert StoredCheckpoints(store.backend, KEY, 2).restore(tmp_path) is None


@pytest.mark.parametrize("at", ["soon", None, [], True, 1e300, -1e17])
def test_a_trail_with_other_kinds_of_values(at: Any) -> None:
    """An entry of the audit trail without a time is left out, and the others are shown."""
    backend = MemoryBackend()
    body = {"schema": 1, "action": "pin", "because": "", "by": "u@h"}
    backend.put("v1/audit/000000000000001-x.json", seal({**body, "at": at}))
    backend.put("v1/audit/000000000000002-x.json", seal({**body, "at": 1.0, "records": "x"}))
    backend.put("v1/audit/000000000000003-x.json", seal({**body, "at": 2.0}))
    assert [json.dumps(entry.describe()) and entry.at for entry in read_trail(backend)] == [2.0]


@pytest.mark.parametrize("key", [5, b"\xff", "../x", ""])
def test_hints_that_are_no_keys(key: Any, tmp_path: Path) -> None:
    """What stands in the local index is used only where it is a key."""
    known = Hints(tmp_path / "hints.sqlite")
    known.remember({BLOB: KEY, KEY: BLOB})
    with sqlite3.connect(tmp_path / "hints.sqlite") as connection:
        connection.execute("UPDATE hint SET key = ? WHERE recipe = ?", (key, BLOB))
    assert known.load([BLOB, KEY]) == {KEY: BLOB}
