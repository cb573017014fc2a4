"""Connecting to S3: the clients of a store, with one set of credentials and settings for all.

s3fs writes small objects, deletes, and begins and ends uploads: its client shows status and code of every reply, which
conditional writes need. It is used below its file objects, which publish torn objects and lose conditions. The bytes of large
objects are sent through botocore, from threads, so that parts are signed side by side and each can be sent again by itself;
obstore's own multipart is no faster. obstore reads, lists and asks for sizes: a small request costs it a tenth of the
processor time, which is what planning a thousand stages consists of, and the ranges of a large object arrive in threads
that do not wait for Python's lock. None of them is asked to try anything again on its own (see `artifacts.retry`);
aiohttp, below s3fs, does send a PUT, GET or DELETE once more when the connection ends without a reply, which the callers of
conditional writes must expect anyway.

Credentials, endpoint and region come from the usual AWS settings, as botocore finds them: environment, profile, instance
role. Where the environment names keys and endpoint, botocore is not even imported for reading.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from artifacts.errors import StoreError, StoreUnavailable
from artifacts.redact import remember

DEFAULT_REGION = "us-east-1"
CONNECT_SECONDS = 5
READ_SECONDS = 60
"""Without a single byte."""
REPLY_SECONDS = 3600
"""For a whole reply, which may be a large part on a slow line. Never needed where a server falls silent."""
AT_ONCE = 128
"""Requests for small objects at once, and connections kept."""
CREDENTIALS_SECONDS = 300
"""obstore asks for the credentials again after this time; botocore renews those that expire."""

SETTINGS: Mapping[str, Any] = {
    "max_pool_connections": AT_ONCE,
    "connect_timeout": CONNECT_SECONDS,
    "read_timeout": READ_SECONDS,
    "retries": {"total_max_attempts": 1, "mode": "standard"},
    # Over http the signature covers the body's SHA-256, over https the connection protects it; more than that is
    # refused by many servers that are not Amazon's.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
"""Of botocore's `Config`, in both of its forms."""


_made_here = False
_unusable = False


def _after_fork() -> None:
    """The threads of the clients are not in a forked process: whatever is asked of one there waits for ever."""
    global _unusable
    _unusable = _unusable or _made_here


os.register_at_fork(after_in_child=_after_fork)


class Connection:
    """The clients for one bucket, each made when first used and shared by all threads.

    Raises:
        StoreUnavailable: when first used, if there are no credentials anywhere.
        StoreError: when used in a process that was forked from one that had used S3.
    """

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self._making = threading.RLock()
        self._made: dict[str, Any] = {}

    @property
    def client(self) -> Any:
        """The botocore client, for the bytes of large objects."""
        return self._once("client", self._new_client)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """One request that is no part of a large object, through s3fs; raises what botocore raises."""
        from fsspec.asyn import sync

        files = self._once("files", self._new_files)
        return sync(files.loop, getattr(files.s3, method), Bucket=self._bucket, **arguments)

    @property
    def reader(self) -> Any:
        """The obstore store; for reading, listing and sizes."""
        return self._once("reader", self._new_reader)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        global _made_here
        if _unusable:
            raise StoreError(
                f"cannot use the bucket {self._bucket!r} in process {os.getpid()}: it was forked from one that had used S3 "
                "before; start it by 'spawn' or 'forkserver', or before a store is used"
            )
        _made_here = True
        if name not in self._made:
            with self._making:
                if name not in self._made:
                    self._made[name] = make()
        return self._made[name]

    def _session(self) -> Any:
        return self._once("session", self._new_session)

    def _new_session(self) -> Any:
        import botocore.session

        session = botocore.session.get_session()
        if (credentials := session.get_credentials()) is None:
            raise StoreUnavailable(
                f"cannot use the bucket {self._bucket!r}: there are no AWS credentials; "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        _current(credentials)
        return session

    def _new_files(self) -> Any:
        import s3fs

        region = self._session().get_config_variable("region") or DEFAULT_REGION
        return s3fs.S3FileSystem(
            use_listings_cache=False,
            skip_instance_cache=True,
            client_kwargs={"region_name": region},
            config_kwargs=dict(SETTINGS),
        )

    def _new_client(self) -> Any:
        from botocore.config import Config
        from botocore.handlers import add_expect_header

        session = self._session()
        region = session.get_config_variable("region") or DEFAULT_REGION
        client = session.create_client("s3", region_name=region, config=Config(**SETTINGS))
        # Asking for leave to send costs every part a round trip, and a body can be sent again.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        return client

    def _new_reader(self) -> Any:
        from obstore.store import S3Store

        endpoint, region, credentials = self._place(os.environ)
        return S3Store(
            self._bucket,
            endpoint=endpoint,
            region=region,
            credential_provider=credentials,
            virtual_hosted_style_request=False,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": f"{CONNECT_SECONDS}s",
                "read_timeout": f"{READ_SECONDS}s",
                "timeout": f"{REPLY_SECONDS}s",
            },
            retry_config={"max_retries": 0},
        )

    def _place(self, environment: Mapping[str, str]) -> tuple[str, str, Callable[[], dict[str, Any]]]:
        """Endpoint, region and credentials of the bucket; by way of botocore unless the environment names them all."""
        endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
        ignored = environment.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true"
        key, secret = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
        if endpoint and key and secret and not ignored:
            token = environment.get("AWS_SESSION_TOKEN")
            found = {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": None}
            return endpoint, environment.get("AWS_DEFAULT_REGION") or DEFAULT_REGION, lambda: dict(found)
        credentials = self._session().get_credentials()
        endpoint, region = str(self.client.meta.endpoint_url), str(self.client.meta.region_name)
        if endpoint.endswith(".amazonaws.com"):
            # obstore follows no redirection to a bucket's own region.
            region = self.client.head_bucket(Bucket=self._bucket).get("BucketRegion") or region
            endpoint = f"https://s3.{region}.amazonaws.com"
        return endpoint, region, lambda: _current(credentials)


def _current(credentials: Any) -> dict[str, Any]:
    """Botocore's credentials, renewed if need be, in obstore's form."""
    frozen = credentials.get_frozen_credentials()
    remember(frozen.access_key, frozen.secret_key, frozen.token)
    ends_soon = getattr(credentials, "refresh_needed", lambda seconds: False)(2 * CREDENTIALS_SECONDS)
    return {
        "access_key_id": frozen.access_key,
        "secret_access_key": frozen.secret_key,
        "token": frozen.token,
        "expires_at": datetime.now(UTC) + timedelta(seconds=0 if ends_soon else CREDENTIALS_SECONDS),
    }
