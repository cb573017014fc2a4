"""What the store promises, as ratios and counts beside their targets.

    python -m benchmarks.store [PART ...] [--mib 1024] [--rounds 5] [--server swift] [--server rclone] [--folder DIR]

The parts, all of them unless some are named:

    bytes    put, and get with every digest verified, of one file against raw copies of it (see `benchmarks.transfers`)
    weights  the same for a checkpoint in fp32, which the store packs
    again    what crosses the network when content is put that is there already
    plan     planning about 1,000 stages that are all cached (see `benchmarks.plan`)
    mark     the mark phase of a collection over 1,000,000 objects (see `benchmarks.collect`)

In each round every tool puts the file and gets it back, in a shuffled order and each in a process of its own, with the disk
at rest and memory touched before the clock starts. A ratio is a raw tool's time divided by the store's in the same round, and
the median over the rounds counts; the target must be met against the raw tool that it is lowest for. All servers are on this
machine and share its cores, so that processor time spent by a client is time the server lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

import numpy

from benchmarks import plan
from benchmarks.table import machine, show
from benchmarks.transfers import CANNOT, TOOLS
from tests.fault_proxy import FaultProxy
from tests.servers import Server, rclone_server, swift_server

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("bytes", "weights", "again", "plan", "mark")
SERVERS = {"swift": swift_server, "rclone": rclone_server}
TARGETS = {"put": 0.9, "get": 0.85}
"""Lowest allowed ratio against the best raw copy."""
PLAN_LOCAL, PLAN_S3, MARK = 2.5, 1.5, 60.0
"""Seconds: a plan on a local folder, a plan on S3 beyond its network time, marking a million objects."""
MIB = 1 << 20
TENSOR_SHAPES = ((4096, 4096), (4096, 1024), (11008, 1024), (4096,))


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--mib", type=int, default=1024, help="size of the file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server", action="append", choices=sorted(SERVERS), help="may be repeated; default: all")
    parser.add_argument("--tool", action="append", choices=sorted(TOOLS), help="raw copies to run; default: all")
    parser.add_argument("--folder", type=Path, help="where there is room for four times the file")
    parser.add_argument("--objects", type=int, default=1_000_000, help="that are marked")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if wrong := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {min(wrong)!r}; expected {', '.join(PARTS)}")
    parts, servers = options.parts or PARTS, options.server or sorted(SERVERS)
    tools = ["store", *(tool for tool in options.tool or TOOLS if tool != "store")]
    for part in ("bytes", "weights"):
        for server in servers if part in parts else ():
            with tempfile.TemporaryDirectory(dir=options.folder) as name:
                contest(Path(name), part, server, options.mib, options.rounds, tools)
    if "again" in parts:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            again(Path(name), servers, options.mib)
    if "plan" in parts:
        plans()
    if "mark" in parts:
        mark(options.objects)


# Put and get


def contest(folder: Path, kind: str, server_name: str, mib: int, rounds: int, tools: Sequence[str]) -> None:
    """Print how the store compares with each raw copy."""
    source = folder / "source" / ("model.safetensors" if kind == "weights" else "data")
    source.parent.mkdir()
    write_weights(source, mib * MIB) if kind == "weights" else write_noise(source, mib * MIB)
    taken: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    order = random.Random(f"{kind} {server_name}")
    for number in range(rounds):
        (folder / "server").mkdir()
        with started(server_name, folder / "server") as server:
            for tool in order.sample(tools, len(tools)):
                bucket = server.new_bucket()
                for verb in TARGETS:
                    if (tool, verb, server_name) not in CANNOT:
                        taken[tool, verb].append(copied(folder, source, server, bucket, tool, verb))
                empty(server, bucket)
                print(f"round {number + 1} of {rounds}, {server_name}, {tool}: done", file=sys.stderr)
        shutil.rmtree(folder / "server")
    rows = [row for verb, target in TARGETS.items() for row in compared(taken, verb, target, source.stat().st_size)]
    what = {"bytes": "random bytes", "weights": "fp32 weights, which the store packs"}[kind]
    head = ["what", "tool", "MB/s (slowest..fastest)", "client CPU s", "peak MiB", "store / raw", "target"]
    show(f"{mib} MiB of {what}, {server_name}, medians of {rounds} rounds ({machine()})", head, rows)


def started(name: str, folder: Path) -> AbstractContextManager[Server]:
    """The server of that name."""
    return SERVERS[name](folder)


def copied(folder: Path, source: Path, server: Server, bucket: str, tool: str, verb: str) -> dict[str, float]:
    """What one copy in one process took."""
    file = source if verb == "put" else folder / "back" / source.name
    shutil.rmtree(folder / "back", ignore_errors=True)
    (folder / "back").mkdir()
    os.sync()
    touch_memory(3 * source.stat().st_size)
    command = [sys.executable, "-m", "benchmarks.transfers", tool, verb, bucket, "object", str(file)]
    environment = {**os.environ, **server.environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tool} could not {verb} on {server.name}:\n{done.stderr}")
    if verb == "get" and subprocess.run(["cmp", str(source), str(file)]).returncode:
        raise SystemExit(f"{tool} got other bytes from {server.name} than it had put")
    shutil.rmtree(folder / "back")
    return json.loads(done.stdout)


def touch_memory(size: int) -> None:
    """Use this much memory and free it: a virtual machine may have to get it from its host first, in whoever's time that is."""
    numpy.empty(size, dtype=numpy.uint8).fill(1)


def compared(
    taken: dict[tuple[str, str], list[dict[str, float]]], verb: str, target: float, size: int
) -> Iterator[list[str]]:
    """Rows of one verb: the store, then each raw tool with the store's ratio to it."""
    ours = [one["seconds"] for one in taken["store", verb]]
    ratios = {
        tool: median(raw["seconds"] / our for raw, our in zip(runs, ours, strict=True))
        for (tool, of), runs in taken.items()
        if of == verb and tool != "store"
    }
    hardest = min(ratios, key=ratios.__getitem__, default=None)
    for tool in ["store", *sorted(ratios, key=ratios.__getitem__)]:
        runs = taken[tool, verb]
        speeds = sorted(size / one["seconds"] / 1e6 for one in runs)
        verdict = f">= {target}: {'met' if ratios[tool] >= target else 'MISSED'}" if tool == hardest else ""
        yield [
            verb if tool == "store" else "",
            tool,
            f"{median(speeds):.0f} ({speeds[0]:.0f}..{speeds[-1]:.0f})",
            f"{median(one['processor'] for one in runs):.2f}",
            f"{max(one['mib'] for one in runs):.0f}",
            f"{ratios[tool]:.2f}" if tool in ratios else "",
            verdict,
        ]


def empty(server: Server, bucket: str) -> None:
    """Remove what a tool has put, so that the disk does not fill up."""
    client = server.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page.get("Contents", []):
            client.delete_object(Bucket=bucket, Key=entry["Key"])


def write_noise(path: Path, size: int) -> None:
    """A file of `size` bytes that nothing makes smaller."""
    noise = numpy.random.default_rng(0)
    with open(path, "wb") as file:
        for start in range(0, size, 64 * MIB):
            file.write(noise.bytes(min(64 * MIB, size - start)))


def write_weights(path: Path, size: int) -> None:
    """A safetensors file of about `size` bytes with the tensors of a transformer, each normal and of its own scale."""
    shapes: dict[str, tuple[int, ...]] = {}
    while (left := size // 4 - sum(int(numpy.prod(shape)) for shape in shapes.values())) > 0:
        shape = TENSOR_SHAPES[len(shapes) % len(TENSOR_SHAPES)]
        shapes[f"layer.{len(shapes):05d}"] = shape if numpy.prod(shape) <= left else (left,)
    header, end = {}, 0
    for name, shape in shapes.items():
        first, end = end, end + 4 * int(numpy.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [first, end]}
    encoded, random_numbers = json.dumps(header).encode(), numpy.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for number, shape in enumerate(shapes.values()):
            scale = numpy.float32(0.01 + 0.005 * (number % 7))
            file.write((random_numbers.standard_normal(shape, "f4") * scale).tobytes())


# What is there already


def again(folder: Path, servers: Sequence[str], mib: int) -> None:
    """Print what crosses the network in a second put of the same folder."""
    rows = []
    for name in servers:
        (folder / name / "source").mkdir(parents=True)
        write_noise(folder / name / "source" / "data", mib * MIB // 2)
        write_weights(folder / name / "source" / "model.safetensors", mib * MIB // 2)
        (folder / name / "server").mkdir()
        with started(name, folder / name / "server") as server, FaultProxy(server.endpoint) as proxy:
            url, environment = f"s3://{server.new_bucket()}/store", {**server.environment()}
            environment["AWS_ENDPOINT_URL"] = proxy.endpoint
            for what in ("first", "again"):
                proxy.clear()
                started_at = time.monotonic()
                put_tree(url, folder / name / "source", environment)
                requests = ", ".join(f"{count} {method}" for method, count in sorted(proxy.requests.items()))
                verdict = f"0 bytes: {'met' if proxy.bytes_in == 0 else 'MISSED'}" if what == "again" else ""
                rows.append([name, what, f"{time.monotonic() - started_at:.2f}", requests, proxy.bytes_in, verdict])
        shutil.rmtree(folder / name)
    head = ["server", "put", "seconds, process included", "requests", "bytes sent", "target"]
    show(f"{mib} MiB put twice through a proxy that counts, half of it weights ({machine()})", head, rows)


def put_tree(url: str, folder: Path, environment: dict[str, str]) -> None:
    """Put a folder, in a process that remembers nothing of earlier ones."""
    code = "import sys; from pathlib import Path; from artifacts.store import Store\n"
    code += "Store.open(sys.argv[1]).put_tree(Path(sys.argv[2]))"
    environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, url, str(folder)], cwd=ROOT, env=environment, check=True)


# Plans and collections


def plans() -> None:
    """Print the time of fully cached plans."""
    measured = plan.measure()
    s3 = measured.on_s3
    rows = []
    for what, seconds, target in (
        ("local folder", measured.local, PLAN_LOCAL),
        ("S3, beyond the network's time", s3.ours, PLAN_S3),
        ("  the network's time: obstore alone, same reads", s3.network, None),
    ):
        verdict = "" if target is None else f"<= {target} s: {'met' if median(seconds) <= target else 'MISSED'}"
        rows.append([what, plan.spread(seconds), verdict])
    title = f"Plan of {measured.stages} cached stages; S3 has {plan.LATENCY * 1000:.0f} ms added to every request"
    show(f"{title} ({machine()})", ["where", "seconds (min..max)", "target"], rows)


def mark(objects: int) -> None:
    """Print the time of marking."""
    command = [sys.executable, "-m", "benchmarks.collect", "--objects", str(objects)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    verdict = f"<= {MARK:.0f} s: {'met' if float(found['seconds']) <= MARK else 'MISSED'}"
    rows = [[found["objects"], found["seconds"], found["of which marking MiB"], verdict]]
    show(f"Mark phase of a collection ({machine()})", ["objects", "seconds", "MiB", "target"], rows)


if __name__ == "__main__":
    main()
