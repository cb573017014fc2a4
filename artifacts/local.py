"""A store in a local folder, safe against crashes and against other processes on the same machine.

An object is written to a temporary file on the same file system, synced, and only then given its name, so that a kill at
any moment leaves the old object or the new one. Create-only is `link(2)`, which the kernel refuses when the name exists;
compare-and-swap reads, compares and renames under a lock (see `artifacts.file_lock`), and so does whoever replaces or
deletes such an object without a condition: between comparing and renaming nothing of it changes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from artifacts.backend import (
    MAX_OBJECT_BYTES,
    Entry,
    Object,
    Progress,
    check_named,
    get_each,
    local_file,
    write_at,
    wrong_size,
)
from artifacts.digest import digest_bytes, digest_file
from artifacts.errors import Conflict, Damaged, NotFound, StoreError, StoreUnavailable, TooLarge, Unreadable
from artifacts.file_lock import locked
from artifacts.stamp import Stamp

TEMPORARY = ".tmp"
FILE_MODE = 0o644
FOLDER_MODE = 0o755
"""Whatever the umask, only the owner writes: who can write into a store decides what its readers load."""
CHUNK_BYTES = 1 << 20
UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.EBADMSG, errno.EUCLEAN)
"""What reading one object fails with when that object is the trouble: its permissions, or the disk below it."""
NEVER_SWAPPED = ("v1/cas/", "v1/tree/", "v1/parts/", "v1/intent/", "v1/audit/")
"""Objects that nobody compares and swaps: they are named by content, or put once. No lock is taken for them."""
LEFTOVER_SECONDS = 86400.0
"""Age at which a temporary file is taken for one that a killed process left behind."""


class LocalBackend:
    """Objects as files under `root`; the key is the relative path."""

    def __init__(self, root: Path) -> None:
        try:
            self.root = root.expanduser().resolve()
        except (RuntimeError, OSError) as error:
            raise StoreError(
                f"the store {root} cannot be found: {error}; expected a folder, or the name of one"
            ) from error
        self.url = str(self.root)
        if os.path.exists(self.root) and not os.path.isdir(self.root):
            raise StoreError(f"the store {self.url} is a file; expected a folder, or the name of one to be made")
        self._swept = False
        self._lasting: set[Path] = set()
        """Folders whose entry in the folder above is synced."""

    def get(self, key: str, *, limit: int = MAX_OBJECT_BYTES) -> Object:
        with self._errors(key, "read"), self._open(key) as source:
            data = source.read(limit + 1)
            if len(data) > limit:
                found = os.fstat(source.fileno()).st_size
                raise TooLarge(key, self.url, limit, found, digest_file(self._path(key)))
        return Object(data, digest_bytes(data))

    def get_many(self, keys: Iterable[str], *, limit: int = MAX_OBJECT_BYTES) -> dict[str, Object | None]:
        return get_each(self, keys, limit)

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        with self._errors(key, "write"):
            temporary = self._temporary()
            try:
                with _create(temporary) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if if_match is not None:
                    self._swap(key, temporary, if_match)
                elif if_absent:
                    self._publish(temporary, self._path(key), replace=False)
                else:
                    with self._guard(key):
                        self._publish(temporary, self._path(key), replace=True)
            finally:
                temporary.unlink(missing_ok=True)
        return digest_bytes(data)

    def put_file(
        self,
        key: str,
        path: Path,
        *,
        offset: int = 0,
        size: int | None = None,
        progress: Progress | None = None,
        hashed: Stamp | None = None,
    ) -> None:
        with self._errors(key, "write"):
            temporary = self._temporary()
            try:
                with open(path, "rb") as source, _create(temporary) as file:
                    source.seek(offset)
                    hasher = blake3()
                    for chunk in _chunks(source, size):
                        file.write(chunk)
                        hasher.update(chunk)
                        if progress is not None:
                            progress(len(chunk))
                    file.flush()
                    check_named(key, hasher.hexdigest(), path)
                    os.fchmod(file.fileno(), 0o444)
                    os.fsync(file.fileno())
                self._publish(temporary, self._path(key), replace=True)
            finally:
                temporary.unlink(missing_ok=True)

    def get_file(
        self,
        key: str,
        path: Path,
        *,
        offset: int | None = None,
        size: int | None = None,
        progress: Progress | None = None,
    ) -> str:
        with self._errors(key, "read"), self._open(key) as source:
            length = os.fstat(source.fileno()).st_size
            if size is not None and length != size:
                raise wrong_size(key, self.url, size, length)
            if offset is None and self._link(key, path):
                if progress is not None:
                    progress(length)
                return self._digest_of_link(key, path)
            # Never truncates what is there: it may be a link to an object.
            with local_file(path):
                file = os.open(path, os.O_WRONLY | os.O_CREAT, FILE_MODE)
            try:
                hasher, done = blake3(), offset or 0
                for chunk in _chunks(source, None):
                    with local_file(path):
                        write_at(file, chunk, done)
                    done += len(chunk)
                    hasher.update(chunk)
                    if progress is not None:
                        progress(len(chunk))
            finally:
                os.close(file)
            return hasher.hexdigest()

    def _link(self, key: str, path: Path) -> bool:
        """Make `path` another name of the object, which is read-only; False where the file system cannot."""
        with local_file(path):
            path.unlink(missing_ok=True)
        source = self._path(key)
        try:
            os.link(source, path)
        except OSError as error:
            if error.errno == errno.ENOENT:
                if source.exists():
                    with local_file(path):
                        raise
                raise
            return False
        return True

    def _digest_of_link(self, key: str, path: Path) -> str:
        try:
            return digest_file(path)
        except FileNotFoundError:
            with local_file(path):
                raise
        except EOFError as error:
            raise Damaged(f"{key} in the store {self.url} became shorter while it was read") from error

    def size(self, key: str) -> int | None:
        try:
            with self._errors(key, "stat"):
                return self._path(key).stat().st_size
        except NotFound:
            return None

    def sizes(self, keys: Iterable[str]) -> dict[str, int | None]:
        return {key: self.size(key) for key in keys}

    def list(self, prefix: str) -> Iterator[Entry]:
        above = prefix.rpartition("/")[0]
        folder = self._path(above) if above else self.root
        for parent, folders, files in os.walk(folder, onerror=self._listing_error):
            folders.sort()
            base = "" if (relative := Path(parent).relative_to(self.root).as_posix()) == "." else f"{relative}/"
            for key in sorted(key for name in files if (key := f"{base}{name}").startswith(prefix)):
                try:
                    status = os.lstat(os.path.join(parent, key[len(base) :]))
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield Entry(key, status.st_size, status.st_mtime)

    def delete(self, key: str) -> None:
        with self._errors(key, "delete"):
            path = self._path(key)
            if path.exists():
                with self._guard(key):
                    path.unlink(missing_ok=True)

    def delete_many(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.delete(key)

    def sweep(self, older_than_seconds: float, *, dry_run: bool = False) -> list[Entry]:
        """The lock files stay: a lock on a removed file excludes nobody."""
        left: list[Entry] = []
        if not (self.root / TEMPORARY).is_dir():
            return left
        with self._errors(TEMPORARY, "write"):
            oldest = self._now() - older_than_seconds
            for path in sorted((self.root / TEMPORARY).iterdir()):
                try:
                    status = path.stat()
                    if path.suffix == ".lock" or status.st_mtime > oldest:
                        continue
                    if not dry_run:
                        path.unlink()
                except FileNotFoundError:
                    continue
                left.append(Entry(f"{TEMPORARY}/{path.name}", status.st_size, status.st_mtime))
        return left

    def free_bytes(self) -> int | None:
        folder = self.root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with self._errors(str(folder), "stat"):
            return shutil.disk_usage(folder).free

    def _now(self) -> float:
        """The time by the clock of the file system, which may be another machine's."""
        temporary = self._temporary()
        temporary.touch(FILE_MODE)
        try:
            return temporary.stat().st_mtime
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        """The file of an object: plainly below the root, with no link on the way.

        Raises:
            StoreError: the key names something outside the store, or a link lies on the way to it.
        """
        parts = key.split("/")
        if not all(parts) or {".", ".."} & set(parts) or "\0" in key or len(key) > 1024:
            raise StoreError(f"{key[:200]!r} cannot be the key of an object in the store {self.url}")
        path = self.root
        for part in parts:
            path = path / part
            if path.is_symlink():
                raise StoreUnavailable(
                    f"{path.relative_to(self.root)} in the store {self.url} is a link, and links are not followed: "
                    "put the real file or folder there, or name another store with --store"
                )
        return path

    def _open(self, key: str) -> BinaryIO:
        """The object's file, open for reading. What is not a plain file is damage; a pipe must not be waited for."""
        file = open(os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")  # noqa: SIM115
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise Damaged(f"{key} in the store {self.url} is not a plain file; remove it by hand")
        return file

    def _temporary(self) -> Path:
        folder = self.root / TEMPORARY
        make_folders(folder)
        if not self._swept:
            self._swept = True
            self.sweep(LEFTOVER_SECONDS)
        return folder / uuid.uuid4().hex

    def _publish(self, temporary: Path, target: Path, *, replace: bool) -> None:
        self._make_folders(target.parent)
        if replace:
            os.replace(temporary, target)
        else:
            try:
                os.link(temporary, target)
            except FileExistsError as error:
                raise Conflict(f"{target.relative_to(self.root)} already exists in {self.url}") from error
        _sync(target.parent)

    def _make_folders(self, folder: Path) -> None:
        """Make a folder below the root whose name outlasts a power cut, even if who made it died before it had seen to that."""
        make_folders(folder)
        while folder not in self._lasting:
            _sync_if_readable(folder.parent)
            self._lasting.add(folder)
            if folder == self.root:
                return
            folder = folder.parent

    @contextmanager
    def _guard(self, key: str) -> Iterator[None]:
        """For the length of the block nobody else swaps, replaces or deletes this object."""
        if key.startswith(NEVER_SWAPPED):
            yield
            return
        make_folders(self.root / TEMPORARY)
        name = f"swap-{digest_bytes(os.fsencode(key))[:2]}.lock"
        with locked(self.root / TEMPORARY / name, f"write {key} in the store {self.url}"):
            yield

    def _swap(self, key: str, temporary: Path, if_match: str) -> None:
        target = self._path(key)
        with self._guard(key):
            try:
                current = digest_file(target)
            except FileNotFoundError:
                current = None
            if current != if_match:
                raise Conflict(f"{key} in {self.url} changed since it was read")
            os.replace(temporary, target)
        _sync(target.parent)

    @contextmanager
    def _errors(self, key: str, verb: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if verb == "write":
                raise StoreUnavailable(self._explain(key, verb, error)) from error
            raise NotFound(f"{key} in {self.url}") from error
        except OSError as error:
            if verb == "read" and error.errno in UNREADABLE:
                reason = error.strerror or str(error)
                raise Unreadable(self._explain(key, verb, error), reason) from error
            raise StoreUnavailable(self._explain(key, verb, error)) from error

    def _explain(self, key: str, verb: str, error: OSError) -> str:
        reason = error.strerror or str(error)
        if isinstance(error.filename, str) and not error.filename.startswith(self.url):
            reason = f"{error.filename}: {reason}"
        advice = "check its permissions and free space, or name another store with --store"
        if error.errno == errno.EISDIR:
            advice = "there should be a file; remove that folder by hand"
        return f"cannot {verb} {key} in the store {self.url}: {reason}; {advice}"

    def _listing_error(self, error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise StoreUnavailable(f"cannot list {error.filename} in the store {self.url}: {error.strerror}") from error


def make_folders(folder: Path) -> None:
    """Make a folder and those above it that are missing, writable by their owner alone, and sync the names of the new ones."""
    if folder.is_dir():
        return
    try:
        folder.mkdir(FOLDER_MODE, exist_ok=True)
    except FileNotFoundError:
        make_folders(folder.parent)
        folder.mkdir(FOLDER_MODE, exist_ok=True)
    _sync_if_readable(folder.parent)


def _sync(folder: Path) -> None:
    """Make the names in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_if_readable(folder: Path) -> None:
    with contextlib.suppress(PermissionError):
        _sync(folder)


def _create(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE), "wb")


def _chunks(source: BinaryIO, size: int | None) -> Iterator[bytes]:
    """The next `size` bytes of a file, or all the rest, in pieces."""
    left = size
    while left is None or left > 0:
        chunk = source.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
        if not chunk:
            return
        yield chunk
        left = None if left is None else left - len(chunk)
