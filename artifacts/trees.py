"""Trees: what the files of one stage output are called, how large they are, and which objects of the store hold them.

A tree is a canonical JSON list of (path, size, digest of the whole file), named by its own digest. It says nothing of how
a file is stored. That is one blob, `v1/cas/<digest>`, or, for a large file of which other files hold parts too, a parts
list, `v1/parts/<digest>`: the sizes and digests of the blobs whose concatenation the file is, some of them packed (see
`artifacts.packing`). A blob is always named by its own bytes. A parts list is not: it says of which file it is and carries a
digest of itself, and what it leads to is believed only once the whole file has the digest that the tree names.

Everything read from a store is hostile until checked: sizes, digests and paths are validated here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from artifacts.backend import Object
from artifacts.digest import canonical_json, digest_bytes, is_digest, parse_canonical, seal, unseal
from artifacts.errors import Damaged, StoreError
from artifacts.packing import MAX_BYTES, WIDTHS

if TYPE_CHECKING:
    from artifacts.store import Store

MAX_PARTS_BYTES = 16 << 20
MAX_FILE_BYTES = 1 << 50
SMALLEST_IN_PARTS = 1 << 20
"""No file of fewer bytes is ever stored in parts, so that nobody has to ask. Part of the store's format."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of a tree: relative POSIX path, size in bytes, BLAKE3 digest."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Tree:
    """An immutable folder of files, named by the digest of its canonical listing."""

    digest: str
    files: tuple[File, ...]

    @classmethod
    def of(cls, files: Iterable[File]) -> Tree:
        """The tree of these files, which are in the order of their paths."""
        files = tuple(files)
        return cls(digest_bytes(_listing(files)), files)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def listing(self) -> bytes:
        """The bytes of the tree's object."""
        return _listing(self.files)


def object_key(kind: str, digest: str) -> str:
    """Key of the object of a `kind` (`cas`, `tree`, `parts`) that is named by a digest."""
    if not is_digest(digest):
        raise StoreError(f"{digest!r} is not a digest: expected 64 hexadecimal digits")
    return f"v1/{kind}/{digest[:2]}/{digest}"


def check_path(path: str) -> None:
    """Refuse a tree path that is not plainly inside the tree.

    Raises:
        StoreError: absolute, empty, with `.` or `..` parts, backslashes, what cannot be printed, letters that Unicode
            writes in two ways, a part of over 255 bytes, or over 1,024 bytes in all.
    """
    parts = path.split("/") if isinstance(path, str) else [""]
    plain = all(parts) and not {".", ".."} & set(parts) and "\\" not in path and ":" not in parts[0]
    if not plain or not path.isprintable() or not unicodedata.is_normalized("NFC", path) or not _fits(parts):
        raise StoreError(
            f"tree path {ascii(path)[:200]} is not safe: expected a relative path of printable characters (in Unicode "
            "form NFC) without '..' or backslash, with parts of at most 255 and in all at most 1,024 bytes"
        )


def _fits(parts: list[str]) -> bool:
    sizes = [len(part.encode()) for part in parts]
    return max(sizes) <= 255 and sum(sizes) + len(sizes) <= 1025


def check_files(rows: object) -> tuple[File, ...]:
    """The files in the rows [path, size, digest] of a stored list.

    Raises:
        ValueError: a row is malformed, a path unsafe, the order another than that of the paths, or the files could not
            lie beside each other in a folder of every file system.
    """
    if not isinstance(rows, list):
        raise ValueError("not a list")
    files, before = [], ""
    for path, size, digest in rows:
        try:
            check_path(path)
        except StoreError as error:
            raise ValueError(str(error)) from error
        if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES or not is_digest(digest):
            raise ValueError(f"{path!r}: bad size or digest")
        if path <= before:
            raise ValueError(f"{path!r} occurs twice or is out of order")
        before = path
        files.append(File(path, size, digest))
    check_together([file.path for file in files])
    return tuple(files)


def check_together(paths: list[str]) -> None:
    """Refuse paths of which one overwrites another where letters have no case, or that are file and folder at once.

    Raises:
        ValueError: names the two.
    """
    spelled: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in paths:
        parts = path.split("/")
        for number in range(1, len(parts)):
            folder = "/".join(parts[:number])
            if folders.setdefault(folder.casefold(), folder) != folder:
                raise ValueError(f"{folder!r} and {folders[folder.casefold()]!r} differ in upper and lower case only")
        if path.casefold() in spelled:
            raise ValueError(f"{path!r} and {spelled[path.casefold()]!r} differ in upper and lower case only")
        spelled[path.casefold()] = path
    for path in spelled.keys() & folders.keys():
        raise ValueError(f"{spelled[path]!r} is both a file and a folder")


def read_tree(stored: Object | None, digest: str, url: str) -> Tree:
    """The tree in a tree object, checked against its digest and for unsafe paths.

    Raises:
        Damaged: there is none (`stored` is None), or it is not this tree.
    """
    if stored is None:
        raise Damaged(f"tree {digest[:12]} is missing from {url}", tree=digest)
    if digest_bytes(stored.data) != digest:
        raise Damaged(f"tree {digest[:12]} in {url} does not match its digest", tree=digest)
    try:
        files = check_files(parse_canonical(stored.data))
    except (ValueError, TypeError) as error:
        raise Damaged(f"tree {digest[:12]} is not a valid listing: {error}", tree=digest) from error
    return Tree(digest, files)


@dataclass(frozen=True, slots=True)
class Part:
    """A run of bytes of a file that has a blob of its own: where it starts, its size, and the digest of the blob."""

    offset: int
    size: int
    digest: str
    packed: int = 0
    """Bytes of the blob when it holds the run packed; 0 when it holds the run as it is."""
    width: int = 0
    """Bytes of each number of a packed run."""

    @property
    def stored(self) -> int:
        """Bytes of the blob."""
        return self.packed or self.size


def parts_list(file: str, parts: Iterable[Part]) -> bytes:
    """The bytes of the object that says which blobs the file of this digest consists of."""
    rows = [[part.size, part.digest, *([part.packed, part.width] if part.packed else [])] for part in parts]
    return seal({"file": file, "parts": rows})


def parts_of(data: bytes, file: str) -> tuple[Part, ...]:
    """The parts in the parts list of the file of this digest.

    Raises:
        ValueError: it is not one: a collection that believed it would delete the blobs that the right one names.
    """
    if len(data) > MAX_PARTS_BYTES:
        raise ValueError(f"{len(data)} bytes, expected at most {MAX_PARTS_BYTES}")
    if not data.startswith(b'{"check":'):
        raise ValueError("not a parts list, or one without its check")
    body = unseal(data)
    if body.keys() != {"file", "parts"} or not isinstance(body["parts"], list):
        raise ValueError("expected the fields 'file' and 'parts'")
    if body["file"] != file:
        raise ValueError(f"it is that of the file {str(body['file'])[:12]!r}, expected {file[:12]}")
    parts, offset = [], 0
    for row in body["parts"]:
        if not isinstance(row, list) or len(row) not in (2, 4):
            raise ValueError("a part is not a size, a digest and, if packed, two numbers")
        size, digest, *packing = row
        if type(size) is not int or not 0 < size <= MAX_FILE_BYTES or not is_digest(digest):
            raise ValueError("bad size or digest")
        parts.append(Part(offset, size, digest, *_packing(size, packing)))
        offset += size
    return tuple(parts)


def read_parts(stored: Object, file: File, tree: str, url: str) -> tuple[Part, ...]:
    """The parts in a parts list, checked to fill the file without a gap.

    Raises:
        Damaged: it is not a parts list, or not of a file of this size.
    """
    try:
        parts = parts_of(stored.data, file.digest)
        if (size := sum(part.size for part in parts)) != file.size:
            raise ValueError(f"the parts have {size} bytes, the file {file.size}")
    except ValueError as error:
        raise Damaged(f"the parts list of {file.path} in {url} is not valid: {error}", tree=tree) from error
    return parts


def _packing(size: int, packing: list[object]) -> tuple[int, int]:
    if not packing:
        return 0, 0
    packed, width = packing
    if type(packed) is not int or type(width) is not int or not 0 < packed < size <= MAX_BYTES:
        raise ValueError("bad size of a packed part")
    if width not in WIDTHS.values() or size % width:
        raise ValueError("bad width of a packed part")
    return packed, width


def object_keys(store: Store, digest: str) -> list[tuple[str, int]]:
    """(key, bytes) of every object that a stored tree consists of: tree, blobs, parts lists and the blobs of the parts.

    Raises:
        Damaged: the tree or a parts list cannot be read. Whether the blobs are there is not asked.
    """
    [(_, found)] = object_keys_of(store, [digest])
    if isinstance(found, Damaged):
        raise found
    return found


def object_keys_of(store: Store, digests: Iterable[str]) -> Iterator[tuple[str, list[tuple[str, int]] | Damaged]]:
    """`object_keys` of many trees in two rounds of concurrent reads; `Damaged` stands where it would be raised."""
    url, digests = store.backend.url, list(dict.fromkeys(digests))
    objects = store.backend.get_many([object_key("tree", digest) for digest in digests])
    trees: dict[str, Tree | Damaged] = {}
    for digest in digests:
        try:
            trees[digest] = read_tree(objects[object_key("tree", digest)], digest, url)
        except Damaged as error:
            trees[digest] = error
    lists = stored_parts(store, [file for tree in trees.values() if isinstance(tree, Tree) for file in tree.files])
    for digest, tree in trees.items():
        if isinstance(tree, Damaged):
            yield digest, tree
            continue
        try:
            yield digest, list(_objects(tree, lists, url).items())
        except Damaged as error:
            yield digest, error


def stored_parts(store: Store, files: Iterable[File]) -> dict[str, Object]:
    """The parts lists, by the digest of the file, of those among `files` that are stored in parts: one round of reads."""
    large = {file.digest for file in files if file.size >= SMALLEST_IN_PARTS}
    if not large:
        return {}
    found = store.backend.get_many([object_key("parts", digest) for digest in sorted(large)])
    return {key.rpartition("/")[2]: stored for key, stored in found.items() if stored is not None}


def _objects(tree: Tree, lists: dict[str, Object], url: str) -> dict[str, int]:
    objects = {object_key("tree", tree.digest): len(tree.listing)}
    for file in tree.files:
        if (stored := lists.get(file.digest)) is None:
            objects[object_key("cas", file.digest)] = file.size
            continue
        objects[object_key("parts", file.digest)] = len(stored.data)
        for part in read_parts(stored, file, tree.digest, url):
            objects[object_key("cas", part.digest)] = part.stored
    return objects


def _listing(files: tuple[File, ...]) -> bytes:
    return canonical_json([[file.path, file.size, file.digest] for file in files])
