"""What an error of an S3 client means: whether it may pass by itself, and which error of the store it is.

Two clients are used, so there are two forms: botocore carries status and code in a response, obstore in its message.
Of either only status, code and the kind of failure go on into a message, never a header or a body.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from artifacts.errors import Conflict, NotFound, NotSupported, StoreError, StoreUnavailable

PASSING_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})
"""409 is how S3 says that another conditional write of the same key was under way: neither of the two answers."""
PASSING_CODES = frozenset({"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"})
NO_KEY = frozenset({"NoSuchKey", "NoSuchUpload", "NotFound", "404", ""})
PASSING_KINDS = frozenset(
    # In botocore; in urllib3, while a body is read; in obstore; in Python itself, of a socket.
    ("HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseStreamingError")
    + ("HTTPError", "GenericError", "OSError")
)
EXPIRED = "refreshed credentials are still expired"
"""What botocore says in a bare RuntimeError, and obstore repeats."""
OBSTORE_STATUS = re.compile(r"status code: (\d{3})")
OBSTORE_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server said. No status: it did not answer, or the connection broke."""

    status: int | None
    code: str


def reply_of(error: Exception) -> Reply:
    """Status and code that the error carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return Reply(int(status) if status else None, str(response.get("Error", {}).get("Code", "")))
    text = str(error) if type(error).__module__.startswith("obstore") or isinstance(error, FileNotFoundError) else ""
    status, code = OBSTORE_STATUS.search(text), OBSTORE_CODE.search(text)
    return Reply(int(status[1]) if status else None, code[1] if code else "")


def may_pass(error: Exception) -> bool:
    """True when the same request may succeed later."""
    reply = reply_of(error)
    if reply.status is not None:
        return reply.status in PASSING_STATUS or reply.code in PASSING_CODES
    return any(kind.__name__ in PASSING_KINDS for kind in type(error).__mro__)


def is_of_client(error: Exception) -> bool:
    """True for an error of the network or the server, false for a mistake in a program."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or module in ("botocore", "obstore", "urllib3") or is_of_credentials(error)


def is_of_credentials(error: Exception) -> bool:
    """True when there was nothing to sign a request with. What whoever gives out keys said may hold some."""
    name = type(error).__name__
    return reply_of(error).status is None and (
        "Credential" in name or name == "UnauthenticatedError" or EXPIRED in str(error)
    )


def is_missing(error: Exception, *, read: bool) -> bool:
    """True when the server said that there is no such object. A `read` must name the key as what is missing.

    A 404 without that comes from something that is no S3 server, or from one without the bucket.
    """
    reply = reply_of(error)
    return reply.status == 404 and (reply.code == "NoSuchKey" if read else reply.code in NO_KEY)


def translate(error: Exception, url: str, key: str, verb: str) -> StoreError:
    """The error of the store for one of a client, with what to do about it and without anything secret."""
    if isinstance(error, StoreError):
        return error
    reply = reply_of(error)
    if reply.status == 412:
        return Conflict(f"{key} in {url} exists or changed since it was read")
    if reply.status == 404 and is_missing(error, read=verb == "read"):
        return NotFound(f"{key} in {url}")
    if reply.code == "NoSuchBucket":
        bucket = url.removeprefix("s3://").partition("/")[0]
        return StoreUnavailable(f"the bucket {bucket!r} of the store {url} does not exist; create it first")
    if reply.status == 501:
        return NotSupported(f"the store {url} does not implement what was asked for {key}")
    reason = f"HTTP {reply.status} {reply.code}".strip() if reply.status else _without_address(error)
    return StoreUnavailable(f"cannot {verb} {key} in the store {url}: {reason}; {_advice(error, reply)}")


def _without_address(error: Exception) -> str:
    """The kind of failure. The message itself may hold a signed address."""
    text = str(error)
    for sign, reason in (
        (EXPIRED, "the credentials have expired and those that were given out instead have, too"),
        ("kind: Connect", "no connection"),
        ("Could not connect", "no connection"),
        ("kind: Timeout", "no answer in time"),
        ("timeout", "no answer in time"),
    ):
        if sign in text:
            return reason
    return type(error).__name__


def _advice(error: Exception, reply: Reply) -> str:
    if reply.code == "RequestTimeTooSkewed":
        return "this machine's clock is wrong: set it"
    if reply.status in (401, 403) or is_of_credentials(error) or "Profile" in type(error).__name__:
        return "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and the bucket's policy"
    if reply.status == 404:
        return "check AWS_ENDPOINT_URL: what answers there does not seem to be an S3 server"
    return "check AWS_ENDPOINT_URL and the network, then run the same command again; nothing was lost"
