"""Attempt folders: where a worker on this machine keeps a stage's output until the store has it.

    <scratch>/<key>/<fence>-<owner>/holder.json      the process that works here (see `artifacts.lease.this_process`)
                                    out/             what the body leaves
                                    finished.json    written and synced last: running time, and the digest of every file

Invariants: only its own process, or anyone once that process is gone, touches an attempt; an attempt counts as finished
only while every file has the digest that was noted; a finished attempt is kept until its output is in the store.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.digest import canonical_json, digest_file, is_digest, parse_canonical
from artifacts.errors import StoreError, StoreUnavailable
from artifacts.lease import is_gone, this_process
from artifacts.local import make_folders
from artifacts.trees import check_path, check_together

FINISHED = "finished.json"
HOLDER = "holder.json"
NAMELESS_SECONDS = 86400.0
"""Age at which an attempt without a holder file, whose worker died at its very start, is taken for abandoned."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a stage, in `folder`."""

    folder: Path

    @property
    def out(self) -> Path:
        """The folder that becomes the output tree."""
        return self.folder / "out"

    @property
    def seconds(self) -> float:
        """Running time of the body. Only of a finished attempt."""
        return _finished((self.folder / FINISHED).read_bytes())[0]

    def finish(self, seconds: float) -> None:
        """Note that the body ended well after `seconds` of running.

        Raises:
            StoreError: the output holds what no store takes, so it is not finished, and the body has to run again.
        """
        content = canonical_json({"seconds": seconds, "files": _listing(self.out)})
        temporary = self.folder / f"{FINISHED}.part"
        with _writing(self.folder):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / FINISHED)

    @contextmanager
    def work(self) -> Iterator[Path]:
        """A folder for the length of the body.

        Raises:
            StoreUnavailable: the scratch folder cannot be written.
        """
        with _writing(self.folder):
            temporary = tempfile.TemporaryDirectory(prefix="work-", dir=self.folder)
        with temporary as folder:
            yield Path(folder)

    def is_finished(self) -> bool:
        """True when the body ended well and every file still is as it left it."""
        try:
            return _finished((self.folder / FINISHED).read_bytes())[1] == _listing(self.out)
        except (OSError, ValueError, StoreError):
            return False

    def is_mine(self) -> bool:
        """True when this process made the attempt."""
        return self._holder() == this_process()

    def is_abandoned(self) -> bool:
        """True when the process that worked here is gone; never where the system cannot tell processes apart."""
        if (self.folder / HOLDER).exists():
            return is_gone(self._holder())
        try:
            return time.time() - self.folder.stat().st_mtime > NAMELESS_SECONDS
        except OSError:
            return False

    def remove(self) -> None:
        """Remove the folder; what cannot be removed is left to a later sweep."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def take(self) -> None:
        """Make it this process's own, so that nobody else on this machine removes it as one of a process that is gone."""
        temporary = self.folder / f"{HOLDER}.part"
        temporary.write_bytes(canonical_json(this_process()))
        os.replace(temporary, self.folder / HOLDER)

    def _holder(self) -> dict[str, object]:
        try:
            return _holder((self.folder / HOLDER).read_bytes())
        except (OSError, ValueError):
            return {}


def new_attempt(scratch: Path, key: str, name: str) -> Attempt:
    """A fresh attempt of this process.

    Raises:
        StoreUnavailable: the scratch folder cannot be written.
    """
    attempt = Attempt(scratch / key / name)
    with _writing(scratch):
        make_folders(attempt.folder.parent)
        attempt.folder.mkdir(0o700)
        (attempt.folder / HOLDER).write_bytes(canonical_json(this_process()))
        attempt.out.mkdir()
    return attempt


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"cannot write the scratch folder {folder}: {error.strerror or error}; check its permissions and free space"
        ) from error


def finished_attempt(scratch: Path, key: str) -> Attempt | None:
    """An attempt on this machine that finished the body and only failed to publish. It is this process's from now on."""
    for attempt in _attempts(scratch / key):
        if (attempt.is_mine() or attempt.is_abandoned()) and attempt.is_finished():
            try:
                attempt.take()
            except OSError:
                continue  # somebody removed it in this moment, its output being in the store
            return attempt
    return None


def clear(scratch: Path, key: str) -> None:
    """Remove what this process and processes that are gone left of a stage whose output is in the store."""
    for attempt in _attempts(scratch / key):
        if attempt.is_mine() or attempt.is_abandoned():
            attempt.remove()
    try:
        (scratch / key).rmdir()
    except OSError:
        pass  # another live worker's attempt is still in it


def sweep(scratch: Path) -> None:
    """Remove unfinished attempts, at any stage, whose process is gone."""
    try:
        homes = [path for path in scratch.iterdir() if is_digest(path.name)]
    except OSError:
        return
    for home in homes:
        for attempt in _attempts(home):
            if attempt.is_abandoned() and not (attempt.folder / FINISHED).exists():
                attempt.remove()


def _attempts(home: Path) -> Iterator[Attempt]:
    try:
        folders = sorted(path for path in home.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return
    for folder in folders:
        yield Attempt(folder)


def _finished(data: bytes) -> tuple[float, object]:
    """(seconds, listing) in the note of a finished attempt. Raises ValueError when the bytes are not one."""
    noted = parse_canonical(data)
    if not isinstance(noted, dict) or noted.keys() != {"seconds", "files"}:
        raise ValueError("expected the fields 'seconds' and 'files'")
    seconds = noted["seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < 1e10:
        raise ValueError(f"seconds is {str(seconds)[:80]!r}")
    return float(seconds), noted["files"]


def _holder(data: bytes) -> dict[str, object]:
    """The process named in a holder file. Raises ValueError when the bytes name none."""
    holder = parse_canonical(data)
    if not isinstance(holder, dict):
        raise ValueError("expected a mapping")
    return holder


def _listing(out: Path) -> list[list[Any]]:
    """(path, size, digest) of every file.

    Raises:
        StoreError: one cannot be stored, for what it is or for its name.
    """
    paths = {path.relative_to(out).as_posix(): path for path in out.rglob("*")}
    for name, path in paths.items():
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(f"output {name!r} is a link or a special file; only plain files can be stored")
    files = [name for name, path in sorted(paths.items(), key=lambda item: item[1]) if path.is_file()]
    for name in files:
        check_path(name)
    try:
        check_together(files)
    except ValueError as error:
        raise StoreError(f"the output cannot be stored: {error}") from error
    return [[name, paths[name].stat().st_size, digest_file(paths[name])] for name in files]
