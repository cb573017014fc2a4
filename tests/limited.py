"""A process that may write no file beyond so many bytes, which then fails as it does on a full disk, in the middle of a write.

    python -m tests.limited BYTES put STORE FOLDER     publish a folder (see `published`)
    python -m tests.limited BYTES get STORE TREE INTO  materialise a tree

It prints the error of the store as `Kind: message`, or the digest of the tree. 0 bytes is no limit.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from artifacts.errors import StoreError
from artifacts.record import Record, payload_key
from artifacts.store import Store, new_record


def published(store: Store, folder: Path) -> Record:
    """Publish `folder` as the output of a pretend stage."""
    payload = {"algorithm": 1, "stage": "filled", "code": "c", "config": {}, "inputs": {}}
    return store.publish(
        folder,
        lambda tree: new_record(
            stage="filled", key=payload_key(payload), payload=payload, output=tree.digest, size=tree.size
        ),
    )


def main() -> None:
    """Do one thing under the limit."""
    limit, verb, url, *rest = sys.argv[1:]
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        if verb == "put":
            print(published(Store.open(url), Path(rest[0])).output)
        else:
            print(Store.open(url).materialise(rest[0], Path(rest[1])).digest)
    except StoreError as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
