"""OpenStack Swift with its S3 API as one process: `python -m tests.swift_server FOLDER PORT ACCESS_KEY SECRET RESERVE`.

Account, container and object servers and the proxy run in one eventlet loop on 127.0.0.1, with one replica and files under
FOLDER. It takes no object that would leave less than RESERVE of the disk free, bytes or a percentage. Good for large objects,
checked uploads, a full disk and kills: it keeps its data on disk and uses little memory.
Not good for conditions: `If-None-Match` is looked at before the write, without a lock, and `If-Match` is not implemented.
The access key has the form `account:user`.
"""

from __future__ import annotations

import eventlet

eventlet.monkey_patch(os=False)

import array  # noqa: E402 - eventlet must patch the standard library before anything imports it
import importlib  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

SWIFT_CONF = """[swift-hash]
swift_hash_path_suffix = tests
swift_hash_path_prefix = tests
[storage-policy:0]
name = only
default = yes
"""
MEBIBYTE = str(1 << 20)
COMMON = {
    "mount_check": "false",
    "fallocate_reserve": "0",
    "disable_fallocate": "true",
    "log_level": "ERROR",
    "conn_timeout": "5",
    "node_timeout": "60",
    "error_suppression_interval": "0",
    "client_timeout": "60",
    "network_chunk_size": MEBIBYTE,
    "disk_chunk_size": MEBIBYTE,
    "client_chunk_size": MEBIBYTE,
    "object_chunk_size": MEBIBYTE,
    "mb_per_sync": "512",
    "allow_account_management": "true",
    "account_autocreate": "true",
}
# From the innermost to the outermost.
MIDDLEWARE: dict[str, dict[str, str]] = {
    "dlo": {},
    "slo": {"min_segment_size": "1", "concurrency": "4", "rate_limit_after_segment": "1000000"},
    "copy": {},
    "tempauth": {},
    "s3api.s3api": {
        "s3_acl": "false",
        "location": "us-east-1",
        "max_bucket_listing": "1000",
        "max_multi_delete_objects": "1000",
        "multi_delete_concurrency": "8",
        "dns_compliant_bucket_names": "true",
        "allow_no_owner": "true",
        "auth_pipeline_check": "false",
    },
    "bulk": {},
    "listing_formats": {},
    "gatekeeper": {},
    "catch_errors": {},
}


class Quiet:
    """A log for eventlet's server, whose clients hang up on purpose in tests."""

    def write(self, *_: object) -> None:
        pass

    debug = info = warning = error = write


def configure(folder: Path, reserve: str) -> None:
    """Give Swift its cluster-wide settings, which it otherwise reads from /etc at import time, or when it becomes a daemon."""
    from swift.common import constraints, storage_policy, utils

    (folder / "srv" / "disk").mkdir(parents=True, exist_ok=True)
    (folder / "swift.conf").write_text(SWIFT_CONF)
    utils.SWIFT_CONF_FILE = str(folder / "swift.conf")
    utils.validate_configuration()
    utils.HASH_PATH_SUFFIX = utils.HASH_PATH_PREFIX = b"tests"
    utils.FALLOCATE_RESERVE, utils.FALLOCATE_IS_PERCENT = utils.config_fallocate_value(reserve)
    constraints.reload_constraints()
    storage_policy.reload_storage_policies()


def listen(kind: str, folder: Path) -> Any:
    """A socket for one of the storage servers, and the ring file that leads the proxy to it."""
    from swift.common.ring import RingData

    socket = eventlet.listen(("127.0.0.1", 0), backlog=512)
    place = {"ip": "127.0.0.1", "port": socket.getsockname()[1]}
    device = {"id": 0, "zone": 0, "region": 1, "weight": 1, "device": "disk", "meta": "", **place}
    device |= {f"replication_{name}": value for name, value in place.items()}
    RingData([array.array("H", [0] * 16)], [device], 32 - 4).save(str(folder / f"{kind}.ring.gz"))
    return socket


def proxy(conf: dict[str, str], logger: Any, access_key: str, secret: str) -> Any:
    """The proxy application inside its middleware."""
    from swift.common.middleware.s3api import s3api
    from swift.proxy.server import Application

    # It wants to see its neighbours in a Paste pipeline, of which there is none here.
    s3api.S3ApiMiddleware.check_pipeline = lambda self, pipeline: None
    account, user = access_key.split(":")
    application = Application(conf, logger)
    for name, settings in MIDDLEWARE.items():
        if name == "tempauth":
            settings = {f"user_{account}_{user}": f"{secret} .admin"}
        module = importlib.import_module(f"swift.common.middleware.{name}")
        application = module.filter_factory({}, **conf, **settings)(application)
    return application


def serve(socket: Any, application: Any) -> None:
    """Answer requests until the process ends."""
    from eventlet import wsgi
    from swift.common.wsgi import SwiftHttpProtocol

    wsgi.server(
        socket,
        application,
        Quiet(),
        protocol=SwiftHttpProtocol,
        custom_pool=eventlet.GreenPool(1000),
        log_output=False,
        capitalize_response_headers=False,
        debug=False,
    )


def main() -> None:
    """Start every server; the S3 API's port answers last."""
    folder, port, access_key, secret = Path(sys.argv[1]).absolute(), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    configure(folder, sys.argv[5])
    from swift.account.server import AccountController
    from swift.common.utils import get_logger
    from swift.container.server import ContainerController
    from swift.obj.server import ObjectController

    conf = {**COMMON, "devices": str(folder / "srv"), "swift_dir": str(folder)}
    logger = get_logger({"log_level": "ERROR", "log_name": "swift"}, log_to_console=False)
    sockets = {kind: listen(kind, folder) for kind in ("account", "container", "object")}
    eventlet.spawn(serve, sockets["account"], AccountController(conf))
    eventlet.spawn(serve, sockets["container"], ContainerController(conf))
    eventlet.spawn(serve, sockets["object"], ObjectController(conf, logger))
    serve(eventlet.listen(("127.0.0.1", port), backlog=512), proxy(conf, logger, access_key, secret))


if __name__ == "__main__":
    main()
