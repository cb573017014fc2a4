"""Mid-stage checkpoints in the store: data first, then its manifest, then the LATEST pointer by compare-and-swap.

LATEST names the newest checkpoint and the one before, so that a damaged newest one costs one interval and not the
stage. It carries the fence of the newest lease: a worker that lost its lease cannot move it, and one whose stage was
committed meanwhile, so that nothing is left here, is told so by its lease before it writes.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from artifacts.backend import Backend, local_file, put_own
from artifacts.digest import canonical_json, digest_bytes, digest_file, is_digest, parse_canonical, seal, unseal
from artifacts.errors import Conflict, Damaged, LeaseLost, NotFound, StoreError, TooLarge
from artifacts.lease import checked_fence
from artifacts.space import require_space
from artifacts.trees import File, check_files, check_path, check_together

NAME = re.compile(r"[0-9]{9,19}-[0-9a-f]{12}")
KEPT = 2
"""Checkpoints that LATEST names."""


@dataclass(slots=True)
class StoredCheckpoints:
    """The checkpoints of one stage run, under `v1/wip/<key>/`."""

    backend: Backend
    key: str
    fence: int
    seconds: float = 0.0
    """Wall time the body has run so far, earlier attempts included; stored with each checkpoint."""
    confirm: Callable[[], None] = lambda: None
    """Raises `LeaseLost` when the lease under which this worker writes is no longer its own."""

    def claim(self) -> None:
        """Shut out every worker with an older fence, before this one has saved anything. Call it with the lease in hand.

        Raises:
            LeaseLost: a worker with a later fence has claimed them already.
        """
        if self.fence > 1:
            self._advance(None)

    def stored_fence(self) -> int:
        """The fence in LATEST; 0 when nothing is stored."""
        return self._pointers()[2]

    def save(self, step: int, directory: Path) -> None:
        """Store a copy of `directory` as the state after `step` steps and make it the newest.

        Raises:
            LeaseLost: a worker with a later fence has written already, or the lease was lost; nothing of it is left.
            StoreError: `directory` is missing or holds no file, so there is no state to come back to; or it holds what could
                not be restored: a name that is not portable, two that differ in case only, or a file that is being written.
        """
        files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
        if not files:
            raise StoreError(f"checkpoint at step {step}: {directory} is missing or holds no file")
        _check_names(step, files)
        self.confirm()
        name = f"{step:09d}-{uuid.uuid4().hex[:12]}"
        rows = []
        for relative, path in sorted(files.items()):
            rows.append([relative, *self._put(f"{self._root}/{name}/files/{relative}", path)])
        manifest = canonical_json({"step": step, "seconds": self.seconds, "files": rows})
        self.backend.put(f"{self._root}/{name}/manifest.json", manifest)
        try:
            self.confirm()
            dropped = self._advance({"name": name, "step": step, "digest": digest_bytes(manifest)})
        except LeaseLost:
            self._delete(name)
            raise
        for old in dropped:
            self._delete(old)

    def _put(self, key: str, path: Path) -> tuple[int, str]:
        """Store a file; its size and digest."""
        with local_file(path):
            before = path.stat()
            digest = digest_file(path)
        self.backend.put_file(key, path, size=before.st_size)
        with local_file(path):
            after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise StoreError(
                f"the file {path} of a checkpoint was changed while it was saved; save it once it is complete"
            )
        return before.st_size, digest

    def restore(self, into: Path) -> int | None:
        """Copy the newest intact checkpoint into the empty folder `into`; its step, or None if there is none."""
        for pointer in self._pointers()[1]:
            try:
                return self._load(pointer, into)
            except (Damaged, NotFound):
                shutil.rmtree(into)
                into.mkdir()
        return None

    def keep_intact(self, room: Path) -> None:
        """Forget the checkpoints that cannot be read, trying each in the folder `room`. Call it with the lease in hand.

        Raises:
            LeaseLost: a worker with a later fence has claimed them already.
        """
        etag, pointers, fence = self._pointers()
        if fence > self.fence:
            raise LeaseLost(f"a later worker (fence {fence}) writes the checkpoints of {self.key[:12]} now")
        intact = [pointer for pointer in pointers if self._is_intact(pointer, room)]
        body = seal({"fence": self.fence, "checkpoints": intact})
        try:
            put_own(self.backend, f"{self._root}/LATEST", body, if_absent=etag is None, if_match=etag)
        except (Conflict, NotFound) as error:
            raise LeaseLost(f"the checkpoints of {self.key[:12]} were changed by something else") from error
        kept = tuple(f"{self._root}/{pointer['name']}/" for pointer in intact)
        for entry in list(self.backend.list(f"{self._root}/")):
            if not entry.key.startswith((*kept, f"{self._root}/LATEST")):
                self.backend.delete(entry.key)

    def _is_intact(self, pointer: dict[str, object], room: Path) -> bool:
        folder = room / uuid.uuid4().hex
        folder.mkdir()
        try:
            self._load(pointer, folder)
            return True
        except (Damaged, NotFound):
            return False
        finally:
            shutil.rmtree(folder)

    def discard(self) -> None:
        """Remove every checkpoint of this key, LATEST first, once the stage is committed."""
        self.backend.delete(f"{self._root}/LATEST")
        self._delete("")

    @property
    def _root(self) -> str:
        return f"v1/wip/{self.key}"

    def _pointers(self) -> tuple[str | None, list[dict[str, object]], int]:
        try:
            stored = self.backend.get(f"{self._root}/LATEST")
        except NotFound:
            return None, [], 0
        except TooLarge as error:
            return error.etag, [], 0
        try:
            return stored.etag, *read_pointers(stored.data)
        except ValueError:
            return stored.etag, [], 0

    def _advance(self, newest: dict[str, object] | None) -> list[str]:
        """Put `newest` before the checkpoints in LATEST, under this fence; the names of those that fell out."""
        dropped: list[str] = []
        while True:
            etag, pointers, fence = self._pointers()
            if newest is not None and newest["name"] in [p["name"] for p in pointers]:
                return dropped
            if fence > self.fence:
                raise LeaseLost(f"a later worker (fence {fence}) writes the checkpoints of {self.key[:12]} now")
            kept = pointers if newest is None else [newest, *pointers[: KEPT - 1]]
            body = seal({"fence": self.fence, "checkpoints": kept})
            dropped = [str(p["name"]) for p in pointers if p not in kept]
            try:
                self.backend.put(f"{self._root}/LATEST", body, if_absent=etag is None, if_match=etag)
            except (Conflict, NotFound):
                continue  # it changed, or the reply to this very write was lost: look again
            return dropped

    def _load(self, pointer: dict[str, object], into: Path) -> int:
        base = f"{self._root}/{pointer['name']}"
        manifest = self.backend.get(f"{base}/manifest.json").data
        if digest_bytes(manifest) != pointer["digest"]:
            raise Damaged(f"{base}/manifest.json does not match its digest")
        step, seconds, files = read_manifest(manifest)
        sizes = self.backend.sizes([f"{base}/files/{file.path}" for file in files])
        if any(sizes[f"{base}/files/{file.path}"] != file.size for file in files):
            raise Damaged(f"{base}: a file is missing, or is longer or shorter than its manifest says")
        require_space(into, sum(file.size for file in files))
        for file in files:
            key, target = f"{base}/files/{file.path}", into / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.backend.get_file(key, target, size=file.size) != file.digest:
                raise Damaged(f"{key} does not match its digest")
        self.seconds = seconds
        return step

    def _delete(self, name: str) -> None:
        for entry in list(self.backend.list(f"{self._root}/{name}/" if name else f"{self._root}/")):
            self.backend.delete(entry.key)


def _check_names(step: int, names: Collection[str]) -> None:
    """Refuse what `read_manifest` would: a checkpoint that nobody can restore is none."""
    try:
        for name in names:
            check_path(name)
        check_together(sorted(names))
    except (StoreError, ValueError) as error:
        raise StoreError(f"the checkpoint at step {step} could not be restored: {error}; rename its files") from error


def read_pointers(data: bytes) -> tuple[list[dict[str, object]], int]:
    """(what LATEST names, newest first; its fence).

    Raises:
        ValueError: the bytes are not a LATEST.
    """
    try:
        body = unseal(data)
        pointers = [{k: p[k] for k in ("name", "step", "digest")} for p in body["checkpoints"][:KEPT]]
        if not all(NAME.fullmatch(p["name"]) and is_digest(p["digest"]) for p in pointers):
            raise ValueError("a name or digest is malformed")
        return pointers, checked_fence(body["fence"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a pointer to checkpoints: {error!r}") from error


def read_manifest(data: bytes) -> tuple[int, float, tuple[File, ...]]:
    """(step, seconds of running so far, files) of a checkpoint's manifest.

    Raises:
        Damaged: the bytes are not a manifest.
    """
    try:
        body = parse_canonical(data)
        step, seconds = body["step"], body["seconds"]
        if (
            type(step) is not int
            or not 0 <= step < 2**53
            or type(seconds) not in (int, float)
            or not 0 <= seconds < 1e10
        ):
            raise ValueError("bad step or seconds")
        return step, float(seconds), check_files(body["files"])
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"a checkpoint's manifest is not valid: {str(error)[:300]}") from error
