"""Where a safetensors file is cut, so that tensors that are byte-equal in two files are stored once.

Frozen layers, tied embeddings and the untouched weights of a LoRA base repeat from checkpoint to checkpoint, but the files
around them differ. So a file is cut at the boundaries of its tensors, as its header names them (8 bytes of length, JSON,
then the tensors without gaps): the header is one part, a large tensor is one part, and a run of small neighbours is one
part, because on S3 every object costs a request. The cuts follow from the header's list of tensors alone, so that equal
tensors in equal surroundings give equal parts in every file.

The type of the numbers in a part is noted, because it decides how the part is packed (see `artifacts.packing`).

A file is only ever cut, never interpreted: a header that is not plainly right means that the file is stored whole.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

from artifacts.packing import WIDTHS

SPLIT_FROM = 1 << 20
"""Smaller files are stored whole."""
PART_FROM = 1 << 20
"""A tensor of at least this size is a part of its own; smaller neighbours are grouped until they reach it."""
PART_TO = 16 << 20
"""A larger tensor is several parts of this size, because parts are packed in memory."""
MAX_PARTS = 16384
"""Parts of one file; of more, as a mixture of thousands of experts has, larger groups are made."""
MAX_HEADER_BYTES = 32 << 20


class Cut(NamedTuple):
    """Where a part begins, and how many bytes each number in it has; 0 when they are not of one known kind."""

    start: int
    width: int


class _Tensor(NamedTuple):
    end: int
    width: int


def cuts(path: Path, size: int) -> tuple[Cut, ...]:
    """The parts of a file, in order, the first at offset 0; empty for a file that is best stored whole."""
    if path.suffix != ".safetensors" or size < SPLIT_FROM:
        return ()
    try:
        start, tensors = _layout(path, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error):
        return ()
    part_from = PART_FROM
    while len(found := [Cut(0, 0), *_grouped(start, tensors, part_from)]) > MAX_PARTS and part_from < size:
        part_from *= 2
    return tuple(found) if 1 < len(found) <= MAX_PARTS else ()


def _layout(path: Path, size: int) -> tuple[int, list[_Tensor]]:
    """Offset of the first tensor, and the tensors, in file order.

    Raises:
        ValueError: the header is not that of a safetensors file of this size (as are the other errors of a hostile one).
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError("length of the header")
        header = json.loads(file.read(length))
    start, end, tensors = 8 + length, 0, []
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    for entry in sorted(entries, key=lambda entry: tuple(entry["data_offsets"])):
        first, last = entry["data_offsets"]
        if type(first) is not int or type(last) is not int or first != end or last < first:
            raise ValueError("tensors overlap or leave a gap")
        end = last
        tensors.append(_Tensor(start + last, WIDTHS.get(entry["dtype"], 0)))
    if start + end != size:
        raise ValueError("tensors do not fill the file")
    return start, tensors


def _grouped(start: int, tensors: list[_Tensor], part_from: int) -> list[Cut]:
    found: list[Cut] = []
    group, before, width = start, start, -1
    """Where the group began, where the last tensor ended, and the width of all numbers in the group; -1 when it is empty."""

    def close(end: int) -> None:
        nonlocal group, width
        if end > group:
            step = max(PART_TO, part_from)
            found.extend(Cut(offset, max(width, 0)) for offset in range(group, end, step))
        group, width = end, -1

    for tensor in tensors:
        if tensor.end - before >= part_from:
            close(before)  # a large tensor starts a part of its own
        width = tensor.width if width in (-1, tensor.width) else 0
        if tensor.end - group >= part_from:
            close(tensor.end)
        before = tensor.end
    close(before)
    return found
