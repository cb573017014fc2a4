"""Where a safetensors file is cut, so that tensors that are byte-equal in two files are stored once.

Frozen layers, tied embeddings and the untouched weights of a LoRA base repeat from checkpoint to checkpoint, but the files
around them differ. So a file is cut at the boundaries of its tensors, as its header names them (8 bytes of length, JSON,
then the tensors without gaps): the header is one part, a large tensor is one part, and a run of small neighbours is one
part, because on S3 every object costs a request. The cuts follow from the header's list of tensors alone, so that equal
tensors in equal surroundings give equal parts in every file.

A file is only ever cut, never interpreted: a header that is not plainly right means that the file is stored whole.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

SPLIT_FROM = 16 << 20
"""Smaller files are stored whole."""
PART_FROM = 1 << 20
"""A tensor of at least this size is a part of its own; smaller neighbours are grouped until they reach it."""
MAX_PARTS = 4096
"""Parts of one file; of more, as a mixture of thousands of experts has, larger groups are made."""
MAX_HEADER_BYTES = 32 << 20


def cuts(path: Path, size: int) -> tuple[int, ...]:
    """Offsets in the file at which a part begins, 0 first; empty for a file that is best stored whole."""
    if path.suffix != ".safetensors" or size < SPLIT_FROM:
        return ()
    try:
        start, ends = _layout(path, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ()
    part_from = PART_FROM
    while len(offsets := _grouped(start, ends, part_from)) > MAX_PARTS:
        part_from *= 2
    return offsets if len(offsets) > 1 else ()


def _layout(path: Path, size: int) -> tuple[int, list[int]]:
    """Offset of the first tensor, and where each tensor ends, in file order.

    Raises:
        ValueError: the header is not that of a safetensors file of this size (as are the other errors of a hostile one).
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError("length of the header")
        header = json.loads(file.read(length))
    start = 8 + length
    spans = sorted(tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__")
    end = 0
    for first, last in spans:
        if type(first) is not int or type(last) is not int or first != end or last < first:
            raise ValueError("tensors overlap or leave a gap")
        end = last
    if start + end != size:
        raise ValueError("tensors do not fill the file")
    return start, [start + last for _, last in spans]


def _grouped(start: int, ends: list[int], part_from: int) -> tuple[int, ...]:
    offsets = [0, start]
    before = start
    for end in ends:
        if end - before >= part_from and before > offsets[-1]:
            offsets.append(before)  # a large tensor starts a part of its own
        if end - offsets[-1] >= part_from:
            offsets.append(end)
        before = end
    if offsets[-1] == before:
        offsets.pop()
    return tuple(offsets)
