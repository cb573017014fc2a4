"""Looking for an intact copy of something that a store has lost: in folders on this machine, and in other stores.

A folder is searched by size first, so that only files of the right size are read. A blob that is a part of a file (see
`artifacts.trees`) is also cut out of a copy of that file. Whatever is found has the digest that was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from artifacts.backend import Object
from artifacts.digest import digest_file
from artifacts.download import download
from artifacts.errors import Damaged
from artifacts.store import Store
from artifacts.trees import File, Tree

MOST_FILES = 1000
"""A folder with more is not taken for an output whose listing is lost."""


class Copies:
    """Where to look: `folders` and `stores`, with room for downloads in `scratch`."""

    def __init__(self, folders: Sequence[Path], stores: Sequence[Store], scratch: Path) -> None:
        self._folders = list(folders)
        self._stores = list(stores)
        self.scratch = scratch
        """A folder for downloads."""
        self._by_size: dict[int, list[Path]] | None = None
        self._digests: dict[Path, str] = {}
        self._trees: dict[str, tuple[bytes, str]] | None = None

    def file(self, digest: str, size: int) -> tuple[Path, str] | None:
        """A file with these bytes, and where it is from; None if there is none. It may be a download in the scratch folder."""
        for path in self._of_size(size):
            if self._digest(path) == digest:
                return path, str(path)
        for store in self._stores:
            try:
                download(store, Tree("", (File(digest, size, digest),)), self.scratch)
                return self.scratch / digest, store.backend.url
            except Damaged:
                continue
        return None

    def object(self, key: str) -> tuple[Object, str] | None:
        """A small object as another store has it; the caller checks what it is."""
        for store in self._stores:
            stored = store.backend.get_many([key])[key]
            if stored is not None:
                return stored, store.backend.url
        return None

    def tree(self, digest: str) -> tuple[bytes, str] | None:
        """The listing of a tree: another store's, or that of a folder which has exactly these files."""
        for store in self._stores:
            try:
                return store.tree(digest).listing, store.backend.url
            except Damaged:
                continue
        if self._trees is None:
            self._trees = {}
            for folder in self._folders:
                for parent, _, _ in os.walk(folder):
                    if (found := self._listing(Path(parent))) is not None:
                        self._trees[found.digest] = (found.listing, parent)
        return self._trees.get(digest)

    def done(self, path: Path) -> None:
        """The copy is not needed any more."""
        if path.parent == self.scratch:
            path.unlink(missing_ok=True)

    def _of_size(self, size: int) -> list[Path]:
        if self._by_size is None:
            self._by_size = {}
            for folder in self._folders:
                for parent, _, names in os.walk(folder):
                    for path in (Path(parent, name) for name in names):
                        if path.is_file() and not path.is_symlink():
                            self._by_size.setdefault(path.stat().st_size, []).append(path)
        return self._by_size.get(size, [])

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            try:
                self._digests[path] = digest_file(path)
            except OSError:
                self._digests[path] = ""
        return self._digests[path]

    def _listing(self, folder: Path) -> Tree | None:
        """The tree that a folder would be stored as; None for one with too many files to be an output."""
        paths = [path for path in islice(folder.rglob("*"), MOST_FILES) if path.is_file()]
        if len(paths) == MOST_FILES:
            return None
        rows = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
        return Tree.of(File(name, path.stat().st_size, self._digest(path)) for name, path in rows)
