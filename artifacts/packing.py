"""Weights in fewer bytes, and back, bit for bit: a byte shuffle and zstd.

Of trained floating-point weights the sign and exponent bytes repeat and the rest is noise. So the bytes of all numbers are
put together by their place in the number, and zstd, at its fastest level, finds what there is to save: some 16 % of fp32 and
more of bf16, several times faster than a network. What does not get smaller is left as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDTHS = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes of a number, by the name that safetensors has for its type."""
MAX_BYTES = 64 << 20
"""Most bytes that are packed, or unpacked, at once: both happen in memory."""
WORTH = 0.97
"""Packed bytes in proportion to plain ones, above which packing is not worth its time."""


def pack(data: bytes, width: int) -> bytes | None:
    """`data`, numbers of `width` bytes, in fewer bytes; None when it is best left as it is."""
    if width not in WIDTHS.values() or not data or len(data) % width:
        return None
    import numpy

    planes = numpy.ascontiguousarray(numpy.frombuffer(data, numpy.uint8).reshape(-1, width).T)
    packed: bytes = _codec().compress(memoryview(planes.reshape(-1)), asbytes=True)
    return packed if len(packed) <= WORTH * len(data) else None


def unpack(packed: bytes, size: int, width: int) -> memoryview:
    """The `size` bytes that were packed.

    Raises:
        ValueError: `packed` is not what `pack` leaves of that many bytes.
    """
    import numpy

    try:
        plain = _codec().decompress(packed, size, asbytes=True)
        planes = numpy.frombuffer(plain, numpy.uint8).reshape(width, size // width)
    except (ValueError, OSError) as error:
        raise ValueError(f"not the packed form of {size} bytes: {error}") from error
    return memoryview(numpy.ascontiguousarray(planes.T).reshape(-1))


def packed_run(path: Path, offset: int, size: int, width: int) -> bytes:
    """The packed form of a run of a file's bytes; empty when there is none, or the file is too short."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    return (pack(data, width) if len(data) == size else None) or b""


def _codec() -> Any:
    import pyarrow

    return pyarrow.Codec("zstd", 1)
