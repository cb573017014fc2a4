"""What a worker takes from the machine it runs on: its clock, its store, its source, its end; and what of it is recorded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from artifacts.clock import SYSTEM, Clock
from artifacts.store import Store
from tasks.identity import CodeReader
from tasks.stage import Stage, StageError

if TYPE_CHECKING:
    from tasks.worker import Spec


def require_planned_code(spec: Spec, stage: Stage) -> None:
    """Refuse to run code that is not the code in the key: the source may have been edited since the run was planned."""
    package = spec.module.partition(".")[0]
    now = CodeReader(packages=tuple({"tasks", "artifacts", package})).stage(stage)
    if now.digest != spec.payload["code"]:
        symbols = now.symbols.keys() | spec.symbols.keys()
        changed = sorted(s for s in symbols if now.symbols.get(s) != spec.symbols.get(s))
        raise StageError(
            f"{spec.node}: the source changed since this run was planned ({', '.join(changed[:3])}); "
            "run the same command again, and it is planned anew"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a worker takes from the machine it runs on. A simulation gives it others."""

    clock: Clock = SYSTEM
    open_store: Callable[[str], Store] = Store.open
    require_code: Callable[[Spec, Stage], None] = require_planned_code
    end_process: Callable[[int], object] = os._exit
    """Ends this process at once, whatever it is doing."""


def environment(spec: Spec) -> dict[str, Any]:
    """What a person needs to know about where a stage ran. Recorded beside the result, never part of its key."""
    import platform

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "host": platform.node(),
        "machine": platform.machine(),
        "device": spec.device,
        "threads": spec.threads,
        "versions": dict(_versions()),
    }
    if (torch := sys.modules.get("torch")) is not None:
        # Results are bit-equal for one instruction set: kernels differ between AVX2 and AVX-512.
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
        if spec.device != "cpu":
            found["accelerator"] = torch.cuda.get_device_name()
    return found


@cache
def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "transformers", "trl", "peft", "datasets", "pyarrow"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
