"""Enums, dataclasses and other declared data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from pydantic import BaseModel


class Colour(Enum):
    """Kinds of rows."""

    RED = auto()
    GREEN = auto()
    BLUE = "b"


@dataclass(frozen=True, order=True)
class Row:
    """One row of the data."""

    name: str
    """What it is called."""
    value: float = 0.0
    tags: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list, compare=False)

    def total(self) -> float:
        """The value with its tags."""
        return self.value + len(self.tags)


class Point(NamedTuple):
    x: int = 0
    y: int = 0


class Checked(BaseModel):
    """Validated by pydantic."""

    number: int = 1
    ratio: float = 2


def as_list(row: Row) -> list[object]:
    """The fields of a row, in order."""
    return list(asdict(row).values())
