"""Printing a table, and saying what machine it was measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table with aligned columns."""
    cells = [list(map(str, head)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    print(f"\n{title}\n")
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def machine() -> str:
    """One line on the machine: cores, load, processor, Python."""
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.machine()}, Python {platform.python_version()}"
