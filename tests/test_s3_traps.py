"""The known traps of S3 clients and servers: each is shown to be there, and the store is shown not to fall into it.

Where a test speaks of the plain way, that is s3fs used as its documentation suggests, on the same server, with the same
fault. It shows that the test would see the store fail in the same way.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts.backend import open_backend
from artifacts.checkpoints import StoredCheckpoints
from artifacts.errors import Conflict, LeaseLost
from artifacts.keep import pin
from artifacts.lease import Lease
from artifacts.record import payload_key
from artifacts.store import Store, new_record
from artifacts.trail import TRAIL
from tests.conftest import behind_proxy, use
from tests.fault_proxy import Fault, FaultProxy
from tests.servers import ROOT, Server
from tests.transfer import one_file, plain_path, plain_s3fs

KEY = "k" * 64

pytestmark = pytest.mark.usefixtures("pauses")


@pytest.fixture
def moto(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FaultProxy]]:
    """URL of a fresh store on a server with atomic conditions, and the proxy before it."""
    with behind_proxy(s3_server, monkeypatch) as made:
        yield made


def some_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


# Conditions


def test_an_empty_exclusive_create(moto: tuple[str, FaultProxy]) -> None:
    """Creating what exists is refused also when there is nothing to write; the plain way empties the object."""
    url, _ = moto
    backend = open_backend(url)
    backend.put("v1/lock", b"held", if_absent=True)
    with pytest.raises(Conflict):
        backend.put("v1/lock", b"", if_absent=True)
    assert backend.get("v1/lock").data == b"held"
    with plain_s3fs().open(plain_path(url, "v1/lock"), "xb"):
        pass
    assert backend.get("v1/lock").data == b"", "s3fs has no such trap any more"


@pytest.mark.parametrize("kind", ["s3_server", "swift"])
def test_every_servers_refusal_is_one_error(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused create is a Conflict whatever words the server has for it; the plain way has two errors for one thing."""
    url = use(request.getfixturevalue(kind), monkeypatch)
    backend = open_backend(url)
    backend.put("v1/x", b"one", if_absent=True)
    with pytest.raises(Conflict):
        backend.put("v1/x", b"two", if_absent=True)
    with pytest.raises(OSError) as caught:
        plain_s3fs().pipe_file(plain_path(url, "v1/x"), b"two", mode="create")
    assert isinstance(caught.value, FileExistsError) == (kind == "s3_server")


def test_a_conditional_write_is_one_request(moto: tuple[str, FaultProxy], tmp_path: Path) -> None:
    """A condition holds for a large body too, which is never sent in parts; the plain way sends parts and loses it."""
    url, proxy = moto
    backend = open_backend(url)
    first = backend.put("v1/x", b"one")
    backend.put("v1/x", b"two")
    data = some_bytes(12 << 20)
    proxy.clear()
    for condition in ({"if_match": first}, {"if_absent": True}):
        with pytest.raises(Conflict):
            backend.put("v1/x", data, **condition)  # type: ignore[arg-type]
    assert backend.get("v1/x").data == b"two"
    assert [method for method, _ in proxy.log] == ["PUT", "PUT", "GET"]
    (tmp_path / "file").write_bytes(data)
    plain_s3fs().put_file(str(tmp_path / "file"), plain_path(url, "v1/x"), chunksize=5 << 20, IfMatch=first)
    assert backend.size("v1/x") == len(data), "s3fs has no such trap any more"


# Lost replies


def record() -> Any:
    payload = {"algorithm": 1, "stage": "toy", "code": "c", "config": {}, "inputs": {}}
    return new_record(stage="toy", key=payload_key(payload), payload=payload, output="0" * 64, size=1)


def lose(proxy: FaultProxy, part: str) -> Fault:
    """The next reply to a write of such a key gets lost."""
    fault = Fault("lose reply", method="PUT", part=part)
    proxy.add(fault)
    return fault


def test_a_lost_reply_looks_like_a_refusal(moto: tuple[str, FaultProxy]) -> None:
    """Repeating a create whose reply was lost is refused; only its content tells, here as in the plain way."""
    url, proxy = moto
    lose(proxy, "/v1/x")
    with pytest.raises(Conflict):
        open_backend(url).put("v1/x", b"mine", if_absent=True)
    lose(proxy, "/v1/y")
    with pytest.raises(FileExistsError):
        plain_s3fs().pipe_file(plain_path(url, "v1/y"), b"mine", mode="create")


def test_an_own_record_is_recognised(moto: tuple[str, FaultProxy]) -> None:
    """A record whose reply was lost is the writer's own, and that of an earlier winner is still the winner's."""
    url, proxy = moto
    store, mine = Store.open(url), record()
    lost = lose(proxy, "/v1/act/")
    assert store.commit(mine) == mine and lost.times == 0
    lose(proxy, "/v1/act/")
    assert store.commit(record()) == mine


@pytest.mark.parametrize("step", ["acquire", "renew", "release"])
def test_an_own_lease_is_recognised(moto: tuple[str, FaultProxy], step: str) -> None:
    """A lease survives the loss of any reply to its holder, and excludes others all the while."""
    url, proxy = moto
    backend = open_backend(url)
    lease, other = Lease(backend, KEY), Lease(backend, KEY)
    for now in ("acquire", "renew", "renew", "release"):
        lost = lose(proxy, "/v1/lease/") if now == step else None
        assert (lease.try_acquire if now == "acquire" else getattr(lease, now))() in (True, None)
        assert lost is None or lost.times == 0
        if now != "release":
            assert lease.held and not other.try_acquire()
    assert other.try_acquire() and other.fence == 2


@pytest.mark.parametrize("part", ["manifest", "LATEST"])
def test_an_own_checkpoint_is_recognised(moto: tuple[str, FaultProxy], tmp_path: Path, part: str) -> None:
    """Checkpoints go on after the loss of any reply: the newest comes back, and those that fell out are removed."""
    url, proxy = moto
    backend = open_backend(url)
    checkpoints = StoredCheckpoints(backend, KEY, fence=1)
    state = one_file(tmp_path / "state", b"")
    for step in range(1, 5):
        (state / "weights").write_text(str(step))
        lost = lose(proxy, part)
        checkpoints.save(step, state)
        assert lost.times == 0
    (tmp_path / "into").mkdir()
    assert StoredCheckpoints(backend, KEY, fence=2).restore(tmp_path / "into") == 4
    assert (tmp_path / "into" / "weights").read_text() == "4"
    names = {entry.key.split("/")[3] for entry in backend.list("v1/wip/")}
    assert {name[:9] for name in names} == {"LATEST", "000000003", "000000004"}
    lose(proxy, "LATEST")
    StoredCheckpoints(backend, KEY, fence=2).claim()
    with pytest.raises(LeaseLost):
        checkpoints.save(5, state)


def test_an_own_repair_is_recognised(moto: tuple[str, FaultProxy], tmp_path: Path) -> None:
    """Damaged checkpoints and records are withdrawn once although the reply was lost, and a pin is noted as made."""
    url, proxy = moto
    store, backend = Store.open(url), open_backend(url)
    checkpoints = StoredCheckpoints(backend, KEY, fence=1)
    state = one_file(tmp_path / "state", b"one")
    for step in (1, 2):
        checkpoints.save(step, state)
    [newest] = [entry.key for entry in backend.list("v1/wip/") if "/000000002-" in entry.key and "files" in entry.key]
    backend.put(newest, b"two")
    lost = [lose(proxy, "LATEST")]
    checkpoints.keep_intact(tmp_path)
    assert not [entry for entry in backend.list("v1/wip/") if "/000000002-" in entry.key]

    mine = record()
    backend.put(f"v1/act/toy/{mine.key}.json", b"damaged")
    lost.append(lose(proxy, "/v1/act/"))
    assert store.withdraw_damaged("toy", mine.key, "test")
    assert store.lookup("toy", mine.key) is None

    tree = store.put_tree(state)
    kept = new_record(stage="toy", key=mine.key, payload=mine.payload, output=tree.digest, size=tree.size)
    store.commit(kept)
    lost.append(lose(proxy, "/v1/pin/"))
    pin(store, "mine", {"toy": kept})
    assert [entry for entry in backend.list(TRAIL)], "a pin is noted"
    assert all(fault.times == 0 for fault in lost)


# Listings, requests, processes


def test_what_others_write_is_seen(moto: tuple[str, FaultProxy]) -> None:
    """After a listing, what another process writes or removes is seen; the plain way answers from its memory for ever."""
    url, _ = moto
    backend, other, plain = open_backend(url), open_backend(url), plain_s3fs()
    backend.put("v1/l/1", b"1")
    assert len(list(backend.list("v1/l/"))) == len(plain.ls(plain_path(url, "v1/l"))) == 1
    other.put("v1/l/2", b"2")
    other.delete("v1/l/1")
    assert backend.sizes(["v1/l/1", "v1/l/2"]) == {"v1/l/1": None, "v1/l/2": 1}
    assert [entry.key for entry in backend.list("v1/l/")] == ["v1/l/2"]
    there = [plain.exists(plain_path(url, f"v1/l/{number}")) for number in (1, 2)]
    assert there == [True, False], "s3fs has no such trap any more"


def test_one_request_each(moto: tuple[str, FaultProxy]) -> None:
    """To read, to size and to miss is one request each, also for an object that is not there; the plain way needs two."""
    url, proxy = moto
    backend, plain = open_backend(url), plain_s3fs()
    backend.put("v1/x", b"1")

    def requests(ask: Callable[[], object]) -> dict[str, int]:
        proxy.clear()
        ask()
        return dict(proxy.requests)

    assert requests(lambda: backend.get("v1/x")) == {"GET": 1}
    assert requests(lambda: backend.get_many(["v1/x", "v1/none"])) == {"GET": 2}
    assert requests(lambda: backend.sizes(["v1/x", "v1/none"])) == {"HEAD": 2}
    assert requests(lambda: plain.cat_file(plain_path(url, "v1/x"))) == {"HEAD": 1, "GET": 1}
    assert requests(lambda: plain.exists(plain_path(url, "v1/none"))) == {"HEAD": 1, "GET": 1}


@pytest.mark.parametrize("code", ["NotImplemented", "MissingContentMD5"])
def test_servers_that_cannot_delete_many(moto: tuple[str, FaultProxy], code: str) -> None:
    """Where a server does not take many keys in one request, each is removed by its own; the plain way fails."""
    url, proxy = moto
    backend = open_backend(url)
    keys = [f"v1/d/{number}" for number in range(5)]
    for key in keys:
        backend.put(key, b"1")
    proxy.add(Fault("status", method="POST", part="delete", status=501 if code == "NotImplemented" else 400, code=code))
    proxy.add(Fault("status", method="POST", part="delete", status=501, code=code))
    backend.delete_many(keys[:3])
    assert [entry.key for entry in backend.list("v1/d/")] == keys[3:]
    with pytest.raises(Exception, match="no"):
        plain_s3fs().rm([plain_path(url, key) for key in keys[3:]])
    assert [entry.key for entry in backend.list("v1/d/")] == keys[3:]


FORKED = """
import os, signal, sys
from artifacts.backend import open_backend
backend = open_backend(sys.argv[1])
if sys.argv[2] == "used":
    backend.put("v1/x", b"1")
    backend.get("v1/x")
for again in (False, True):
    if os.fork() == 0:
        signal.alarm(20)
        try:
            (open_backend(sys.argv[1]) if again else backend).get("v1/x")
            print("read", flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.parametrize("parent", ["unused", "used"])
def test_a_forked_process(moto: tuple[str, FaultProxy], parent: str) -> None:
    """A fork of a process that has used S3 is told so at once, instead of waiting for ever; any other fork may use it."""
    url, _ = moto
    open_backend(url).put("v1/x", b"1")
    ended = subprocess.run(
        [sys.executable, "-c", FORKED, url, parent], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert len(said := ended.stdout.splitlines()) == 2, ended.stderr
    for line in said:
        assert line == "read" if parent == "unused" else line.startswith("StoreError") and "forked" in line
