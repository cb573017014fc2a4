"""Real S3 servers on free ports of the loopback interface, and a proxy that breaks the connection to them on purpose.

| server        | good for                                                  | not for                                       |
|---------------|-----------------------------------------------------------|-----------------------------------------------|
| `moto_server` | conditions and races on small objects, refused requests   | large objects, which it holds in memory       |
| `swift_server`| large objects, checked uploads, kills, a full disk        | conditions: not atomic, and no `If-Match`     |
| `rclone_server`| a fast server for transfers; the one that must be refused | conditions: it ignores all of them            |

Each is a context manager that yields a `Server` and ends what it started.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECRET = "secret-of-the-tests-0001"


@dataclass(frozen=True, slots=True)
class Server:
    """A running S3 server and one pair of credentials for it."""

    name: str
    endpoint: str
    access_key: str
    secret: str = field(repr=False)
    process: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        """The variables through which every AWS client finds this server and these credentials."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self, service: str = "s3") -> Any:
        """A boto3 client that does not retry, for looking at the server from outside the project's own code."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def new_bucket(self) -> str:
        """A fresh, empty bucket."""
        name = f"b{uuid.uuid4().hex}"
        self.client().create_bucket(Bucket=name)
        return name


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def moto_server(*, strict: bool = True) -> Iterator[Server]:
    """moto, which lets in nobody but the users that were made in its IAM: everyone else gets 403. Not strict: anybody."""
    port = free_port()
    command = [sys.executable, "-m", "tests.moto_atomic", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, port, _MOTO) as process:
        endpoint = f"http://127.0.0.1:{port}"
        anybody = Server("moto", endpoint, "anybody", "anything", process)
        if not strict:
            yield anybody
            return
        key = _new_user(anybody, "s3:*")
        request = urllib.request.Request(
            f"{endpoint}/moto-api/reset-auth", data=b"0", method="POST", headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(request, timeout=10).read()
        yield Server("moto", endpoint, key["AccessKeyId"], key["SecretAccessKey"], process)


_MOTO = {"INITIAL_NO_AUTH_ACTION_COUNT": "1000000"}
"""Nobody is asked who they are until the first user exists."""


def another_user(server: Server, *actions: str) -> Server:
    """The same moto server as seen by a new user whose policy allows only these actions, such as `s3:GetObject`."""
    key = _new_user(server, *actions)
    return Server(server.name, server.endpoint, key["AccessKeyId"], key["SecretAccessKey"], server.process)


def _new_user(server: Server, *actions: str) -> dict[str, str]:
    iam, name = server.client("iam"), f"user-{uuid.uuid4().hex[:8]}"
    iam.create_user(UserName=name)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    # The first user makes the others, and the keys of roles.
    allowed = [*actions, "iam:*", "sts:*"] if "s3:*" in actions else list(actions)
    statement = [{"Effect": "Allow", "Action": allowed, "Resource": "*"}]
    policy = json.dumps({"Version": "2012-10-17", "Statement": statement})
    iam.put_user_policy(UserName=name, PolicyName="allowed", PolicyDocument=policy)
    return key


@contextmanager
def swift_server(folder: Path, *, port: int = 0, reserve: str = "0") -> Iterator[Server]:
    """OpenStack Swift with its S3 API, keeping its files under `folder`, where another one may have left some.

    It takes no object when less than `reserve` (bytes, or a percentage) of the disk would stay free.
    """
    port, key = port or free_port(), "test:tester"
    command = [sys.executable, "-m", "tests.swift_server", str(folder), str(port), key, SECRET, reserve]
    with _running(command, port, {"PYTHONPATH": str(ROOT)}) as process:
        yield Server("swift", f"http://127.0.0.1:{port}", key, SECRET, process)


@contextmanager
def rclone_server(folder: Path) -> Iterator[Server]:
    """`rclone serve s3` over `folder`. It accepts every conditional write."""
    port, key = free_port(), "AKIATESTKEY00001"
    command = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", "--addr", f"127.0.0.1:{port}"]
    # Without the last setting it reads a whole file again for the ETag of every request.
    command += ["--auth-key", f"{key},{SECRET}", "--dir-cache-time", "1s", "--etag-hash", "", str(folder)]
    with _running(command, port, {"RCLONE_CONFIG": str(folder / ".rclone.conf")}) as process:
        yield Server("rclone", f"http://127.0.0.1:{port}", key, SECRET, process)


@contextmanager
def _running(command: list[str], port: int, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    import os

    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **environment}
    )
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command[:4])} ended with status {process.returncode} at its start")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=2)
                break
            except urllib.error.HTTPError:
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.05)
        else:
            raise RuntimeError(f"{' '.join(command[:4])} did not answer on port {port}")
        yield process
    finally:
        process.kill()
        process.wait()
