"""One copy of one file between this machine and an S3 server, by one tool, in a process of its own.

    python -m benchmarks.transfers TOOL put|get BUCKET NAME FILE

The tools are the store, which hashes what it puts and verifies what it gets, and raw clients, which do neither. Each moves
an object of a few parts first, so that the clock starts with imports done, clients made and connections open. Printed as
JSON: wall and processor seconds, and the most memory that was resident.

Each raw client has settings that are good for large objects: parts of 8 to 32 MiB, four or more at once, and no checksum
beyond what its signature has.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MIB = 1 << 20
FIRST_BYTES = 65 * MIB
"""Enough for every tool to move it in parts."""
Copy = Callable[[str, Path], None]
"""Copies between an object's name and a local file."""


def store(bucket: str) -> tuple[Copy, Copy]:
    """The store under test, in a bucket of its own. The digest of a tree is kept beside its folder."""
    from artifacts.store import Store

    opened = Store.open(f"s3://{bucket}/store")

    def put(name: str, file: Path) -> None:
        file.parent.with_name(f"{name}.digest").write_text(opened.put_tree(file.parent).digest)

    def get(name: str, file: Path) -> None:
        opened.materialise(file.parent.with_name(f"{name}.digest").read_text(), file.parent)

    return put, get


def s3fs(bucket: str) -> tuple[Copy, Copy]:
    """s3fs with 16 MiB x 4."""
    from s3fs import S3FileSystem

    files = S3FileSystem(
        use_listings_cache=False, config_kwargs=_BOTOCORE, client_kwargs={"region_name": "us-east-1"}, max_concurrency=4
    )

    def put(name: str, file: Path) -> None:
        files.put_file(str(file), f"{bucket}/{name}", chunksize=16 * MIB, max_concurrency=4)

    def get(name: str, file: Path) -> None:
        files.get_file(f"{bucket}/{name}", str(file), chunksize=16 * MIB, max_concurrency=4)

    return put, get


def boto3(bucket: str, part: int = 32, at_once: int = 4) -> tuple[Copy, Copy]:
    """boto3's managed transfers."""
    import boto3 as boto3_module
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    client = boto3_module.client("s3", region_name="us-east-1", config=Config(**_BOTOCORE))
    settings = TransferConfig(multipart_chunksize=part * MIB, max_concurrency=at_once)

    def put(name: str, file: Path) -> None:
        client.upload_file(str(file), bucket, name, Config=settings)

    def get(name: str, file: Path) -> None:
        client.download_file(bucket, name, str(file), Config=settings)

    return put, get


def boto3_default(bucket: str) -> tuple[Copy, Copy]:
    """boto3 as it comes: 8 MiB x 10."""
    return boto3(bucket, 8, 10)


def obstore(bucket: str) -> tuple[Copy, Copy]:
    """obstore: 16 MiB x 4 up, and one stream down."""
    import obstore as obstore_module

    reader = _obstore(bucket)

    def put(name: str, file: Path) -> None:
        obstore_module.put(reader, name, file, chunk_size=16 * MIB, max_concurrency=4)

    def get(name: str, file: Path) -> None:
        with open(file, "wb", buffering=0) as target:
            for chunk in obstore_module.get(reader, name).stream(min_chunk_size=4 * MIB):
                target.write(chunk)

    return put, get


def obstore_ranges(bucket: str) -> tuple[Copy, Copy]:
    """obstore: 32 MiB x 4 up, and ranges of 16 MiB, four at once, down."""
    import obstore as obstore_module

    reader = _obstore(bucket)

    def put(name: str, file: Path) -> None:
        obstore_module.put(reader, name, file, chunk_size=32 * MIB, max_concurrency=4)

    def get(name: str, file: Path) -> None:
        size, step = obstore_module.head(reader, name)["size"], 16 * MIB
        with open(file, "wb", buffering=0) as target, ThreadPoolExecutor(4) as pool:

            def fetch(start: int) -> None:
                if size > step:
                    part = obstore_module.get_range(reader, name, start=start, length=min(step, size - start))
                else:
                    part = obstore_module.get(reader, name).bytes()
                os.pwrite(target.fileno(), part, start)

            list(pool.map(fetch, range(0, size, step)))

    return put, get


TOOLS: dict[str, Callable[[str], tuple[Copy, Copy]]] = {
    "store": store,
    "s3fs 16 MiB x 4": s3fs,
    "boto3 8 MiB x 10": boto3_default,
    "boto3 32 MiB x 4": boto3,
    "obstore 16 MiB x 4, stream": obstore,
    "obstore 32 MiB x 4, ranges": obstore_ranges,
}
CANNOT = {("obstore 32 MiB x 4, ranges", "get", "rclone")}
"""Its server answers a range with status 200, which obstore refuses."""

_BOTOCORE: dict[str, Any] = {
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "max_pool_connections": 32,
    "s3": {"addressing_style": "path"},
}


def _obstore(bucket: str) -> Any:
    from obstore.store import S3Store

    return S3Store(
        bucket,
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        region="us-east-1",
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "120s"},
    )


def main() -> None:
    """Copy once; print what it took."""
    tool, verb, bucket, name, path = sys.argv[1:]
    file = Path(path)
    put, get = TOOLS[tool](bucket)
    small = file.parent.with_name("small") / "small"
    small.parent.mkdir(exist_ok=True)
    small.write_bytes(os.urandom(FIRST_BYTES))
    put(f"{name}-small", small)
    if verb == "get":
        get(f"{name}-small", small)
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    (put if verb == "put" else get)(name, file)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"seconds": seconds, "processor": processor, "mib": most_resident()}))


def most_resident() -> int:
    """MiB of this process at its largest. `getrusage` would count what its parent had when it was forked."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) >> 10


if __name__ == "__main__":
    main()
