"""What a record was made from, upwards: what a pin keeps, and `forget` therefore refuses.

A record names its inputs by content, and studies may make the same bytes in different ways. Nobody can tell afterwards which
of the records was meant, so all of them count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

Where = tuple[str, str]
"""(stage, key) of a record."""

Tree = TypeVar("Tree", bytes, str)


def lineage(
    starts: Iterable[Where],
    inputs_of: Callable[[Where], Iterable[Tree]],
    makers_of: Callable[[Tree], Iterable[Where]],
) -> set[Where]:
    """These records, every one that made an input of theirs, and so on upwards.

    `inputs_of` a record are the trees that it was made from, `makers_of` a tree the records whose output it is.
    """
    waiting, found, seen = [*starts], set[Where](), set[Tree]()
    while waiting:
        if (where := waiting.pop()) not in found:
            found.add(where)
            for tree in inputs_of(where):
                if tree not in seen:
                    seen.add(tree)
                    waiting += makers_of(tree)
    return found
