"""A tokenizer that is read from a file."""

import json
from functools import lru_cache
from pathlib import Path


class Tokenizer:
    """Words to numbers."""

    unknown: int = -1

    def __init__(self, folder: Path) -> None:
        self.vocabulary = json.loads((folder / "vocab.json").read_text())

    def encode(self, text: str) -> list[int]:
        """The number of each word."""
        return [self.vocabulary.get(word, self.unknown) for word in text.split()]

    def __len__(self) -> int:
        return len(self.vocabulary)


@lru_cache(maxsize=8)
def weight(length: int) -> int:
    """The weight of a text of so many words."""
    return length * length
