"""A small stage package, made to be changed: `tests/corpus` says what each change must do to the key."""

from study.shapes import Square as Tile
from study.text import clean

__all__ = ["Tile", "clean"]
