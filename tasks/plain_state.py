"""A trainer's saved state without pickle: tensors as safetensors, and the structure around them as canonical JSON.

Hugging Face trainers keep the state of optimizer, scheduler and random generators as pickles. Those exist only inside the
work folder of the process that trains: `to_plain` replaces them before a checkpoint leaves it, and `from_plain` makes
them again from a verified checkpoint, so that no pickle is ever stored, and none that somebody else wrote is ever read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from artifacts.digest import canonical_json

PICKLED = {
    "optimizer": "optimizer.pt",
    "scheduler": "scheduler.pt",
    "rng_state": "rng_state.pth",
    "scaler": "scaler.pt",
}
"""What a trainer pickles, by the name that its plain form has. A scaler is there only for fp16."""

PLAIN_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model")
"""Formats that cannot run code when they are read: all that a checkpoint may hold."""


def to_plain(directory: Path) -> None:
    """Replace every pickle that a trainer has just written to `directory`; drop its other files of unsafe formats."""
    import torch
    from safetensors.torch import save_file
    from transformers.trainer import safe_globals

    for name, pickled in PICKLED.items():
        if (directory / pickled).is_file():
            with safe_globals():
                state = torch.load(directory / pickled, map_location="cpu", weights_only=True)
            tensors: dict[str, Any] = {}
            (directory / f"{name}.json").write_bytes(canonical_json(_take_apart(state, tensors)))
            save_file(tensors, directory / f"{name}.safetensors")
    for path in directory.rglob("*"):
        if path.is_file() and path.suffix not in PLAIN_SUFFIXES:
            path.unlink()


def from_plain(directory: Path) -> None:
    """Make the trainer's own files again in `directory`, a checkpoint that was restored and verified.

    Raises:
        ValueError: it holds a file of another format than plain ones, or one that is not in the form `to_plain` wrote.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path in directory.rglob("*"):
        if path.is_file() and path.suffix not in PLAIN_SUFFIXES:
            raise ValueError(f"{path.name} is in none of the formats {', '.join(PLAIN_SUFFIXES)}")
    for name, pickled in PICKLED.items():
        if (directory / f"{name}.json").is_file():
            try:
                tensors = load_file(directory / f"{name}.safetensors")
                structure = json.loads((directory / f"{name}.json").read_bytes())
                state = _put_together(structure, tensors)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"the state of the {name} is unreadable: {error!r}") from error
            torch.save(state, directory / pickled)
            (directory / f"{name}.json").unlink()
            (directory / f"{name}.safetensors").unlink()


def _take_apart(value: Any, tensors: dict[str, Any]) -> Any:
    """`value` with tensors and arrays moved to `tensors`, and each container as {kind: contents}."""
    import numpy
    import torch

    if isinstance(value, torch.Tensor | numpy.ndarray):
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        name = str(len(tensors))
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(value)
        tensors[name] = tensor.detach().clone().contiguous()
        return {kind: name}
    if isinstance(value, dict):
        return {"dict": [[_take_apart(key, tensors), _take_apart(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_take_apart(item, tensors) for item in value]}
    if isinstance(value, numpy.generic):
        return _take_apart(value.item(), tensors)
    return value


def _put_together(value: Any, tensors: dict[str, Any]) -> Any:
    """The inverse of `_take_apart`."""
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind in ("tensor", "array"):
        return tensors[content] if kind == "tensor" else tensors[content].numpy()
    if kind == "dict":
        return {_put_together(key, tensors): _put_together(item, tensors) for key, item in content}
    items = [_put_together(item, tensors) for item in content]
    return {"list": list, "tuple": tuple}[kind](items)
