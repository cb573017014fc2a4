"""Removing what is damaged and has no copy: it would harm the next stage that makes the same bytes, or stop collections.

Nothing is removed because it was found damaged once: it is looked at again when nobody can come to rely on it any more, and
what has come to its place since is left. Bytes that no digest names are kept in the trash.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from artifacts.audit import Finding
from artifacts.audit_roots import root_problem
from artifacts.backend import Backend
from artifacts.checkpoints import StoredCheckpoints
from artifacts.condemned import remove_damaged
from artifacts.digest import canonical_json, parse_canonical
from artifacts.download import wrong_objects
from artifacts.errors import Damaged, LeaseLost, NotFound
from artifacts.lease import Lease
from artifacts.mark import unique
from artifacts.store import Store
from artifacts.trail import PINS, note
from artifacts.trees import File, Tree
from artifacts.unreadable import Tolerant

BY_DIGEST = ("blob", "tree", "parts list")
"""Kinds of findings whose keys say what the bytes have to be."""


class Discard:
    """Removes from one store; `scratch` has room for what is looked at again."""

    def __init__(self, store: Store, backend: Tolerant, scratch: Path, say: Callable[[str], None]) -> None:
        self._store = store
        self._tolerant = backend
        self._scratch = scratch
        self._say = say

    def damaged(self, finding: Finding) -> bool:
        """Remove what is still damaged, and no other object that has come to its place; False if there is one."""
        by_digest = finding.kind in BY_DIGEST
        check = self.is_damaged if by_digest else lambda key: self._is_damaged_root(finding)
        backend, clock = self._store.backend, self._store.clock
        removed = remove_damaged(backend, [finding.key], check, clock, spare_announced=True, say=self._say)
        return bool(removed) or backend.size(finding.key) is None

    def checkpoints(self, key: str) -> bool:
        """Have the stage go on from the checkpoint before, or from the start; False, and nothing is done, beside a worker."""
        backend, stage_key = self._store.backend, key.split("/")[2]
        checkpoints = StoredCheckpoints(backend, stage_key, 0)
        lost = key.endswith("/LATEST") and self._tolerant.is_unreadable(key)  # the key of a checkpoint is a folder
        lease = Lease(backend, stage_key, last_fence=(lambda: 0) if lost else checkpoints.stored_fence)
        if not lease.try_acquire():
            return False
        try:
            checkpoints.fence = lease.fence
            if lost:
                backend.delete(key)
            checkpoints.keep_intact(self._scratch)
        except LeaseLost:
            return False
        finally:
            lease.release()
        return True

    def _is_damaged_root(self, finding: Finding) -> bool:
        """True when an object that is not named by a digest is still damaged; its bytes are then kept in the trash."""
        backend = self._store.backend
        stored = backend.get_many([finding.key])[finding.key]
        if stored is None or root_problem(finding.key, stored.data) is None:
            return False
        name = unique("v1/trash/damaged-")
        backend.put(f"{name}.bytes", stored.data)
        backend.put(f"{name}.json", canonical_json({"reason": finding.problem, "was": finding.key}))
        if finding.kind == "pin":
            note_unpinned(backend, finding)
        return True

    def is_damaged(self, key: str) -> bool:
        """True when an object that is named by a digest does not match it."""
        backend, digest = self._store.backend, key[-64:]
        if not key.startswith("v1/parts/"):
            copy = self._scratch / f"look-{digest}"
            try:
                return backend.get_file(key, copy) != digest
            except NotFound:
                return False
            except Damaged:
                return True
            finally:
                copy.unlink(missing_ok=True)
        stored = backend.get_many([key])[key]
        try:
            size = sum(row[0] for row in parse_canonical(stored.data)["parts"]) if stored is not None else 0
        except (ValueError, TypeError, KeyError):
            return True
        return stored is not None and key in set(wrong_objects(self._store, Tree.of([File("file", size, digest)])))


def note_unpinned(backend: Backend, finding: Finding) -> None:
    """Say in the trail that a pin is gone, so that nobody misses it."""
    label = finding.key.removeprefix(PINS).removesuffix(".json")
    note(backend, "unpin", f"the pin was damaged: {finding.problem}", label=label)
