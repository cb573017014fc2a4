"""The inputs of a running stage: verified when they are read, and watched for as long as the stage reads them.

In a local store an input is another name of the store's own file, read-only. A process of root, or one that changes the
permissions, can write it nevertheless: into the store, and into what other stages have verified already. So the worker notes
every file's identity, size and time of last change, and takes nothing from a body whose inputs are not those any more.
"""

from __future__ import annotations

from pathlib import Path

from artifacts.backend import local_file
from artifacts.digest import digest_file
from artifacts.download import wrong_objects
from artifacts.errors import StoreError
from artifacts.local import LocalBackend
from artifacts.store import Store
from artifacts.trees import File
from artifacts.upload import Moved
from tasks.stage import StageError

Mark = tuple[int, int, int]
"""Inode, size and time of last change in ns."""


class Inputs:
    """Input trees in folders of their own under `folder`."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._marks: dict[str, dict[Path, Mark | None]] = {}

    def read(self, digest: str, listener: Moved | None = None) -> Path:
        """The folder with the files of a tree, each verified; the same one when asked again.

        Raises:
            Damaged, StoreUnavailable: as `Store.materialise`.
            StageError: a file was changed as soon as it had been verified.
        """
        into = self._folder / digest
        if digest in self._marks:
            return into
        with local_file(into):
            self._folder.mkdir(parents=True, exist_ok=True)
            clock = self._folder / ".began"
            clock.touch()
            began = clock.stat().st_mtime_ns
        tree = self._store.materialise(digest, into, listener)
        self._marks[digest] = {into / file.path: _mark(into / file.path) for file in tree.files}
        if any(_is_suspect(into, file, began) for file in tree.files):
            raise self._changed(digest, "while it was verified")
        return into

    def require_unchanged(self) -> None:
        """Refuse to go on once a file is not the one that was verified. Of a changed one the store's copy is dropped if wrong.

        Raises:
            StageError: names the file.
        """
        for digest, marks in self._marks.items():
            for path, mark in marks.items():
                if _mark(path) != mark:
                    raise self._changed(digest, f"while the stage ran ({path.relative_to(self._folder / digest)})")

    def _changed(self, digest: str, when: str) -> StageError:
        dropped = self._drop_wrong(digest)
        return StageError(
            f"an input, tree {digest[:12]}, was written {when}, so nothing of this attempt is kept: inputs are read-only, and "
            "may be the store's own files; copy what has to be changed into the work folder. "
            + (f"What it made wrong in the store was removed ({', '.join(dropped)}); " if dropped else "")
            + "run the same command again, which makes anew what is missing"
        )

    def _drop_wrong(self, digest: str) -> list[str]:
        """Remove what is wrong of a tree from a store whose files can be written so; the next reader has it made again."""
        dropped = []
        if isinstance(self._store.backend, LocalBackend):
            try:
                for key in wrong_objects(self._store, self._store.tree(digest)):
                    self._store.backend.delete(key)
                    dropped.append(key)
            except StoreError:
                pass  # whoever reads it next finds that out
        return dropped


def _mark(path: Path) -> Mark | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _is_suspect(into: Path, file: File, began: int) -> bool:
    """True for a link to the store that was written since reading began, and is not what it was when it was verified."""
    path = into / file.path
    try:
        status = path.lstat()
        return status.st_nlink > 1 and status.st_mtime_ns >= began and digest_file(path) != file.digest
    except (OSError, EOFError):
        return True
