"""Large transfers to and from S3 that are killed, cut and interrupted: what is visible is whole, and the rest is swept.

Beside most of them stands what s3fs by itself does on the same server with the same fault, which shows that the test would
see the store fail in the same way.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest

from artifacts import retry
from artifacts.backend import open_backend
from artifacts.collect import collect
from artifacts.digest import digest_bytes, digest_file
from artifacts.errors import Damaged, NotFound, StoreError, StoreUnavailable
from artifacts.parts import BUFFERS, PART_BYTES, Part, Transfer, split
from artifacts.s3 import GET_PART_BYTES
from artifacts.store import Store
from artifacts.trees import object_key
from flows import doctor
from tests.conftest import behind_proxy, use
from tests.fault_proxy import Fault, FaultProxy
from tests.servers import ROOT, Server
from tests.transfer import one_file, plain_path, plain_s3fs

ALWAYS = 1_000_000
LARGE = 3 * GET_PART_BYTES + 12_345
"""Bytes of an object that is read in four ranges and sent in two parts."""
DATA = random.Random(20).randbytes(LARGE)

pytestmark = pytest.mark.usefixtures("pauses")


@pytest.fixture
def large(swift: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FaultProxy]]:
    """URL of a fresh store on a server for large objects, and the proxy before it."""
    with behind_proxy(swift, monkeypatch) as made:
        yield made


def let_pass(times: int, method: str, part: str) -> Fault:
    """What befalls the first requests of this kind: nothing."""
    return Fault("cut reply", method=method, part=part, times=times, after=1 << 50)


def hold(method: str, part: str) -> Fault:
    """Requests of this kind get no answer."""
    return Fault("hang", method=method, part=part, times=ALWAYS, hang_seconds=120.0)


def seen(proxy: FaultProxy, method: str, part: str) -> int:
    return sum(method == asked and part in path for asked, path in list(proxy.log))


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of `tests.transfer`."""
    command = [sys.executable, "-m", "tests.transfer", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def kill_when(child: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """`kill -9` as soon as `ready`."""
    for _ in range(3000):
        if ready():
            break
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    else:
        raise AssertionError("what was waited for did not happen")
    child.kill()
    assert child.wait() == -signal.SIGKILL


def has_data(path: Path) -> bool:
    """True when bytes have been written to it, whatever its length."""
    return path.exists() and path.stat().st_blocks > 0


def uploads(server: Server, url: str) -> list[str]:
    """Keys of the multipart uploads under way, as the server itself tells."""
    bucket = url.removeprefix("s3://").partition("/")[0]
    return [row["Key"] for row in server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])]


# Reading


def test_a_killed_get(large: tuple[str, FaultProxy], tmp_path: Path) -> None:
    """A reader killed in the middle leaves nothing under a file's name, and the next one gets it right.

    The plain way leaves a file of the full size with the wrong content.
    """
    url, proxy = large
    tree = Store.open(url).put_tree(one_file(tmp_path / "out", DATA))
    name, into = tree.files[0].digest, tmp_path / "into"
    proxy.add(let_pass(2, "GET", "/cas/"), hold("GET", "/cas/"))
    proxy.log.clear()
    with process("get", url, tree.digest, str(into)) as child:
        kill_when(child, lambda: seen(proxy, "GET", "/cas/") > 2 and any(map(has_data, into.rglob("*.part"))))
    assert not (into / "weights").exists()
    [left] = into.rglob("*.part")
    assert digest_file(left) != name, "the reader was killed too late"
    proxy.clear()
    with process("get", url, tree.digest, str(into)) as child:
        assert child.communicate()[0] == "done\n"
    assert digest_file(into / "weights") == name

    proxy.add(let_pass(3, "GET", "/cas/"), hold("GET", "/cas/"))
    target = tmp_path / "plain"
    with process("plain get", url, plain_path(url, object_key("cas", name)), str(target)) as child:
        kill_when(child, lambda: seen(proxy, "GET", "/cas/") > 3 and target.exists())
    assert target.stat().st_size == LARGE and digest_file(target) != name, "s3fs has no such trap any more"


def test_a_get_that_is_cut(large: tuple[str, FaultProxy], tmp_path: Path, pauses: list[float]) -> None:
    """Connections that end in the middle of a range cost those ranges only, and the bytes are right."""
    url, proxy = large
    store = Store.open(url)
    tree = store.put_tree(one_file(tmp_path / "out", DATA))
    for after in (0, 1000, 12_344):  # the last range is short, and may be asked for before the others
        proxy.add(Fault("cut reply", method="GET", part="/cas/", after=after))
    proxy.log.clear()
    store.materialise(tree.digest, tmp_path / "into")
    assert digest_file(tmp_path / "into" / "weights") == tree.files[0].digest
    assert seen(proxy, "GET", "/cas/") == 4 + 3 and len(pauses) == 3


def test_a_get_that_is_cut_again_and_again(large: tuple[str, FaultProxy], tmp_path: Path) -> None:
    """When ranges end early however often they are asked for, that is an error, and nothing is under a file's name.

    The plain way leaves a file of the full size with the wrong content.
    """
    url, proxy = large
    store = Store.open(url)
    tree = store.put_tree(one_file(tmp_path / "out", DATA))
    name, into = tree.files[0].digest, tmp_path / "into"
    proxy.add(Fault("cut reply", method="GET", part="/cas/", times=ALWAYS, after=1 << 20))
    with pytest.raises(StoreUnavailable, match="cannot read"):
        store.materialise(tree.digest, into)
    assert list(into.rglob("*")) == []
    with pytest.raises(Exception):  # noqa: B017 - it is not always the same one
        plain_s3fs().get_file(plain_path(url, object_key("cas", name)), str(tmp_path / "plain"))
    left = tmp_path / "plain"
    assert left.stat().st_size == LARGE and digest_file(left) != name, "s3fs has no such trap any more"


@pytest.mark.parametrize("size", [1000, LARGE])
def test_what_rots_on_the_server(
    rclone: Server, rclone_folder: Path, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One bit that changed on the server's disk is found; the server, and the plain way, hand it out as if it were right."""
    url = use(rclone, monkeypatch)
    store = Store.open(url)
    tree = store.put_tree(one_file(tmp_path / "out", DATA[:size]))
    key = object_key("cas", tree.files[0].digest)
    with open(rclone_folder / plain_path(url, key), "r+b") as file:
        file.seek(size // 2)
        file.write(bytes([DATA[size // 2] ^ 1]))
    with pytest.raises(Damaged, match="does not match its digest"):
        store.materialise(tree.digest, tmp_path / "into")
    assert list((tmp_path / "into").rglob("*")) == []
    plain_s3fs().get_file(plain_path(url, key), str(tmp_path / "plain"))
    assert (tmp_path / "plain").stat().st_size == size and digest_file(tmp_path / "plain") != tree.files[0].digest


# Writing


@pytest.mark.parametrize("size", [20 << 20, LARGE], ids=["one request", "parts"])
def test_a_killed_put(
    large: tuple[str, FaultProxy], swift: Server, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer killed in the middle leaves nothing under the key; what lies about is told, swept, and then is gone."""
    url, proxy = large
    folder, backend = one_file(tmp_path / "out", DATA[:size]), open_backend(url)
    key = object_key("cas", digest_bytes(DATA[:size]))
    parts = size > PART_BYTES
    if parts:
        # The second part may arrive first, so either may.
        proxy.add(let_pass(1, "PUT", "partNumber"), hold("PUT", "partNumber"))
    else:
        proxy.bytes_per_second = 8 << 20
    with process("put", url, "-", str(folder)) as child:
        kill_when(
            child,
            lambda: seen(proxy, "PUT", "partNumber") > 1 and _arrived(swift, url) if parts else proxy.bytes_in > 0,
        )
    proxy.bytes_per_second = 0.0
    assert uploads(swift, url) == ([f"studies/{key}"] if parts else [])
    assert backend.size(key) is None and not list(backend.list("v1/cas/"))
    with pytest.raises(NotFound):
        backend.get(key)
    proxy.clear()
    assert backend.sweep(3600.0) == [], "it may be somebody's who still works"
    told = backend.sweep(0.0, dry_run=True)
    assert [entry.key for entry in told] == [key] * parts and all(0 < entry.size < size for entry in told)
    assert len(uploads(swift, url)) == parts
    assert backend.sweep(0.0) == told and uploads(swift, url) == [] and backend.sweep(0.0) == []
    with process("put", url, "-", str(folder)) as child:
        assert child.communicate()[0] == "done\n"
    assert backend.get_file(key, tmp_path / "copy") == digest_bytes(DATA[:size])


def _arrived(server: Server, url: str) -> bool:
    """True when a part of an upload is on the server."""
    bucket, client = url.removeprefix("s3://").partition("/")[0], server.client()
    return any(
        client.list_parts(Bucket=bucket, Key=row["Key"], UploadId=row["UploadId"]).get("Parts")
        for row in client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    )


def test_commands_find_an_orphan(s3_server: Server, s3_url: str) -> None:
    """`doctor` tells of unfinished uploads, `gc` counts them when asked to change nothing, and aborts them otherwise."""
    store, bucket, client = Store.open(s3_url), s3_url[5:].partition("/")[0], s3_server.client()
    for name in ("studies/v1/cas/aa/x", "elsewhere/x"):
        upload = client.create_multipart_upload(Bucket=bucket, Key=name)["UploadId"]
        client.upload_part(Bucket=bucket, Key=name, UploadId=upload, PartNumber=1, Body=bytes(1000))

    def leftovers() -> Any:
        return next(check for check in doctor.examine_all(s3_url) if check.name == "leftovers")

    # This server gives every upload the same date, which is long ago.
    assert leftovers().status == "warning" and "1 unfinished" in leftovers().seen and "1,000" in leftovers().seen
    assert collect(store, dry_run=True).leftovers["unfinished uploads"].bytes == 1000
    assert len(uploads(s3_server, s3_url)) == 2
    assert collect(store).leftovers["unfinished uploads"].objects == 1
    assert uploads(s3_server, s3_url) == ["elsewhere/x"] and leftovers().status == "ok"


def test_an_aborted_upload_is_told_though_the_reply_was_lost(
    s3_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second request finds no upload any more: the first one removed it, and that is part of the report."""
    client = s3_server.client()
    with behind_proxy(s3_server, monkeypatch) as (url, proxy):
        bucket, prefix = url.removeprefix("s3://").split("/", 1)
        upload = client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/v1/cas/aa/x")["UploadId"]
        client.upload_part(Bucket=bucket, Key=f"{prefix}/v1/cas/aa/x", UploadId=upload, PartNumber=1, Body=bytes(1000))
        proxy.add(Fault("lose reply", method="DELETE", part="uploadId"))
        [entry] = Store.open(url).backend.sweep(0.0)
        assert (entry.key, entry.size) == ("v1/cas/aa/x", 1000) and seen(proxy, "DELETE", "uploadId") == 2
        assert uploads(s3_server, url) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_put(
    large: tuple[str, FaultProxy], swift: Server, error: type[BaseException], tmp_path: Path
) -> None:
    """A writer that is stopped, by a person too, publishes nothing and leaves no upload behind.

    The plain way publishes the beginning of the file, because leaving the block closes it.
    """
    url, _ = large
    backend = open_backend(url)

    def stop(moved: int) -> None:
        raise error

    (tmp_path / "file").write_bytes(DATA)
    with pytest.raises(error):
        backend.put_file("v1/x", tmp_path / "file", progress=stop)
    assert backend.size("v1/x") is None and uploads(swift, url) == []
    with pytest.raises(error), plain_s3fs().open(plain_path(url, "v1/x"), "wb") as file:
        file.write(DATA[:1000])
        raise error
    assert backend.size("v1/x") == 1000, "s3fs has no such trap any more"


@pytest.mark.parametrize("size", [1000, LARGE])
def test_a_file_that_shrinks(large: tuple[str, FaultProxy], swift: Server, size: int, tmp_path: Path) -> None:
    """A file that becomes shorter while it is stored publishes nothing."""
    url, _ = large
    backend = open_backend(url)
    (tmp_path / "file").write_bytes(DATA[: size - 1])
    with pytest.raises(StoreError, match="became shorter"):
        backend.put_file("v1/x", tmp_path / "file", size=size)
    assert backend.size("v1/x") is None and uploads(swift, url) == []


def test_a_lost_reply_to_a_beginning(large: tuple[str, FaultProxy], swift: Server, tmp_path: Path) -> None:
    """When the reply to the beginning of an upload is lost, it is begun again; the nameless first one is swept."""
    url, proxy = large
    backend = open_backend(url)
    (tmp_path / "file").write_bytes(DATA)
    proxy.add(Fault("lose reply", method="POST", part="uploads"))
    backend.put_file("v1/x", tmp_path / "file")
    assert backend.get_file("v1/x", tmp_path / "copy") == digest_bytes(DATA)
    assert uploads(swift, url) == ["studies/v1/x"]
    assert [entry.size for entry in backend.sweep(0.0)] == [0] and uploads(swift, url) == []
    assert backend.get_file("v1/x", tmp_path / "copy") == digest_bytes(DATA)


@pytest.mark.parametrize("times", [1, ALWAYS])
def test_an_error_with_status_200(
    large: tuple[str, FaultProxy], swift: Server, times: int, tmp_path: Path, pauses: list[float]
) -> None:
    """The end of an upload may fail with status 200 and the error in the body; it is tried again, and never taken for success."""
    url, proxy = large
    backend = open_backend(url)
    (tmp_path / "file").write_bytes(DATA)
    proxy.add(Fault("status", status=200, code="InternalError", method="POST", part="uploadId", times=times))
    if times == 1:
        backend.put_file("v1/x", tmp_path / "file")
        assert backend.get_file("v1/x", tmp_path / "copy") == digest_bytes(DATA)
    else:
        with pytest.raises(StoreUnavailable, match="InternalError"):
            backend.put_file("v1/x", tmp_path / "file")
        assert backend.size("v1/x") is None
    assert len(pauses) == (1 if times == 1 else retry.PATIENT.attempts - 1) and uploads(swift, url) == []


def test_a_slow_part_holds_up_no_other() -> None:
    """While the first part of an upload is on its way, all the others are sent, though there are more than buffers."""
    parts, last = split(2 * BUFFERS * 100, 100), threading.Event()

    def send(index: int, part: Part, buffer: mmap) -> int:
        if index == len(parts) - 1:
            last.set()
        assert index or last.wait(30.0), "the last part was never sent"
        return index

    sent = Transfer(parts, send, lambda part, index: (part, index), kept=False).run()
    assert sent == [(part, index) for index, part in enumerate(parts)]
