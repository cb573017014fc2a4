"""Errors are not misses: a store that fails is asked again a bounded number of times, then an error, and nothing reruns."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from artifacts import retry, s3_client
from artifacts.backend import Backend, open_backend
from artifacts.checkpoints import StoredCheckpoints
from artifacts.digest import digest_file
from artifacts.errors import Conflict, NotFound, StoreError, StoreUnavailable
from artifacts.lease import Lease
from artifacts.parts import PART_BYTES
from artifacts.record import payload_key
from artifacts.s3 import GET_PART_BYTES
from artifacts.store import Store, new_record
from tests import toy_study
from tests.conftest import use
from tests.fault_proxy import Fault, FaultProxy
from tests.servers import Server, another_user

PAYLOAD = {"algorithm": 1, "stage": "toy", "code": "c", "config": {}, "inputs": {}}
KEY = payload_key(PAYLOAD)
ALWAYS = 1_000_000


@pytest.fixture
def proxy(s3_server: Server, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> Iterator[FaultProxy]:
    """A proxy before the moto server."""
    with FaultProxy(s3_server.endpoint) as made:
        yield made


@pytest.fixture
def backend(s3_server: Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A fresh store on the server behind the proxy."""
    url = use(s3_server, monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    return open_backend(url)


def record() -> object:
    return new_record(stage="toy", key=KEY, payload=PAYLOAD, output="0" * 64, size=1)


VERBS: dict[str, Callable[[Backend, Path], object]] = {
    "get": lambda backend, path: backend.get("v1/x"),
    "get_many": lambda backend, path: backend.get_many(["v1/x"]),
    "size": lambda backend, path: backend.size("v1/x"),
    "sizes": lambda backend, path: backend.sizes(["v1/x"]),
    "list": lambda backend, path: list(backend.list("v1/")),
    "put": lambda backend, path: backend.put("v1/x", b"1"),
    "put_file": lambda backend, path: backend.put_file("v1/x", path),
    "get_file": lambda backend, path: backend.get_file("v1/x", path.with_name("copy"), size=4),
    "delete": lambda backend, path: backend.delete("v1/x"),
    "delete_many": lambda backend, path: backend.delete_many(["v1/x"]),
    "sweep": lambda backend, path: backend.sweep(0.0),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_gives_up(
    backend: Backend, proxy: FaultProxy, pauses: list[float], verb: str, tmp_path: Path
) -> None:
    """Whatever is asked, a server that always fails is asked a fixed number of times; then the error says what to do."""
    (tmp_path / "file").write_text("text")
    proxy.add(Fault("status", status=503, code="SlowDown", times=ALWAYS))
    with pytest.raises(StoreUnavailable, match="HTTP 503.*run the same command again"):
        VERBS[verb](backend, tmp_path / "file")
    patience = retry.PATIENT if verb == "put_file" else retry.BRIEF
    assert len(proxy.log) == patience.attempts and len(pauses) == patience.attempts - 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_recovers(
    backend: Backend, proxy: FaultProxy, pauses: list[float], verb: str, tmp_path: Path
) -> None:
    """Two failures of different kinds, then an answer: the caller notices nothing. Three requests in all."""
    (tmp_path / "file").write_text("text")
    backend.put("v1/x", b"text")
    proxy.log.clear()
    proxy.add(Fault("status", status=500), Fault("lose reply"))
    VERBS[verb](backend, tmp_path / "file")
    resent_by_aiohttp = verb in ("put", "put_file", "delete", "sweep")
    assert len(pauses) == (1 if resent_by_aiohttp else 2) and len(proxy.log) == 3


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=500, times=ALWAYS),
        Fault("status", status=502, times=ALWAYS),
        Fault("status", status=503, code="SlowDown", times=ALWAYS),
        Fault("status", status=429, code="TooManyRequests", times=ALWAYS),
        Fault("cut reply", after=20, times=ALWAYS),
        Fault("lose reply", times=ALWAYS),
        Fault("hang", hang_seconds=0.6, times=ALWAYS),
    ],
    ids=lambda fault: f"{fault.kind} {fault.status}",
)
def test_a_failed_lookup_is_no_miss(
    backend: Backend, proxy: FaultProxy, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that is there, on a server that fails in whatever way, is an error to look up, singly or with others."""
    store = Store(backend)
    store.commit(record())  # type: ignore[arg-type]
    monkeypatch.setattr(s3_client, "READ_SECONDS", 0.2)
    proxy.clear()
    proxy.add(Fault(**{name: getattr(fault, name) for name in Fault.__slots__}))
    for look in (lambda s: s.lookup("toy", KEY), lambda s: s.lookup_many([("toy", KEY), ("toy", "1" * 64)])):
        with pytest.raises(StoreUnavailable):
            look(Store.open(backend.url))
    assert retry.BRIEF.attempts * 2 <= proxy.requests["GET"] <= retry.BRIEF.attempts * 3
    proxy.clear()
    assert store.lookup("toy", KEY) is not None


def test_refused_connections(backend: Backend, proxy: FaultProxy, pauses: list[float]) -> None:
    """A server that is not there is an error, and no miss; when it is back within patience, nothing was noticed."""
    backend.put("v1/x", b"1")
    proxy.down()
    with pytest.raises(StoreUnavailable, match="no connection.*AWS_ENDPOINT_URL"):
        backend.get("v1/x")
    assert len(pauses) == retry.BRIEF.attempts - 1
    proxy.up()
    assert backend.get("v1/x").data == b"1"


@pytest.mark.parametrize("verb", ["get", "get_many", "size", "put", "list", "delete"])
@pytest.mark.parametrize("wrong", ["secret", "key", "policy"])
def test_a_refusal_is_an_answer(
    s3_server: Server,
    backend: Backend,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    wrong: str,
    tmp_path: Path,
) -> None:
    """403, from a real check of secret, key or policy, is asked once, is no miss, and names no secret."""
    backend.put("v1/x", b"1")
    user = another_user(s3_server, "s3:ListAllMyBuckets") if wrong == "policy" else s3_server
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONGKEY00000001" if wrong == "key" else user.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-value" if wrong == "secret" else user.secret)
    proxy.clear()
    with pytest.raises(StoreUnavailable, match="HTTP 403.*AWS_ACCESS_KEY_ID") as caught:
        VERBS[verb](open_backend(backend.url), tmp_path)
    assert len(proxy.log) == 1 and user.secret not in str(caught.value) and "wrong-secret" not in str(caught.value)


@pytest.mark.parametrize("code", ["NoSuchBucket", "", "Page not found"])
def test_a_404_must_name_the_key(backend: Backend, proxy: FaultProxy, code: str) -> None:
    """A 404 that is not about the key, as a wrong address gives, is no miss."""
    proxy.add(Fault("status", status=404, code=code, method="GET"))
    with pytest.raises(StoreUnavailable):
        Store(backend).lookup("toy", KEY)
    with pytest.raises(NotFound):
        backend.get("v1/x")


def test_a_concurrent_write_is_tried_again(backend: Backend, proxy: FaultProxy, pauses: list[float]) -> None:
    """409 means that another conditional write was under way: it is repeated, until the condition decides or it is an error."""
    proxy.add(Fault("status", status=409, code="ConditionalRequestConflict", method="PUT", times=2))
    backend.put("v1/x", b"1", if_absent=True)
    assert proxy.requests["PUT"] == 3 and backend.get("v1/x").data == b"1"
    proxy.add(Fault("status", status=409, code="ConditionalRequestConflict", method="PUT", times=1))
    with pytest.raises(Conflict):
        backend.put("v1/x", b"2", if_absent=True)
    proxy.add(Fault("status", status=409, code="ConditionalRequestConflict", method="PUT", times=ALWAYS))
    with pytest.raises(StoreUnavailable, match="HTTP 409"):
        backend.put("v1/y", b"1", if_absent=True)


def test_a_lost_reply_to_an_own_write(backend: Backend, proxy: FaultProxy, pauses: list[float], tmp_path: Path) -> None:
    """When the reply to a conditional write is lost, its retry is refused, and record and lease find out that it is theirs.

    A checkpoint, whose name nobody else uses, needs no condition.
    """
    proxy.add(Fault("lose reply", method="PUT"))
    with pytest.raises(Conflict):
        backend.put("v1/x", b"1", if_absent=True)
    assert backend.get("v1/x").data == b"1"
    mine = record()
    proxy.add(Fault("lose reply", method="PUT", part="/v1/act/"))
    assert Store(backend).commit(mine) == mine  # type: ignore[arg-type]
    lease = Lease(backend, KEY)
    proxy.add(Fault("lose reply", method="PUT", part="/v1/lease/"))
    assert lease.try_acquire() and lease.held and lease.fence == 1
    proxy.add(Fault("lose reply", method="PUT", part="/v1/lease/"))
    lease.renew()
    proxy.add(Fault("lose reply", method="PUT", part="/v1/lease/"))
    lease.release()
    other = Lease(backend, KEY)
    assert other.try_acquire() and other.fence == 2
    (tmp_path / "state.bin").write_bytes(b"weights")
    proxy.add(Fault("lose reply", method="PUT", part="/manifest.json"))
    StoredCheckpoints(backend, KEY, other.fence).save(3, tmp_path)
    (tmp_path / "back").mkdir()
    assert StoredCheckpoints(backend, KEY, other.fence).restore(tmp_path / "back") == 3


def test_pauses_grow_and_differ(pauses: list[float]) -> None:
    """Pauses double up to a limit, are not all alike for two clients, and add up to half a minute for large parts."""

    def fail() -> None:
        raise ConnectionError

    for _ in range(2):
        with pytest.raises(ConnectionError):
            retry.persist(fail, lambda error: True, retry.PATIENT)
    one, two = pauses[: len(pauses) // 2], pauses[len(pauses) // 2 :]
    assert len(one) == retry.PATIENT.attempts - 1 and one != two
    assert all(0.75 * retry.FIRST_PAUSE * 2**n <= pause for n, pause in enumerate(one[:5]))
    assert max(one) <= retry.LONGEST_PAUSE and 30 < sum(one) < 60


def test_nothing_is_sent_again_after_a_long_standstill(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped between two attempts does not send what may have become wrong meanwhile."""
    now = [0.0]
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(retry, "pause", lambda seconds: now.append(now.pop() + retry.BRIEF.seconds + 1))
    sent = []

    def fail() -> None:
        sent.append(now[0])
        raise ConnectionError

    with pytest.raises(ConnectionError):
        retry.persist(fail, lambda error: True, retry.BRIEF)
    assert sent == [0.0]


def test_a_mistake_is_not_tried_again(pauses: list[float], backend: Backend) -> None:
    """An error in a program is not taken for one of the network."""
    with pytest.raises(TypeError):
        backend.put("v1/x", None)  # type: ignore[arg-type]
    assert not pauses


@pytest.mark.parametrize("fault", ["cut request", "lose reply", "away"])
def test_an_upload_survives_an_outage(
    swift: Server, pauses: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    """A large upload goes on after cut and lost connections, and after the server was away for most of its patience."""
    with FaultProxy(swift.endpoint) as proxy:
        url = use(swift, monkeypatch)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        backend = open_backend(url)
        (tmp_path / "file").write_bytes(bytes(PART_BYTES) + b"1" * PART_BYTES + b"2")

        def wait(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) >= 6:
                proxy.up()

        if fault == "away":
            monkeypatch.setattr(retry, "pause", wait)
            backend.put_file(
                "v1/x", tmp_path / "file", progress=lambda moved: proxy.down() if len(pauses) == 0 else None
            )
        else:
            proxy.add(Fault(fault, method="PUT", part="partNumber=1", after=1 << 20))  # type: ignore[arg-type]
            proxy.add(Fault("lose reply", method="POST", part="uploadId"))
            backend.put_file("v1/x", tmp_path / "file")
        assert pauses and backend.get_file("v1/x", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes()
        assert backend.sweep(0.0) == []


@pytest.mark.parametrize("verb", ["put", "put_file"])
def test_a_large_body_is_sent_again_from_its_start(
    swift: Server, pauses: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    """A body of many pieces, cut in the middle and then refused, arrives whole."""
    data = random.Random(1).randbytes(3 << 20)
    with FaultProxy(swift.endpoint) as proxy:
        url = use(swift, monkeypatch)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        backend = open_backend(url)
        proxy.add(Fault("cut request", method="PUT", after=1 << 20), Fault("status", method="PUT", status=503))
        if verb == "put":
            backend.put("v1/x", data)
        else:
            (tmp_path / "file").write_bytes(b"-" + data + b"-")
            backend.put_file("v1/x", tmp_path / "file", offset=1, size=len(data))
        assert len(pauses) == 2 and backend.get("v1/x").data == data


def test_a_range_is_read_again(
    swift: Server, pauses: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A large object comes whole though the reply to one of its ranges is cut, and another is refused at first."""
    (tmp_path / "file").write_bytes(random.Random(2).randbytes(GET_PART_BYTES + 5))
    with FaultProxy(swift.endpoint) as proxy:
        url = use(swift, monkeypatch)
        open_backend(url).put_file("v1/x", tmp_path / "file")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.add(Fault("cut reply", method="GET", after=2), Fault("status", method="GET", status=503))
        digest = open_backend(url).get_file("v1/x", tmp_path / "copy", size=GET_PART_BYTES + 5)
        assert len(pauses) == 2 and digest == digest_file(tmp_path / "file") == digest_file(tmp_path / "copy")


def test_a_file_that_shrinks(
    swift: Server, pauses: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file that becomes shorter while it is stored is an error that says so, and leaves neither object nor parts."""
    backend, path = open_backend(use(swift, monkeypatch)), tmp_path / "file"
    for size in (2 << 20, PART_BYTES + 1):
        path.write_bytes(bytes(size))
        with pytest.raises(StoreError, match="v1/x.*became shorter"):
            backend.put_file("v1/x", path, size=size + 1)
    assert backend.size("v1/x") is None and backend.sweep(0.0) == [] and not pauses


def test_nothing_reruns(backend: Backend, proxy: FaultProxy, pauses: list[float], tmp_path: Path) -> None:
    """A finished study on a store whose lookups fail plans to an error and runs to an error, and no stage runs again."""
    store, graph = Store(backend), toy_study.toy_graph()
    done = toy_study.run(graph, store, tmp_path / "scratch")
    assert len(toy_study.digests(done)) == len(list(graph))
    proxy.clear()
    proxy.add(Fault("status", status=500, method="GET", part="/v1/act/", times=ALWAYS))
    with pytest.raises(StoreUnavailable):
        toy_study.plan(toy_study.toy_graph(), store)
    before = proxy.requests["PUT"] + proxy.requests["DELETE"]
    with pytest.raises(StoreUnavailable):
        toy_study.run(toy_study.toy_graph(), store, tmp_path / "scratch2")
    assert before == proxy.requests["PUT"] + proxy.requests["DELETE"] == 0
    proxy.clear()
    again = toy_study.run(toy_study.toy_graph(), store, tmp_path / "scratch3")
    assert not any(outcome.executed for outcome in again.outcomes.values())
