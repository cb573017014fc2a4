"""Keeping credentials out of logs and of the errors that errors came from.

The clients of object stores log whole requests, with access key and session token, once somebody turns debug logs on; and
a server's refusal may repeat what it was sent. So in a process that opens such a store every log record is looked through
as it is made, whatever logger and handler it goes to, and an error is passed on as a cause only if it holds no credential.
"""

from __future__ import annotations

import logging
import os
import re
from base64 import b64encode
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

CLIENTS = ("botocore", "aiobotocore", "boto3", "s3transfer", "urllib3", "aiohttp", "s3fs", "fsspec", "obstore")
"""Loggers of clients, whose debug records show requests."""
VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
HIDDEN = "[hidden]"
_USER = re.compile(r"(://)[^/\s@'\"]+@")
_known: set[str] = set()
_guarded = False


def remember(*secrets: str | None) -> None:
    """Hide these values too, wherever they came from: a profile, an instance's role."""
    _known.update(secret for secret in secrets if secret and len(secret) >= 8)


def redact(text: str) -> str:
    """`text` without credentials: those known, those in the environment, and user and password of any URL."""
    here = {os.environ.get(name) or "" for name in VARIABLES} | set(_passwords())
    for secret in sorted(_known | {value for value in here if len(value) >= 8}, key=len, reverse=True):
        for form in {secret, quote(secret, safe="")}:
            text = text.replace(form, HIDDEN)
    return _USER.sub(rf"\1{HIDDEN}@", text)


def _passwords() -> Iterator[str]:
    """Passwords in the addresses of proxies and endpoints, as they are and as a header holds them."""
    for name, value in os.environ.items():
        if "@" in value and (name.lower().endswith("_proxy") or name.startswith("AWS_ENDPOINT_URL")):
            user = value.partition("://")[2].rpartition("@")[0]
            yield from (user, user.partition(":")[2], b64encode(unquote(user).encode()).decode())


class Redacted(Exception):
    """Stands for an error of a client whose text held a credential."""

    response: dict[str, Any]
    """Status and code of the server's reply, in botocore's form, where the error had them."""


def harmless(error: BaseException) -> BaseException:
    """`error` if neither it nor what it came from holds a credential, else what may be said of it; for `raise ... from`."""
    text = "\n".join(_said(error, set()))
    if redact(text) == text:
        return error
    hidden = Redacted(redact(f"{type(error).__name__}: {error}"))
    if isinstance(response := getattr(error, "response", None), dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = response.get("Error", {}).get("Code")
        hidden.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}
    return hidden


def _said(error: BaseException | None, seen: set[int]) -> Iterator[str]:
    """What a traceback of `error` would print of it, of what it came from and of what it holds."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield from (str(error), repr(error.args), *getattr(error, "__notes__", ()))
    members = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for other in (error.__cause__, error.__context__, *members):
        yield from _said(other, seen)


def guard_logs() -> None:
    """From now on no log record of this process holds a credential."""
    global _guarded
    if _guarded:
        return
    _guarded = True
    make = logging.getLogRecordFactory()

    def guarded(*arguments: Any, **keywords: Any) -> logging.LogRecord:
        record = make(*arguments, **keywords)
        if record.levelno < logging.INFO and record.name.partition(".")[0] in CLIENTS:
            record.msg, record.args = f"{record.funcName}: not shown, as it may hold credentials", None
            return record
        try:
            text = record.getMessage()
        except Exception:  # noqa: BLE001 - a malformed record is its handler's to report
            return record
        if (clean := redact(text)) != text:
            record.msg, record.args = clean, None
        if record.exc_info and (error := record.exc_info[1]) is not None and (hidden := harmless(error)) is not error:
            record.exc_info, record.exc_text = None, str(hidden)
        return record

    logging.setLogRecordFactory(guarded)
