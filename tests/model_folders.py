"""Folders as a training stage leaves them: a checkpoint of several tensors, large enough here to be stored in parts."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest

from artifacts import tensors
from artifacts.record import Record, payload_key
from artifacts.store import new_record
from artifacts.trees import Tree, object_key

LARGE = 300_000
"""Bytes of the larger tensors here: five of them make a file that may be stored in parts."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut files of test size. For `_small_parts = model_folders.small_parts` in a module of tests."""
    monkeypatch.setattr(tensors, "SPLIT_FROM", 1 << 20)
    monkeypatch.setattr(tensors, "PART_FROM", 100_000)


def weights(seed: int, **changed: int) -> dict[str, bytes]:
    """Tensors of a small checkpoint; `changed` draws some of them from another seed."""
    sizes = {f"layer{n}": LARGE for n in range(5)} | {f"norm{n}": 500 for n in range(4)}
    return {name: random.Random(f"{name}/{changed.get(name, seed)}").randbytes(n) for name, n in sizes.items()}


def numbers(seed: int, count: int = 75_000) -> bytes:
    """fp32 numbers as weights are distributed."""
    return numpy.random.default_rng(seed).normal(0, 0.02, count).astype("<f4").tobytes()


def trained(folder: Path, *seeds: int) -> Path:
    """A folder with a checkpoint of fp32 tensors, one of each seed."""
    save_tensors(folder / "model.safetensors", {f"layer{n}": numbers(s) for n, s in enumerate(seeds)}, dtype="F32")
    return folder


def save_tensors(path: Path, tensors_: dict[str, bytes], dtype: str = "U8", **metadata: str) -> None:
    """A safetensors file, as the format says: length of the header, header, tensors without gaps."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, data in tensors_.items():
        header[name] = {"dtype": dtype, "shape": [len(data)], "data_offsets": [end, end + len(data)]}
        end += len(data)
    encoded = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(tensors_.values()))


def model(folder: Path, seed: int = 0, **changed: int) -> Path:
    """A folder with a checkpoint and two small files."""
    save_tensors(folder / "model.safetensors", weights(seed, **changed))
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "empty").write_text("")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of every file in a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def record_of(tree: Tree) -> Record:
    """A record of a stage that made this tree."""
    payload = {"algorithm": 1, "stage": "toy", "code": "c", "config": {}, "inputs": {}}
    return new_record(stage="toy", key=payload_key(payload), payload=payload, output=tree.digest, size=tree.size)


def parts_key(tree: Tree) -> str:
    """Key of the parts list of its checkpoint."""
    [file] = [file for file in tree.files if file.path == "model.safetensors"]
    return object_key("parts", file.digest)
