"""A store that would fill the disk or the memory with a few bytes: refused before, with nothing left behind."""

from __future__ import annotations

import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from artifacts import space, tables
from artifacts.checkpoints import StoredCheckpoints
from artifacts.digest import canonical_json, digest_bytes, seal
from artifacts.errors import Damaged, StoreError, StoreUnavailable
from artifacts.packing import MAX_BYTES, pack, unpack
from artifacts.store import Store
from artifacts.tables import read_table
from artifacts.trees import object_key
from tests.hostile import KEY, LATEST, outside, put_listing, row, tree

ZEROS = bytes(MAX_BYTES)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty local store."""
    return Store.open(str(tmp_path / "store"))


def put_bomb(store: Store, parts: int) -> tuple[str, int]:
    """A file of `parts` times 64 MiB that is one small blob, named over and over; (its tree, its size)."""
    blob = pack(ZEROS, 4)
    assert blob is not None and len(blob) < 10_000
    store.backend.put(object_key("cas", digest_bytes(blob)), blob)
    file, rows = "f" * 64, [[MAX_BYTES, digest_bytes(blob), len(blob), 4]] * parts
    store.backend.put(object_key("parts", file), seal({"file": file, "parts": rows}))
    return put_listing(store, tree([row("a", MAX_BYTES * parts, file)])), MAX_BYTES * parts


def full(folder: object) -> object:
    """A disk with two bytes left."""
    return namedtuple("Usage", "total used free")(10, 8, 2)


def test_parts_that_unpack_to_more_than_the_disk_holds(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few kilobytes that stand for a gigabyte are refused by their sum, before a byte is written."""
    digest, size = put_bomb(store, 16)
    monkeypatch.setattr(space.shutil, "disk_usage", full)
    with pytest.raises(StoreUnavailable, match=f"{size:,} bytes are to be written there"):
        store.materialise(digest, tmp_path / "into")
    with pytest.raises(StoreError, match="at most .* are read into memory"):
        store.read(digest, "a")
    assert outside(tmp_path) == {"into"}


def test_parts_that_are_not_what_the_file_is(store: Store, tmp_path: Path) -> None:
    """What fits is unpacked a part at a time in bounded memory, and refused, since the whole has another digest."""
    digest, _ = put_bomb(store, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Damaged, match="does not match its digest, though all of its parts do"):
        Store(store.backend, at_once=1).materialise(digest, tmp_path / "into")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB
    assert outside(tmp_path) == {"into"}


@pytest.mark.parametrize("size", [4, 1 << 10, MAX_BYTES - 4])
def test_a_packed_part_that_holds_more_than_it_says(size: int) -> None:
    """Unpacking stops at the size that the parts list gives, whatever the compressed bytes would become."""
    bomb = pack(ZEROS, 4)
    assert bomb is not None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"not the packed form of {size} bytes"):
        unpack(bomb, size, 4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_a_packed_part_that_holds_less_than_it_says() -> None:
    """Nothing is filled in where the compressed bytes end early."""
    short = pack(bytes(1 << 10), 4)
    assert short is not None
    with pytest.raises(ValueError, match="not the packed form of 65536 bytes"):
        unpack(short, 1 << 16, 4)


def test_what_does_not_fit_is_not_begun(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees and checkpoints say what they need; links into a local store need nothing."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"one")
    remote = Store.open("memory://nothing-fits")
    digests = [at.put_tree(tmp_path / "out").digest for at in (store, remote)]
    StoredCheckpoints(store.backend, KEY, 1).save(5, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "restored").mkdir()
    monkeypatch.setattr(space.shutil, "disk_usage", full)
    store.materialise(digests[0], tmp_path / "linked")
    for act in (
        lambda: remote.materialise(digests[1], tmp_path / "into"),
        lambda: StoredCheckpoints(store.backend, KEY, 1).restore(tmp_path / "restored"),
    ):
        with pytest.raises(StoreUnavailable, match="3 bytes are to be written there, and 2 are free"):
            act()
    assert outside(tmp_path) == {"linked", "linked/a", "into", "restored"}


def test_a_checkpoint_of_another_size_is_not_received(store: Store, tmp_path: Path) -> None:
    """A file of a checkpoint that is longer than its manifest says is not read at all."""
    name = "000000005-0123456789ab"
    (tmp_path / "into").mkdir()
    manifest = canonical_json({"step": 5, "seconds": 1.0, "files": [row("a")]})
    store.backend.put(f"v1/wip/{KEY}/{name}/manifest.json", manifest)
    store.backend.put(f"v1/wip/{KEY}/{name}/files/a", bytes(1 << 20))
    store.backend.put(
        LATEST, seal({"fence": 1, "checkpoints": [{"name": name, "step": 5, "digest": digest_bytes(manifest)}]})
    )
    assert StoredCheckpoints(store.backend, KEY, 2).restore(tmp_path / "into") is None
    assert outside(tmp_path) == {"into"}


def write_bomb(path: Path, rows: int, text: str, nested: bool = False) -> None:
    """A table in which one text is stored once and stands in every row."""
    indices = pyarrow.array([0] * rows, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))
    if nested:
        column = pyarrow.ListArray.from_arrays(pyarrow.array(range(rows + 1), pyarrow.int32()), column)
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), path, compression="zstd", store_schema=False)


@pytest.mark.parametrize("nested", [False, True])
def test_a_table_that_repeats_one_long_text(nested: bool, tmp_path: Path) -> None:
    """A file of some kilobytes that stands for 20 GB of text is refused, in little memory."""
    path = tmp_path / "rows.parquet"
    write_bomb(path, 20_000, "x" * (1 << 20), nested)
    assert path.stat().st_size < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(StoreError, match=r"rows.parquet: its rows need .* bytes or more, too many for one table"):
        read_table(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_a_table_of_many_rows_of_nothing(tmp_path: Path) -> None:
    """Rows that need no bytes in the file still need some in memory, and are counted before they are read."""
    rows = tables.MAX_TABLE_BYTES // tables.ROW_BYTES + 1
    table = pyarrow.table({"a": pyarrow.nulls(rows, pyarrow.int8())})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", compression="zstd")
    with pytest.raises(StoreError, match="too many for one table"):
        read_table(tmp_path / "rows.parquet")


def test_an_honest_table_is_read_as_it_is(tmp_path: Path) -> None:
    """Repeated texts, lists, mappings and nulls come back; only the columns that are asked for are counted."""
    rows = [{"a": "x" * 50, "t": ["p", None, "q"][: n % 4], "m": {"k": str(n)}, "n": n} for n in range(5000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", store_schema=False)
    assert read_table(tmp_path / "rows.parquet") == rows
    assert read_table(tmp_path / "rows.parquet", ["n"])[-1] == {"n": 4999}
