"""A server that goes away for half a minute in the middle of an upload, and comes back: the upload completes, nothing reruns."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from artifacts.audit import verify
from artifacts.store import Store
from tests.conftest import use
from tests.fault_proxy import FaultProxy
from tests.servers import Server, free_port, swift_server
from tests.watched_stage import WatchedConfig
from tests.worker_processes import need_nobody, notes_in, spec_of, undisturbed, wait_until, workers

pytestmark = pytest.mark.slow
AWAY = 30.0
"""Seconds."""
MIB = 1 << 20


def stored_bytes(folder: Path) -> int:
    """Bytes of all files below a folder that others write in."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_server_is_killed_and_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of the server while a worker uploads 192 MiB to it, and a new one on its port and files after 30 s."""
    notes, port = notes_in(tmp_path / "notes"), free_port()
    config = WatchedConfig(notes=str(notes.folder), size=192 * MIB)
    with swift_server(tmp_path / "swift", port=port) as server, workers(tmp_path / "workers") as started:
        url = use(server, monkeypatch)
        # This server has no compare-and-swap: nothing may have to be swapped, neither beats nor checkpoints.
        worker = started.start(
            spec_of(url, config, tmp_path / "scratch", time_to_live=3600.0, checkpoint_seconds=3600.0)
        )
        wait_until(lambda: stored_bytes(tmp_path / "swift" / "srv") > 40 * MIB, "a part of it is there")
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        assert worker.process.poll() is None
        time.sleep(AWAY)
        assert worker.process.poll() is None
        with swift_server(tmp_path / "swift", port=port):
            done = worker.ended()
            assert (done["event"], done.get("executed")) == ("done", True), done
            store = Store.open(url)
            assert done["output"] == undisturbed(config, tmp_path) and len(notes.lines("start")) == 1
            assert verify(store).ok and store.backend.sweep(0.0) == []


def test_commit_outlives_an_outage(s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose store goes away while it commits its small output ends well by itself, without running the body again."""
    notes = notes_in(tmp_path / "notes")
    config = WatchedConfig(notes=str(notes.folder), gate=7)
    with FaultProxy(s3_server.endpoint) as proxy, workers(tmp_path / "workers") as started:
        url = use(s3_server, monkeypatch)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        worker = started.start(spec_of(url, config, tmp_path / "scratch"))
        wait_until(lambda: notes.lines("saved")[6:], "the body is at the gate")
        # Slow enough that the outage begins before the end.
        proxy.latency = 0.2
        notes.open_gate()
        wait_until(lambda: notes.lines("end"), "the body ends")
        proxy.down()
        time.sleep(AWAY)
        assert worker.process.poll() is None
        proxy.latency = 0.0
        proxy.up()
        done = worker.ended()
        assert (done["event"], done.get("executed")) == ("done", True), done
        assert done["output"] == undisturbed(config, tmp_path) and len(notes.lines("start")) == 1
        assert notes.steps() == list(range(1, config.steps + 1))
        assert need_nobody(Store.open(url)) == 1
