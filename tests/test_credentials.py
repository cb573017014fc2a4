"""Where credentials may come from: a profile, a container's role whose keys are renewed, or nowhere, which is one clear error."""

from __future__ import annotations

import json
import threading
import traceback
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from artifacts import retry
from artifacts.backend import Backend, open_backend
from artifacts.errors import StoreUnavailable
from artifacts.parts import PART_BYTES
from artifacts.store import Store
from tests.servers import Server

TRUST = {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}
EVERYTHING = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without AWS settings; no file of this machine's and no network is asked for any."""
    import os

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)


class Role:
    """A container's role: a server on the loopback interface that gives out keys, and a bucket that they open."""

    def __init__(self, server: Server, lasts: timedelta) -> None:
        self._server = server
        self.lasts = lasts
        self.asked = 0
        self.secrets: list[str] = []
        self.status = 200
        self.renew()
        role = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                role.asked += 1
                expires = (datetime.now(UTC) + role.lasts).strftime("%Y-%m-%dT%H:%M:%SZ")
                body = json.dumps({**role._keys, "Expiration": expires}).encode()
                self.send_response(role.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/role"

    def renew(self) -> None:
        """From now on other keys are given out, and only those are good."""
        iam, sts, name = self._server.client("iam"), self._server.client("sts"), f"role-{uuid.uuid4().hex[:8]}"
        document = {"Version": "2012-10-17", "Statement": [TRUST]}
        arn = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(document))["Role"]["Arn"]
        allowed = json.dumps({"Version": "2012-10-17", "Statement": [EVERYTHING]})
        iam.put_role_policy(RoleName=name, PolicyName="allowed", PolicyDocument=allowed)
        keys = sts.assume_role(RoleArn=arn, RoleSessionName="tests")["Credentials"]
        if self.secrets:
            iam.delete_role_policy(RoleName=self._name, PolicyName="allowed")
        self._name = name
        self._keys = {
            "AccessKeyId": keys["AccessKeyId"],
            "SecretAccessKey": keys["SecretAccessKey"],
            "Token": keys["SessionToken"],
        }
        self.secrets += self._keys.values()


@pytest.fixture(params=[4, 60], ids=["soon", "later"])
def role(request: pytest.FixtureRequest, s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Role]:
    """A role whose keys are good for so many minutes; the environment names it and the server."""
    made = Role(s3_server, timedelta(minutes=request.param))
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", made.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield made
    made.http.shutdown()
    made.http.server_close()


def everything(backend: Backend, folder: Path) -> None:
    """Every way that a store asks the server for something."""
    folder.mkdir()
    (folder / "file").write_bytes(bytes(PART_BYTES) + b"1")
    etag = backend.put("v1/x", b"one")
    backend.put("v1/x", b"two", if_match=etag)
    backend.put_file("v1/cas/x", folder / "file")
    assert backend.get("v1/x").data == b"two"
    assert backend.get_file("v1/cas/x", folder / "copy", size=PART_BYTES + 1)
    assert backend.sizes(["v1/x", "v1/none"]) == {"v1/x": 3, "v1/none": None}
    assert {"v1/x", "v1/cas/x"} == {entry.key for entry in backend.list("v1/")}
    assert backend.sweep(0.0) == []
    backend.delete_many(["v1/x"])
    backend.delete("v1/cas/x")


def said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def test_a_profile(s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in a shared credentials file and the server's address in the config file are enough to use and probe a store."""
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = AKIADEFAULT\naws_secret_access_key = wrong-default-secret\n"
        f"[lab]\naws_access_key_id = {s3_server.access_key}\naws_secret_access_key = {s3_server.secret}\n"
    )
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint}\n")
    url = f"s3://{s3_server.new_bucket()}/studies"
    monkeypatch.setenv("AWS_PROFILE", "lab")
    everything(open_backend(url), tmp_path / "folder")
    Store.open(url).probe()


def test_a_role(role: Role, s3_server: Server, tmp_path: Path) -> None:
    """Keys of a container's role open the store. They are asked for when they end soon, and not for every request."""
    backend = open_backend(f"s3://{s3_server.new_bucket()}/studies")
    everything(backend, tmp_path / "folder")
    before = role.asked
    assert before >= 1
    for number in range(20):
        backend.put(f"v1/{number}", b"1")
        backend.get(f"v1/{number}")
    if role.lasts > timedelta(minutes=15):
        assert role.asked == before
    else:
        assert role.asked > before


@pytest.mark.parametrize("role", [4], indirect=True, ids=["soon"])
def test_keys_that_are_renewed(role: Role, s3_server: Server, tmp_path: Path) -> None:
    """A store that is open uses the renewed keys for every kind of request as soon as the old ones are near their end."""
    backend = open_backend(f"s3://{s3_server.new_bucket()}/studies")
    for number in range(3):
        everything(backend, tmp_path / str(number))
        role.renew()


ATTEMPTS = {
    "get": lambda backend: backend.get("v1/x"),
    "get_many": lambda backend: backend.get_many(["v1/x", "v1/y"]),
    "sizes": lambda backend: backend.sizes(["v1/x"]),
    "list": lambda backend: list(backend.list("v1/")),
    "put": lambda backend: backend.put("v1/x", b"1", if_absent=True),
    "delete": lambda backend: backend.delete("v1/x"),
    "sweep": lambda backend: backend.sweep(0.0),
}  # fmt: skip


@pytest.mark.parametrize("verb", ATTEMPTS)
def test_no_credentials(s3_server: Server, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials anywhere there is one error, whatever is asked first, and it says what to set."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    backend = open_backend(f"s3://{s3_server.new_bucket()}/studies")
    with pytest.raises(StoreUnavailable, match="there are no AWS credentials; set AWS_ACCESS_KEY_ID.*or AWS_PROFILE"):
        ATTEMPTS[verb](backend)


@pytest.mark.parametrize("verb", ATTEMPTS)
@pytest.mark.parametrize(
    "trouble", ["no such profile", "withdrawn", "expired", "refused", "expired later", "refused later"]
)
def test_bad_credentials(s3_server: Server, trouble: str, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown profile, keys that were withdrawn, that have expired, or that the role's server refuses to give: one
    error that says where to look, and nothing secret in it or in what it came from."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    url, secrets = f"s3://{s3_server.new_bucket()}/studies", []
    role: Any = None
    if trouble == "no such profile":
        monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    else:
        minutes = -1 if trouble == "expired" else 4 if trouble.endswith("later") else 60
        role = Role(s3_server, timedelta(minutes=minutes))
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", role.url)
        secrets = role.secrets
    backend = open_backend(url)
    if trouble == "withdrawn" or trouble.endswith("later"):
        backend.put("v1/x", b"1")
        backend.get("v1/x")
        backend.delete("v1/x")
    if trouble == "withdrawn":
        role.renew()
    elif trouble == "expired later":
        role.lasts = timedelta(minutes=-1)
    elif trouble.startswith("refused"):
        role.status = 403
    with pytest.raises(StoreUnavailable, match="AWS_PROFILE|AWS_ACCESS_KEY_ID") as caught:
        ATTEMPTS[verb](backend)
    assert not [secret for secret in secrets if secret in said(caught.value)]
    if role is not None:
        role.http.shutdown()
        role.http.server_close()
