"""Most memory that storing and reading one large file takes, in a process of its own each: plain bytes, and packed weights.

python -m benchmarks.memory [--gib 8] [--where folder] [--where s3] [--kind bytes] [--kind weights] [--folder DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy

from benchmarks.table import machine, show
from tests.servers import swift_server

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 64 << 20
TARGET = 512
"""MiB, whatever the size of the file."""
WORK = """
import json, sys, time
from pathlib import Path
from artifacts.store import Store
from benchmarks.transfers import most_resident
store, verb, folder = Store.open(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
before, started = most_resident(), time.monotonic()
digest = store.put_tree(folder).digest if verb == "put" else store.materialise(sys.argv[4], folder).digest
print(json.dumps([digest, time.monotonic() - started, before, most_resident()]))
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=int, default=8)
    parser.add_argument("--where", action="append", choices=("folder", "s3"), help="default: both")
    parser.add_argument("--kind", action="append", choices=("bytes", "weights"), help="default: both")
    parser.add_argument("--folder", type=Path, help="where there is room for three times the file")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    rows, size = [], options.gib << 30
    for kind in options.kind or ("bytes", "weights"):
        for where in options.where or ("folder", "s3"):
            with tempfile.TemporaryDirectory(dir=options.folder) as name, store_in(where, Path(name)) as environment:
                source, back = Path(name, "source"), Path(name, "back")
                source.mkdir()
                write(source, size, weights=kind == "weights")
                digest, *put = run(environment, "put", source)
                shutil.rmtree(source)
                _, *get = run(environment, "get", back, digest)
            for verb, (seconds, before, most) in (("put", put), ("get", get)):
                verdict = f"<= {TARGET}: {'met' if most <= TARGET else 'MISSED'}"
                rows.append([kind, where, verb, before, most, verdict, f"{size / seconds / 1e6:.0f}"])
    head = ["file", "store", "what", "before, MiB", "most resident, MiB", "target", "MB/s"]
    show(f"One file of {options.gib} GiB; S3 is a Swift on this machine ({machine()})", head, rows)


@contextmanager
def store_in(where: str, folder: Path) -> Iterator[dict[str, str]]:
    """A new store; what a process needs in its environment to find it, its URL as STORE."""
    if where == "folder":
        yield {"STORE": str(folder / "store")}
        return
    (folder / "server").mkdir()
    with swift_server(folder / "server") as server:
        yield {**server.environment(), "STORE": f"s3://{server.new_bucket()}/store"}


def write(folder: Path, size: int, *, weights: bool) -> None:
    """A file of `size` bytes, no two blocks of it alike: noise, or a checkpoint with one tensor for each block."""
    random = numpy.random.default_rng(0)
    noise = random.normal(0, 0.02, BLOCK // 4).astype("<f4") if weights else random.integers(0, 2**32, BLOCK // 4, "u4")
    count = size // BLOCK
    with open(folder / ("model.safetensors" if weights else "noise"), "wb") as file:
        if weights:
            entry = {"dtype": "F32", "shape": [BLOCK // 4]}
            header = {f"t{n:05d}": {**entry, "data_offsets": [n * BLOCK, (n + 1) * BLOCK]} for n in range(count)}
            encoded = json.dumps(header).encode()
            file.write(struct.pack("<Q", len(encoded)) + encoded)
        for number in range(count):
            noise[:: 1 << 18] = number
            file.write(noise.tobytes())


def run(environment: dict[str, str], verb: str, folder: Path, *more: str) -> list[Any]:
    """What a process that puts or gets the folder printed: digest, seconds, MiB before, MiB at most."""
    command = [sys.executable, "-c", WORK, environment["STORE"], verb, str(folder), *more]
    environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
