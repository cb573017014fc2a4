"""A small store with one object of each kind, and all that reads a whole store, for fuzzing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from artifacts.audit import verify
from artifacts.digest import canonical_json, digest_bytes, seal
from artifacts.errors import StoreError
from artifacts.keep import find_record, pin, pins, restore
from artifacts.mark import Marks
from artifacts.memory import MemoryBackend
from artifacts.record import payload_key
from artifacts.repair import repair
from artifacts.store import Store, new_record
from artifacts.trail import note, read_trail
from artifacts.trees import Part, object_key, parts_list

PAYLOAD = {"algorithm": 1, "stage": "toy", "code": "c", "config": {"x": 1}, "inputs": {}}
KEY = payload_key(PAYLOAD)
LARGE = bytes(1 << 20) + b"large"


def _filled() -> dict[str, bytes]:
    backend = MemoryBackend()
    store = Store(backend, at_once=1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a").write_bytes(b"one")
        Path(folder, "large").write_bytes(LARGE)
        tree = store.put_tree(Path(folder))
    file = digest_bytes(LARGE)
    cut = [Part(0, 1 << 20, digest_bytes(LARGE[: 1 << 20])), Part(1 << 20, 5, digest_bytes(b"large"))]
    for part in cut:
        backend.put(object_key("cas", part.digest), LARGE[part.offset : part.offset + part.size])
    backend.put(object_key("parts", file), parts_list(file, cut))
    backend.delete(object_key("cas", file))
    record = new_record(stage="toy", key=KEY, payload=PAYLOAD, output=tree.digest, size=tree.size, finished=1.0)
    store.commit(record)
    nodes = {"n": {"stage": "toy", "key": KEY, "output": tree.digest}}
    body = {"experiment": "e", "complete": True, "config": {}, "nodes": nodes}
    store.put_run(body)
    backend.put("v1/run/active-0.json", seal({"schema": 1, **body}))
    pin(store, "kept", {"n": record}, "why")
    note(backend, "gc", "why", records=[])
    backend.put("v1/intent/0.json", canonical_json({"schema": 1, "keys": ["v1/cas/x"]}))
    other = new_record(stage="toy", key=KEY, payload=PAYLOAD, output=tree.digest, size=1)
    forgotten = {"reason": "r", "by": "u@h", "forgotten": True, "record": json.loads(other.encode())}
    backend.put(f"v1/trash/toy-{KEY}-0.json", canonical_json(forgotten))
    files = [["a", 3, digest_bytes(b"one")]]
    manifest = canonical_json({"step": 5, "seconds": 1.0, "files": files})
    base = f"v1/wip/{KEY}"
    backend.put(f"{base}/000000005-0123456789ab/manifest.json", manifest)
    backend.put(f"{base}/000000005-0123456789ab/files/a", b"one")
    pointer = {"name": "000000005-0123456789ab", "step": 5, "digest": digest_bytes(manifest)}
    backend.put(f"{base}/LATEST", seal({"fence": 1, "checkpoints": [pointer]}))
    return {entry.key: backend.get(entry.key).data for entry in backend.list("")}


FILLED = _filled()
OBJECTS = {key: data for key, data in FILLED.items() if not key.startswith("v1/cas/")}
"""Key -> content of everything that is parsed."""
[TREE] = [key[-64:] for key in OBJECTS if key.startswith("v1/tree/")]


def survey(key: str, data: bytes) -> int:
    """Read a store in which `key` holds `data` in every way, and repair it; the number of problems that were found."""
    backend = MemoryBackend()
    for name, content in {**FILLED, key: data}.items():
        backend.put(name, content)
    store = Store(backend, at_once=1)
    Marks(store, 10.0, 5.0).refresh()
    json.dumps([kept.describe() for kept in pins(store)] + [action.describe() for action in read_trail(backend)])
    list(store.runs()), list(store.runs(under_way=True)), list(store.records("toy"))
    with tempfile.TemporaryDirectory() as folder:
        for act in (
            lambda: find_record(store, KEY[:12]),
            lambda: store.lookup("toy", KEY),
            lambda: store.materialise(TREE, Path(folder, "into")),
            lambda: store.read(TREE, "large"),
        ):
            try:
                act()
            except StoreError:
                pass
        assert {path.name for path in Path(folder).rglob("*") if path.is_file()} <= {"a", "large"}
    repaired = repair(store)
    json.dumps(repaired.describe())
    left = verify(store).findings
    assert not left, [str(finding) for finding in left]
    try:
        restore(store, KEY[:12])
    except StoreError:
        pass
    return len(repaired.verification.findings)
