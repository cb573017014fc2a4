"""The mark phase of a collection over a synthetic store of a million objects: seconds, objects a second, peak memory.

    python -m benchmarks.collect [--objects 1000000] [--records 5000] [--backend memory] [--folder DIR]

The store has `--records` records, each with a tree; the rest are blobs, spread over the trees. Nine records in ten belong
to a run; the others, with their trees and blobs, are unused. Marking reads every record and every tree in use, lists each
kind of object once, and reads no payload; the counts of requests are printed. With `--backend local` the files are made in
`--folder` first, which takes longer than marking them.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from artifacts.backend import Backend
from artifacts.collect import collect
from artifacts.digest import canonical_json, digest_bytes
from artifacts.local import LocalBackend
from artifacts.memory import MemoryBackend
from artifacts.record import Record, payload_key
from artifacts.store import Store

Put = Callable[[str, bytes], Any]


class Counting:
    """Counts the requests of each verb; `get_many` counts one for each object."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.url = backend.url
        self.requests: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.requests[name] += 1
        return getattr(self._backend, name)

    def get_many(self, keys: Any, **options: Any) -> Any:
        keys = list(keys)
        self.requests["get"] += len(keys)
        return self._backend.get_many(keys, **options)

    def list(self, prefix: str) -> Iterator[Any]:
        self.requests[f"list {prefix.partition('-')[0]}"] += 1
        return self._backend.list(prefix)


def fill(put: Put, objects: int, records: int, seed: int = 0) -> int:
    """Put a synthetic store; return the number of objects."""
    rng = random.Random(seed)
    blobs, made = (objects - 2 * records) // records, 0
    nodes: dict[str, dict[str, str]] = {}
    for number in range(records):
        rows = []
        for index in range(blobs):
            digest = rng.randbytes(32).hex()
            put(f"v1/cas/{digest[:2]}/{digest}", b"")
            rows.append([f"part-{index:05d}", 0, digest])
        listing = canonical_json(rows)
        tree = digest_bytes(listing)
        put(f"v1/tree/{tree[:2]}/{tree}", listing)
        payload = {"algorithm": 1, "stage": "toy", "code": "c", "config": {"n": number}, "inputs": {}}
        key = payload_key(payload)
        record = Record(stage="toy", key=key, payload=payload, output=tree, size=0, commit="c")
        put(f"v1/act/toy/{key}.json", record.encode())
        made += 2 + blobs
        if number % 10:
            nodes[f"n{number}"] = {"stage": "toy", "key": key, "output": tree}
        if len(nodes) == 100 or (nodes and number == records - 1):
            body = canonical_json({"schema": 1, "experiment": "e", "complete": True, "config": {}, "nodes": nodes})
            put(f"v1/run/{digest_bytes(body)}.json", body)
            nodes = {}
    return made


def plain_file(root: Path) -> Put:
    """Writes objects as files without the syncs of the real backend."""

    def put(key: str, data: bytes) -> None:
        path = os.path.join(root, key)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path))
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(descriptor, data)
        os.close(descriptor)

    return put


def measure(backend: Backend, made: int) -> dict[str, Any]:
    """Mark once, as a dry run that nothing is too young for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counting = Counting(backend)
    started = time.perf_counter()
    report = collect(Store(counting), grace=-3600.0, dry_run=True)  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    used = sum(tally.objects for tally in report.in_use.values())
    unused = sum(tally.objects for tally in report.unused.values())
    assert used + unused == made, (used, unused, made)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "objects": made,
        "in use": used,
        "unused": unused,
        "seconds": round(seconds, 2),
        "objects per second": round(made / seconds),
        "peak MiB": after // 1024,
        "of which marking MiB": (after - before) // 1024,
        "requests": dict(sorted(counting.requests.items())),
    }


def main() -> None:
    """Fill a store, mark it, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--records", type=int, default=5000)
    parser.add_argument("--backend", choices=("memory", "local"), default="memory")
    parser.add_argument("--folder", type=Path, help="where a local store is made, and removed again")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder)) if options.backend == "local" else None
    backend: Backend = MemoryBackend("bench") if folder is None else LocalBackend(folder)
    put: Put = backend.put if folder is None else plain_file(folder)
    try:
        started = time.perf_counter()
        made = fill(put, options.objects, options.records)
        print(f"made {made} objects in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        for name, value in measure(backend, made).items():
            print(f"{name}: {value}")
    finally:
        if folder is not None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
