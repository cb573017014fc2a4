"""One change of the stage package or of its surroundings, and what it must do to the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Edit = tuple[str, str, str]
"""(file below `study`, old text, new text); the first occurrence is replaced, and empty old text appends."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """A change, labelled."""

    name: str
    edits: tuple[Edit, ...] = ()
    expect: str = "hit"
    """`hit`, `miss`, or `refused`: the stage may not be written like that."""
    names: str = ""
    """What `why` must name for a miss: `file::symbol`, `config.field` or `inputs.name`."""
    cautious: str = ""
    """Why a change that leaves the output alone is a miss all the same; empty when the output changes."""
    given: tuple[Edit, ...] = ()
    """Edits of the package that the change starts from."""
    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    """Input -> a digit that stands for its content; empty for an input that is left out."""
    environ: dict[str, str] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    """Fields of the stage context: where and how the stage runs."""
    revision: int = 0
    """Changes the producers of the inputs, not what they make."""
    elsewhere: bool = False
    """In another working directory, with other modification times."""


def hit(name: str, *edits: Edit, given: tuple[Edit, ...] = ()) -> Mutation:
    """An edit that cannot change the output."""
    return Mutation(name, edits, given=given)


def miss(name: str, names: str, *edits: Edit, cautious: str = "", given: tuple[Edit, ...] = ()) -> Mutation:
    """An edit that changes the output, or that is counted out of caution."""
    where = names if "::" not in names else f"study/{names}"
    return Mutation(name, edits, "miss", where, cautious, given)


def refused(name: str, *edits: Edit) -> Mutation:
    """An edit after which the stage has no key that could be trusted."""
    return Mutation(name, edits, "refused")
