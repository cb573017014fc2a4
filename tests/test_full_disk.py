"""A disk that is full: of the store, of its server, of the scratch folder. One clear error, nothing torn, and then it goes on."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from artifacts import retry
from artifacts.digest import digest_file
from artifacts.errors import StoreUnavailable
from artifacts.store import Store
from flows.graph import Graph, Node
from tests import toy_stages as toys
from tests.command import environment
from tests.conftest import use
from tests.limited import published
from tests.servers import free_port, swift_server
from tests.stage_runner import contents
from tests.toy_study import run
from tests.watched_stage import WatchedConfig, watched
from tests.worker_processes import need_nobody, notes_in, spec_of, undisturbed, wait_until, workers

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, int], None]]:
    """`small_disk(folder, bytes)` makes a folder a file system of that size, or changes its size."""
    mounted: list[Path] = []

    def make(folder: Path, size: int) -> None:
        folder.mkdir(exist_ok=True)
        options = ["-o", f"remount,size={size}"] if folder in mounted else ["-t", "tmpfs", "-o", f"size={size}"]
        done = subprocess.run(["mount", *options, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this user may not mount a small file system: {done.stderr.strip()}")
        mounted.append(folder)

    try:
        yield make
    finally:
        for folder in set(mounted):
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A small file, 3 MiB of noise, and a model in parts that are packed to half their size."""
    rng, folder = random.Random(1), tmp_path / "output"
    folder.mkdir()
    (folder / "a.txt").write_text("small")
    (folder / "noise").write_bytes(rng.randbytes(3 * MIB))
    noise, size = rng.randbytes(2 * MIB), 4 * MIB
    header = {
        name: {"dtype": "BF16", "shape": [size // 2], "data_offsets": [n * size, (n + 1) * size]}
        for n, name in enumerate("ab")
    }
    text = json.dumps(header).encode()
    tensor = bytes(byte for pair in zip(noise, bytes([60]) * len(noise), strict=True) for byte in pair)
    (folder / "weights.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + tensor + tensor[::-1])
    return folder


def limited(limit: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A process that may write files of at most `limit` bytes."""
    command = [sys.executable, "-m", "tests.limited", str(limit), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)


def blobs(store: Path) -> dict[str, int]:
    """Every blob, which has to be whole, with the inode of its file."""
    found = [path for path in (store / "v1" / "cas").rglob("*") if path.is_file()]
    assert [path.name for path in found if digest_file(path) != path.name] == []
    return {path.name: path.stat().st_ino for path in found}


@pytest.mark.parametrize("kind", ["file limit", "small file system"])
def test_store_fills_up(kind: str, output: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The upload ends with one error that names store and reason; what was whole stays, and is not sent again."""
    url = tmp_path / "store"
    if kind == "file limit":
        done = limited(2 * MIB + 500_000, "put", url, output)
        assert done.returncode == 1 and done.stderr == "", done.stderr
        said = done.stdout
    else:
        request.getfixturevalue("small_disk")(url, 4 * MIB)
        with pytest.raises(StoreUnavailable) as error:
            published(Store.open(str(url)), output)
        said = f"StoreUnavailable: {error.value}\n"
    assert said.startswith("StoreUnavailable: ") and said.count("\n") == 1 and str(url) in said
    assert "File too large" in said or "No space left" in said
    assert "free space" in said
    kept = blobs(url)
    assert kept and not list(url.glob("v1/tree/*/*")) and not list(url.glob("v1/act/*/*"))
    assert [path for path in (url / ".tmp").iterdir() if path.suffix != ".lock"] == []
    if kind == "small file system":
        request.getfixturevalue("small_disk")(url, 64 * MIB)
    record = published(Store.open(str(url)), output)
    assert kept.items() <= blobs(url).items()
    Store.open(str(url)).materialise(record.output, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(output) and need_nobody(Store.open(str(url))) == 0


@pytest.mark.parametrize("backend", ["local", "s3"])
def test_no_room_to_read(backend: str, output: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Reading onto a full disk is an error of that disk, never damage of the store; nothing torn has its final name."""
    url = str(tmp_path / "store") if backend == "local" else request.getfixturevalue("s3_url")
    record = published(Store.open(url), output)
    into = tmp_path / "into"
    # In the middle of the first packed part, of a later one, and of a plain file where that is not a link.
    for limit in (1 * MIB, 5 * MIB, 8 * MIB - 1000):
        done = limited(limit, "get", url, record.output, into)
        assert done.returncode == 1 and done.stderr == "", done.stderr
        assert done.stdout.startswith("StoreUnavailable: ") and str(into) in done.stdout and "free space" in done.stdout
        there = contents(into)
        assert "weights.safetensors" not in there and there.items() <= contents(output).items()
    assert limited(0, "get", url, record.output, into).stdout.strip() == record.output
    assert contents(into) == contents(output)


@pytest.mark.slow
def test_full_store_keeps_the_finished_output(tmp_path: Path, small_disk: Callable[[Path, int], None]) -> None:
    """A worker whose store is full keeps the output; once there is room the rerun stores it without running the body."""
    url, notes = tmp_path / "store", notes_in(tmp_path / "notes")
    small_disk(url, 4 * MIB)
    config = WatchedConfig(notes=str(notes.folder), size=6 * MIB)
    spec = spec_of(str(url), config, tmp_path / "scratch")
    with workers(tmp_path / "workers") as started:
        worker = started.start(spec)
        last = worker.ended()
        assert (last["event"], last["kind"]) == ("failed", "StoreUnavailable"), last
        assert "No space left" in last["message"] and "published on retry" in last["message"]
        assert blobs(url) == {} or all(blobs(url))
        assert Store.open(str(url)).lookup("watched", spec.key) is None
        small_disk(url, 64 * MIB)
        done = started.start(spec).ended()
    assert (done["event"], done["output"]) == ("done", undisturbed(config, tmp_path))
    assert len(notes.lines("start")) == 1 and not list((tmp_path / "scratch").iterdir())
    assert need_nobody(Store.open(str(url))) == 1


def test_room_is_made_while_a_worker_tries(tmp_path: Path, small_disk: Callable[[Path, int], None]) -> None:
    """A worker that finds the store full tries again, and ends well when somebody makes room meanwhile."""
    url, notes = tmp_path / "store", notes_in(tmp_path / "notes")
    small_disk(url, 4 * MIB)
    config = WatchedConfig(notes=str(notes.folder), size=6 * MIB)
    with workers(tmp_path / "workers") as started:
        worker = started.start(spec_of(str(url), config, tmp_path / "scratch"))
        wait_until(lambda: "trying again" in worker.logged(), "the store is full")
        small_disk(url, 64 * MIB)
        done = worker.ended()
    assert (done["event"], done["output"]) == ("done", undisturbed(config, tmp_path)), done
    assert len(notes.lines("start")) == 1 and need_nobody(Store.open(str(url))) == 1


def test_full_scratch_reruns_nothing(tmp_path: Path, small_disk: Callable[[Path, int], None]) -> None:
    """A stage whose input does not fit on the scratch disk fails and says so; the input's record stands; then it runs alone."""
    notes, store = notes_in(tmp_path / "notes"), Store.open(str(tmp_path / "store"))
    scratch = tmp_path / "small"
    graph = Graph()
    graph.add(Node(name="big", stage=watched, config=WatchedConfig(notes=str(notes.folder), size=6 * MIB)))
    alone = run(graph, store, tmp_path / "scratch")
    graph.add(Node(name="below", stage=toys.constant, config=toys.TextConfig(), inputs={"above": "big"}))
    small_disk(scratch, 3 * MIB)
    failed = run(graph, store, scratch)
    assert "No space left" in failed.failures["below"] and str(scratch) in failed.failures["below"]
    assert not failed.outcomes["big"].executed and store.lookup("watched", alone.outcomes["big"].key) is not None
    small_disk(scratch, 64 * MIB)
    again = run(graph, store, scratch)
    assert {name for name, outcome in again.outcomes.items() if outcome.executed} == {"below"} and not again.failures
    assert len(notes.lines("start")) == 1
    need_nobody(store)


def test_full_server(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without room (507 inside, 503 outside) costs an error; once it has room, only the rest travels."""
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    port = free_port()
    with swift_server(tmp_path / "swift", port=port) as server:
        store = Store.open(use(server, monkeypatch))
        (tmp_path / "first").mkdir()
        (tmp_path / "first" / "noise").write_bytes((output / "noise").read_bytes())
        kept = store.put_tree(tmp_path / "first")
    with swift_server(tmp_path / "swift", port=port, reserve="100%"):
        with pytest.raises(StoreUnavailable, match="HTTP 50[0-9]") as error:
            published(store, output)
        assert store.backend.url in str(error.value) and "\n" not in str(error.value)
        store.materialise(kept.digest, tmp_path / "kept")
        assert not list(store.backend.list("v1/act/"))
    with swift_server(tmp_path / "swift", port=port):
        before = {entry.key: entry.modified for entry in store.backend.list("v1/cas/")}
        record = published(store, output)
        after = {entry.key: entry.modified for entry in store.backend.list("v1/cas/")}
        assert before and before.items() <= after.items() and len(after) > len(before)
        store.materialise(record.output, tmp_path / "back")
        assert contents(tmp_path / "back") == contents(output)
