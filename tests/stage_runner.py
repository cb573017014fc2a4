"""Runs one stage body on plain folders, the way a worker does, with checkpoints kept in a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.stage import Stage, StageConfig, StageContext, StageStopped


class FolderCheckpoints:
    """Mid-stage checkpoints as numbered folders under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def save(self, step: int, directory: Path) -> None:
        """Keep a copy of `directory` as the newest checkpoint."""
        target = self.root / f"{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(directory, target)

    def restore(self, into: Path) -> int | None:
        """Copy the newest checkpoint into `into`; its step, or None if there is none."""
        found = sorted(self.root.glob("[0-9]*"))
        if not found:
            return None
        shutil.copytree(found[-1], into, dirs_exist_ok=True)
        return int(found[-1].name)


def run_stage(
    stage: Stage,
    config: StageConfig,
    folder: Path,
    *,
    stop_after: int | None = None,
    checkpoint_seconds: float = 1e9,
    **inputs: Path,
) -> Path:
    """Run `stage` with its output in `folder`/out and checkpoints in `folder`/checkpoints; return the output folder.

    `stop_after` asks the body to stop once it has reported that many units of progress: it then ends by StageStopped,
    and a second call with the same `folder` resumes it.
    """
    out, work = folder / "out", folder / "work"
    for directory in (out, work):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    done = [0]

    def on_progress(step: int, total: int, metrics: dict[str, float]) -> None:
        done[0] = step

    context = StageContext(
        out=out,
        work=work,
        checkpoints=FolderCheckpoints(folder / "checkpoints"),
        on_progress=on_progress,
        stop_requested=lambda: "test" if stop_after is not None and done[0] >= stop_after else None,
        checkpoint_seconds=checkpoint_seconds,
    )
    stage.body(context, config, **inputs)
    return out


def run_interrupted(stage: Stage, config: StageConfig, folder: Path, stop_after: int, **inputs: Path) -> Path:
    """Run `stage`, stop it after `stop_after` units of progress, and resume it to its end."""
    try:
        run_stage(stage, config, folder, stop_after=stop_after, **inputs)
    except StageStopped:
        return run_stage(stage, config, folder, **inputs)
    raise AssertionError(f"stage {stage.name} ended before it could be stopped after {stop_after}")


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, by relative path: equal dictionaries mean byte-identical outputs."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
