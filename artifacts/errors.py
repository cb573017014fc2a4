"""What can go wrong with the store. Only `NotFound` means "not there"; everything else must never be read as a miss."""

from __future__ import annotations


class StoreError(Exception):
    """Base of every error of the store."""


class NotFound(StoreError):
    """No object has this key. The only error that a lookup may treat as a miss."""


class Conflict(StoreError):
    """A conditional write was refused: the object exists, or changed since it was read."""


class StoreUnavailable(StoreError):
    """The store did not answer, or refused: timeout, permission, disk full, server error. Nothing can be concluded."""


class NotSupported(StoreUnavailable):
    """The store says that it does not implement what was asked of it."""


class Unreadable(StoreUnavailable):
    """A local store has this object, and the disk or its permissions do not let it be read."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        """What the system says."""


class Damaged(StoreError):
    """Stored bytes are missing or are not what their name or record says they are."""

    def __init__(self, message: str, *, tree: str | None = None, record: tuple[str, str] | None = None) -> None:
        super().__init__(message)
        self.tree = tree
        """Digest of the tree that cannot be read, when known."""
        self.record = record
        """(stage, key) of the action record that cannot be read, when it is one: see `Store.withdraw_damaged`."""


class NewerFormat(StoreError):
    """A newer version of this program wrote this. It is intact, so nothing may be withdrawn or removed for it."""


class TooLarge(Damaged):
    """A stored object is longer than anything that belongs there, and was not read into memory."""

    def __init__(self, key: str, url: str, limit: int, found: int, etag: str) -> None:
        super().__init__(f"{key} in the store {url} is {found} bytes long; expected at most {limit}")
        self.key = key
        self.found = found
        self.etag = etag
        """For replacing it by compare-and-swap."""


class LeaseLost(StoreError):
    """Another worker took the lease over: stop at once, and write no pointer any more."""
