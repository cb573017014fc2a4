"""A resumable toy stage that notes in a file what its body does, for tests with workers in processes of their own.

As a program, `python -m tests.watched_stage SPEC.json MACHINE`, it is the worker of a machine of that name: one that does not
know which processes run on any other, and so has to wait until their leases run out.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from unittest import mock

from pydantic import Field

from tasks.stage import StageConfig, StageContext, StageError, stage


class WatchedConfig(StageConfig):
    """What the body does, and where it notes it."""

    notes: str
    """Folder of the notes: `notes`, a line for all that happened; `open`, made by the test, opens the gate."""
    steps: int = Field(8, gt=0)
    """Steps to take."""
    seconds: float = Field(0.01, ge=0)
    """Length of a step."""
    gate: int = -1
    """Number of steps after which the body waits for the gate; negative: it never waits."""
    deaf: bool = False
    """The body never asks whether it should stop, and makes no checkpoint."""
    size: int = Field(0, ge=0)
    """Bytes of the output beside its few bytes of text."""
    seed: int = 0
    """Changes the output."""


def note(config: WatchedConfig, *words: object) -> None:
    """Append one line. Single small appends of several processes do not mix."""
    file = os.open(Path(config.notes, "notes"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (" ".join(map(str, (words[0], os.getpid(), *words[1:]))) + "\n").encode())
    os.close(file)


def wait_at_gate(context: StageContext, config: WatchedConfig) -> None:
    """Wait until the test opens the gate, or until the body has to stop."""
    deadline = time.monotonic() + 240.0
    while not Path(config.notes, "open").exists() and (config.deaf or not context.should_stop()):
        if time.monotonic() > deadline:
            raise StageError("nobody opened the gate")
        time.sleep(0.01)


@stage("watched")
def watched(context: StageContext, config: WatchedConfig) -> None:
    """Count to `steps` with a running hash, with a checkpoint whenever one is due; resumable to the same output."""
    done, state = 0, config.seed
    if (restored := context.restore_checkpoint()) is not None:
        done, state = restored[0], json.loads((restored[1] / "state.json").read_text())
    note(config, "start", done)
    while done < config.steps:
        time.sleep(config.seconds)
        if done == config.gate:
            wait_at_gate(context, config)
        done, state = done + 1, (state * 6364136223846793005 + 1442695040888963407) % 2**64
        note(config, "step", done)
        context.progress(done, config.steps)
        if not config.deaf and done < config.steps and context.checkpoint_due():
            folder = context.work / f"checkpoint-{done}"
            folder.mkdir()
            (folder / "state.json").write_text(json.dumps(state))
            note(config, "saving", done)
            context.save_checkpoint(done, folder)
            note(config, "saved", done)
            if context.should_stop():
                context.stop()
    (context.out / "text.txt").write_text(str(state))
    if config.size:
        (context.out / "bytes").write_bytes(random.Random(state).randbytes(config.size))
    note(config, "end", done)


def main() -> None:
    """Run a spec as the machine named on the command line."""
    from artifacts import lease, scratch
    from tasks import worker

    there = {**lease.this_process(), "machine": sys.argv.pop()}
    with (
        mock.patch.object(lease, "this_process", lambda: there),
        mock.patch.object(scratch, "this_process", lambda: there),
    ):
        worker.main()


if __name__ == "__main__":
    main()
