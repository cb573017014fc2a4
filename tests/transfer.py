"""A process that stores or reads something large, to be killed: `python -m tests.transfer WAY STORE NAME PATH`.

`put` stores the folder PATH as a tree, `get` reads the tree NAME into the folder PATH. `plain get` and `plain put` move the
object NAME (bucket and key) to and from the file PATH as s3fs does by itself. Prints `done` at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from artifacts.store import Store


def plain_s3fs(**settings: Any) -> Any:
    """s3fs as one uses it without knowing its traps, but in parts of 16 MiB, and not one shared by the whole process."""
    import s3fs

    return s3fs.S3FileSystem(skip_instance_cache=True, default_block_size=16 << 20, max_concurrency=4, **settings)


def plain_path(url: str, key: str) -> str:
    """What s3fs calls the object `key` of the store at `url`."""
    return f"{url.removeprefix('s3://')}/{key}"


def one_file(folder: Path, data: bytes) -> Path:
    """A new folder with one file."""
    folder.mkdir()
    (folder / "weights").write_bytes(data)
    return folder


def main() -> None:
    """Do what the command line says."""
    way, url, name, path = sys.argv[1:]
    if way == "put":
        Store.open(url).put_tree(Path(path))
    elif way == "get":
        Store.open(url).materialise(name, Path(path))
    elif way == "plain get":
        plain_s3fs().get_file(name, path)
    elif way == "plain put":
        plain_s3fs().put_file(path, name)
    else:
        raise SystemExit(f"unknown way {way!r}")
    print("done", flush=True)


if __name__ == "__main__":
    main()
