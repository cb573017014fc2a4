"""Every parser of stored bytes: how to call it, which errors it declares, and a valid object to start from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from artifacts import tensors
from artifacts.backend import Object
from artifacts.checkpoints import StoredCheckpoints, read_manifest, read_pointers
from artifacts.digest import canonical_json, digest_bytes, parse_canonical, seal, unseal
from artifacts.errors import Damaged, NewerFormat, StoreError
from artifacts.intent import CONDEMNED, read_condemned
from artifacts.keep import read_pin
from artifacts.lease import Lease
from artifacts.mark import files_of
from artifacts.memory import MemoryBackend
from artifacts.packing import pack, unpack
from artifacts.pending import INDEX, Pending, read_index, read_shard
from artifacts.record import Record, payload_key
from artifacts.scratch import Attempt
from artifacts.store import Store, new_record, parse_run
from artifacts.tables import read_table, write_table
from artifacts.trail import TRAIL, read_trail
from artifacts.trees import File, Part, parts_list, parts_of, read_parts, read_tree
from flows.experiment import ConfigError, load_experiment
from flows.export import LISTING, ExportError, check_report_folder
from flows.hints import Hints
from flows.plan import compare
from tasks.models import check_plain
from tasks.plain_state import from_plain, to_plain
from tasks.stage import StageError
from tests.command import TINY

DIGEST = digest_bytes(b"one")
PAYLOAD = {"algorithm": 1, "stage": "toy", "code": "c", "config": {"x": 1, "y": [0.5, None]}, "inputs": {"a": DIGEST}}
KEY = payload_key(PAYLOAD)
OTHER = {**PAYLOAD, "code": "d", "config": {"x": {"z": 1}}, "inputs": {"a": "?", "b": KEY}}
RECORD = new_record(
    stage="toy", key=KEY, payload=PAYLOAD, output=DIGEST, size=1, node="n", symbols={"f::g": DIGEST},
    environment={"host": "h", "versions": {"torch": "2"}}, seconds=1.5, finished=2.5,
)  # fmt: skip
NAME = "000000005-0123456789ab"
LARGE = 4 << 20
TWO_PARTS = [Part(0, LARGE // 4, DIGEST), Part(LARGE // 4, 3 * LARGE // 4, KEY)]


def backend_with(key: str, data: bytes) -> MemoryBackend:
    """A store that holds one object."""
    backend = MemoryBackend()
    backend.put(key, data)
    return backend


def record(data: bytes) -> None:
    """A record is that of its key, whatever the bytes say, and comes back from its own encoding."""
    found = Record.decode(data, "toy", KEY)
    assert (found.stage, found.key, payload_key(found.payload)) == ("toy", KEY, KEY)
    assert Record.decode(found.encode(), "toy", KEY) == found
    assert all(str(difference) for difference in compare(found, OTHER, {"f::h": DIGEST}))


def tree(data: bytes) -> None:
    """A tree's listing is its bytes."""
    assert read_tree(Object(data, ""), digest_bytes(data), "memory://").listing == data


def parts(data: bytes) -> None:
    """The parts fill the file."""
    found = read_parts(Object(data, ""), File("a", LARGE, DIGEST), DIGEST, "memory://")
    assert sum(part.size for part in found) == LARGE and parts_list(DIGEST, found) == data


def lease(data: bytes) -> None:
    """Whatever lies there, taking the lease answers yes or no, and asking who holds it says so or raises LeaseLost."""
    assert Lease(backend_with(f"v1/lease/{KEY}.json", data), KEY).try_acquire() in (True, False)


def latest(data: bytes) -> None:
    """A pointer leads to a checkpoint or to none."""
    with tempfile.TemporaryDirectory() as folder:
        assert StoredCheckpoints(backend_with(f"v1/wip/{KEY}/LATEST", data), KEY, 2).restore(Path(folder)) is None


def pending(data: bytes) -> None:
    """A pending list names shards only."""
    assert all(key.startswith("v1/trash/pending-") for _, key in Pending(backend_with(INDEX, data)).shards)


def condemned(data: bytes) -> None:
    """A condemned list has one of three states."""
    found = read_condemned(backend_with(CONDEMNED, data))
    assert found is not None and found.state in ("held", "free", "damaged") and found.patience > 0


def trail(data: bytes) -> None:
    """An entry of the trail is readable and showable, or left out."""
    for entry in read_trail(backend_with(f"{TRAIL}000000000000001-x.json", data)):
        assert entry.at == entry.at and json.dumps(entry.describe())


def runs(data: bytes) -> None:
    """A run is listed or skipped."""
    skipped: list[str] = []
    assert len([*Store(backend_with("v1/run/x.json", data)).runs(skipped)]) + len(skipped) == 1


def scratch(data: bytes) -> None:
    """An attempt is finished only if the note matches what lies there, which is nothing."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("finished.json", "holder.json"):
            Path(folder, name).write_bytes(data)
        attempt = Attempt(Path(folder))
        assert (attempt.is_finished(), attempt.is_mine(), attempt.is_abandoned()) != (None, None, None)


def header(data: bytes) -> None:
    """A file of weights is cut inside itself, in order, or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        path.write_bytes(data)
        offsets = [cut.start for cut in tensors.cuts(path, len(data))]
        assert offsets == sorted(set(offsets)) and all(0 <= offset < len(data) for offset in offsets)


def table(data: bytes) -> None:
    """A table is rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.parquet")
        path.write_bytes(data)
        assert all(isinstance(row, dict) for row in read_table(path))


def experiment(data: bytes) -> None:
    """A config is an experiment."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.yaml")
        path.write_bytes(data)
        assert canonical_json(load_experiment(path, []).model_dump(mode="json"))


def trainer_state(data: bytes) -> None:
    """A trainer's state is rebuilt."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "optimizer.json").write_bytes(data)
        Path(folder, "optimizer.safetensors").write_bytes(WEIGHTS)
        from_plain(Path(folder))
        assert Path(folder, "optimizer.pt").is_file()


def canonical(data: bytes) -> None:
    """Canonical JSON is its value's only form."""
    assert canonical_json(parse_canonical(data)) == data


def packed(data: bytes) -> None:
    """A packed part has the size that was asked for."""
    assert len(unpack(data, len(NUMBERS), 4)) == len(NUMBERS)


def hints(data: bytes) -> None:
    """Hints are keys."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "hints.sqlite").write_bytes(data)
        known = Hints(Path(folder, "hints.sqlite"))
        assert known.load([KEY, DIGEST]).items() <= {(KEY, DIGEST)}
        known.remember({DIGEST: KEY})


def model_config(data: bytes) -> None:
    """A model's config asks for no code."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_bytes(data)
        check_plain(Path(folder))
        assert not json.loads(data).get("auto_map")


def report_listing(data: bytes) -> None:
    """The list of a report's files is believed for a list, and for nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, LISTING).write_bytes(data)
        check_report_folder(Path(folder))


def _made(make: Callable[[Path], Path]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return make(Path(folder)).read_bytes()


def _weights(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    save_file({"0": torch.zeros(4), "b": torch.ones(3, 3)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def _table(folder: Path) -> Path:
    import pyarrow

    columns = pyarrow.schema([("a", pyarrow.string()), ("n", pyarrow.int64())])
    write_table(folder / "a.parquet", [{"a": "x", "n": n} for n in range(20)], columns)
    return folder / "a.parquet"


def _hints(folder: Path) -> Path:
    Hints(folder / "hints.sqlite").remember({KEY: DIGEST})
    return folder / "hints.sqlite"


def _state(folder: Path) -> Path:
    import torch

    torch.save({"state": {0: {"step": torch.zeros(4)}}, "groups": [{"betas": (0.9, 0.99)}]}, folder / "optimizer.pt")
    to_plain(folder)
    return folder / "optimizer.json"


NUMBERS = bytes(range(4)) * 64
WEIGHTS = _made(_weights)
ROWS = [["a", 3, DIGEST], ["b/c", 0, DIGEST]]
FIELDS = {"schema": 1, **{name: value for name, value in asdict(RECORD).items() if value is not None}}
RUN = {"schema": 1, "experiment": "e", "complete": True, "config": {"a": 1},
       "nodes": {"n": {"stage": "toy", "key": KEY, "output": DIGEST}}}  # fmt: skip
PIN = {"schema": 1, "label": "x", "nodes": RUN["nodes"], "by": "u@h", "at": 1.5, "because": "b"}
HELD = {"state": "held", "owner": "o", "fence": 3, "beat": "b", "holder": {"pid": 1, "machine": "m"}}
POINTER = {"fence": 1, "checkpoints": [{"name": NAME, "step": 5, "digest": DIGEST}]}
SHARD = "v1/trash/pending-" + "0" * 32
Parser = tuple[Callable[[bytes], object], tuple[type[Exception], ...], bytes]
PARSERS: dict[str, Parser] = {
    "canonical JSON": (canonical, (ValueError,), canonical_json({"a": [1, 2.5, "\u00e9", None, True], "b": {}})),
    "sealed object": (unseal, (ValueError,), seal({"a": [1, 2.5], "z": {}})),
    "record": (record, (Damaged, NewerFormat), seal(FIELDS)),
    "record without check": (record, (Damaged,), canonical_json(FIELDS)),
    "tree": (tree, (Damaged,), canonical_json(ROWS)),
    "tree, for marking": (lambda d: files_of(d, bytes.fromhex(digest_bytes(d))), (ValueError,), canonical_json(ROWS)),
    "parts list": (parts, (Damaged,), parts_list(DIGEST, TWO_PARTS)),
    "parts list, for marking": (lambda d: parts_of(d, DIGEST), (ValueError,), parts_list(DIGEST, TWO_PARTS)),
    "run": (parse_run, (ValueError,), canonical_json(RUN)),
    "list of runs": (runs, (), canonical_json(RUN)),
    "lease": (lease, (), canonical_json({**HELD, "time_to_live": 30.0})),
    "checkpoint pointer": (latest, (), seal(POINTER)),
    "checkpoint pointer, for verification": (read_pointers, (ValueError,), seal(POINTER)),
    "pin": (read_pin, (ValueError,), seal(PIN)),
    "packed part": (packed, (ValueError,), pack(NUMBERS, 4) or b""),
    "hints": (hints, (), _made(_hints)),
    "config of a model": (model_config, (StageError,), b'{"architectures":["LlamaForCausalLM"],"auto_map":{}}'),
    "list of a report's files": (report_listing, (ExportError,), canonical_json([LISTING])),
    "checkpoint manifest": (read_manifest, (Damaged,), canonical_json({"step": 5, "seconds": 1.0, "files": ROWS})),
    "trainer state": (trainer_state, (ValueError,), _made(_state)),
    "condemned list": (condemned, (), canonical_json({**HELD, "keys": [f"v1/cas/{DIGEST}"]})),
    "pending list": (pending, (), canonical_json({"shards": [[1.0, SHARD]], "visited": 2.0})),
    "pending index": (read_index, (ValueError,), canonical_json({"shards": [[1.0, SHARD]], "visited": 2.0})),
    "pending shard": (read_shard, (ValueError,), canonical_json({"keys": ["v1/cas/x"]})),
    "trail": (trail, (), seal({"schema": 1, "action": "pin", "because": "b", "by": "u@h", "at": 1.5, "label": "x"})),
    "scratch notes": (scratch, (), canonical_json({"seconds": 1.0, "files": []})),
    "weights": (header, (), WEIGHTS),
    "table": (table, (StoreError,), _made(_table)),
    "experiment": (experiment, (ConfigError,), TINY.read_bytes()),
}  # fmt: skip
