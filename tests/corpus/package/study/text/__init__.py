"""Text, cleaned and cut."""

from .clean import clean
from .tokens import Tokenizer

__all__ = ["Tokenizer", "clean"]
