"""A class hierarchy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from study.constants import HALF


class Shape(ABC):
    """Something with an area."""

    sides: ClassVar[int] = 0
    """How many sides it has."""
    unit: str = "cm"

    def __init__(self, size: float, *extra: int, **named: int) -> None:
        self.size = size
        self.extra = extra
        self.__hidden = named.get("hidden", 1)

    @abstractmethod
    def area(self) -> float:
        """Its area."""

    @property
    def label(self) -> str:
        """A name for it."""
        return f"{type(self).__name__}:{self.size}"

    @label.setter
    def label(self, text: str) -> None:
        self.size = len(text)

    @staticmethod
    def twice(number: float) -> float:
        return number * 2

    @classmethod
    def unit_one(cls) -> Shape:
        return cls(1)

    def hidden(self) -> int:
        return self.__hidden

    def describe(self, prefix: str = "a ") -> str:
        """What it is."""
        text = prefix + self.label
        return text + self.unit


class Square(Shape):
    """Four equal sides."""

    sides = 4

    def area(self) -> float:
        return self.size**2

    def describe(self, prefix: str = "one ") -> str:
        return super().describe(prefix) + "!"


class Triangle(Shape):
    sides = 3

    def area(self) -> float:
        height = self.size * HALF
        return height * self.size

    def perimeter(self) -> float:
        return self.size * self.sides


class Circle(Shape):
    """Reached by nothing."""

    def area(self) -> float:
        return 3.14 * self.size**2
