"""Imports that depend on where this runs."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import PurePath

try:
    from tomllib import loads
except ImportError:
    loads = None

if sys.version_info >= (3, 11):
    from study.fast import speed
else:
    from study.slow import speed


def parsed(text: str) -> dict:
    """A TOML text as a dict."""
    return loads(text)


def unreached() -> "PurePath | None":
    return None
