"""Cleaning."""

import re
import string

SPACES = re.compile(r"\s+")
KEPT = string.ascii_letters + " "


def clean(text: str) -> str:
    """Lower case, single spaces, letters only."""
    found = "".join(letter for letter in text if letter in KEPT)
    return SPACES.sub(" ", found).strip().lower()
