"""What a stage run *is*: the digest of its reachable code, its canonical config, and the content of its inputs.

`key = BLAKE3(canonical JSON {algorithm, stage, code, config, inputs})`. The code digest covers the stage body and every
first-party function, class and constant that it reaches by name, through any number of modules, read from source without
importing anything; and, of every module that is imported on the way, the top-level statements that run for effect. So
editing a helper is a miss that names the helper, while comments, docstrings, formatting, type annotations of functions,
the order of definitions and the arguments of `@stage(...)` change nothing. Code that reaches other code in ways that
reading cannot follow is refused (`tasks.source` lists them).

Two boundaries: the machinery in `tasks.stage` is not part of any stage (by contract it cannot change an output), and
third-party libraries enter by their dotted names only (their versions are recorded beside the result, not in its key).
A config class contributes its methods; the values of its fields are in the config half of the key already.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from artifacts.digest import canonical_json, digest_bytes
from artifacts.record import ALGORITHM, payload_key
from tasks.source import Module, Origin, SourceError, Uses, normal, parse_module, uses
from tasks.stage import Stage, StageConfig

__all__ = ["CodeIdentity", "CodeReader", "SourceError", "identity_config", "stage_key", "stage_payload"]

BOUNDARY = frozenset({"tasks.stage"})
"""First-party modules that are machinery, not part of any stage's code."""
EFFECTS = "<module>"
"""Pseudo symbol: what a module runs for effect when it is imported."""

Symbol = tuple[str, str]
"""(module, top-level name)."""


@dataclass(frozen=True, slots=True)
class CodeIdentity:
    """Digest of everything a stage reaches, and the digest of each part, so that a change can be named."""

    digest: str
    symbols: dict[str, str]
    """`path/to/file.py::symbol` -> digest of its normalised source."""


@dataclass(slots=True)
class _Reached:
    """What one symbol leads to."""

    symbols: set[Symbol] = field(default_factory=set)
    walked: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)


class CodeReader:
    """Computes code identities. Keep one for a whole graph: modules are parsed once."""

    def __init__(self, root: Path | None = None, packages: tuple[str, ...] = ("tasks", "artifacts")) -> None:
        self.root = root or Path(__file__).resolve().parent.parent
        self.packages = packages
        self._modules: dict[str, Module | None] = {}
        self._symbols: dict[Symbol, tuple[str | None, frozenset[Symbol]]] = {}

    def stage(self, stage: Stage) -> CodeIdentity:
        """The identity of a declared stage: its body and its config class, and all they reach."""
        return self.reach(
            [(stage.body.__module__, stage.body.__name__), (stage.config.__module__, stage.config.__name__)]
        )

    def reach(self, start: list[Symbol]) -> CodeIdentity:
        """The identity of the code reachable from the (module, symbol) pairs `start`.

        Raises:
            SourceError: some of it cannot be found, or reaches code in a way that cannot be followed.
        """
        first = _Reached()
        for name, symbol in start:
            module = self._module(name)
            if module is None:
                raise SourceError(f"no source for module {name!r} under {self.root}")
            if not module.knows(symbol) and name not in BOUNDARY:
                raise SourceError(f"{module.file} has no top-level definition {symbol!r}")
            self._walk(name, (symbol,), first, module.file)
        symbols: dict[str, str] = {}
        seen: set[Symbol] = set()
        todo = list(first.symbols)
        while todo:
            where = todo.pop()
            if where in seen or where[0] in BOUNDARY:
                continue
            seen.add(where)
            if where not in self._symbols:
                self._symbols[where] = self._digest(self._modules[where[0]], where[1])
            digest, reached = self._symbols[where]
            if digest is not None:
                symbols[f"{self._modules[where[0]].file}::{where[1]}"] = digest
            todo.extend(reached)
        return CodeIdentity(digest_bytes(canonical_json(symbols)), dict(sorted(symbols.items())))

    def _module(self, name: str) -> Module | None:
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def _parse(self, name: str) -> Module | None:
        if not self._is_first_party(name):
            return None
        base = self.root.joinpath(*name.split("."))
        path = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        if not path.is_file():
            return None
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        return parse_module(path.read_text(encoding="utf-8"), name, path.relative_to(self.root).as_posix(), package)

    def _is_first_party(self, name: str) -> bool:
        return name.partition(".")[0] in self.packages

    def _digest(self, module: Module, name: str) -> tuple[str | None, frozenset[Symbol]]:
        """Digest of a symbol (None for a module without effects), and the symbols it leads to."""
        reached = _Reached()
        statements = module.effects if name == EFFECTS else module.bindings.get(name, [])
        if name == EFFECTS:
            for dotted in module.loads:
                self._load(dotted, reached)
        self._load(module.name, reached)
        origins: dict[str, list[Origin]] = {}
        if name in module.imports:
            origins[name] = module.imports[name]
        forms = []
        for statement in statements:
            is_config = isinstance(statement, ast.ClassDef) and self._is_config(module, statement)
            forms.append(normal(statement, config_class=is_config))
            used = uses(statement, module)
            origins |= {alias: module.imports[alias] for alias in used.chains if alias in module.imports}
            self._follow(module, used, reached, f"{module.file}:{statement.lineno}")
        silent = name == EFFECTS and not forms
        return None if silent else digest_bytes(canonical_json([forms, origins])), frozenset(reached.symbols)

    def _follow(self, module: Module, used: Uses, reached: _Reached, at: str) -> None:
        for name, chains in used.chains.items():
            if name in module.bindings:
                reached.symbols.add((module.name, name))
            local = [found.origin for found in used.imports if found.alias == name]
            for origin in [*module.imports.get(name, []), *local]:
                for chain in chains:
                    self._walk_origin(origin, chain, reached, at)
        for found in used.imports:
            self._load(found.loads, reached)

    def _load(self, dotted: str, reached: _Reached) -> None:
        """Importing `a.b.c` runs `a`, `a.b` and `a.b.c`, as far as these are first-party modules."""
        parts = dotted.split(".")
        for end in range(1, len(parts) + 1):
            if self._module(prefix := ".".join(parts[:end])) is not None:
                reached.symbols.add((prefix, EFFECTS))

    def _walk_origin(self, origin: Origin, chain: tuple[str, ...], reached: _Reached, at: str) -> None:
        module, attribute = origin
        self._walk(module, chain if attribute is None else (attribute, *chain), reached, at)

    def _walk(self, name: str, chain: tuple[str, ...], reached: _Reached, at: str) -> None:
        """Reach what the attributes `chain`, taken from the module `name`, lead to."""
        if name in BOUNDARY or not self._is_first_party(name) or (name, chain) in reached.walked:
            return
        reached.walked.add((name, chain))
        module = self._module(name)
        if module is None:
            raise SourceError(f"{at}: cannot find first-party module {name!r} under {self.root}; correct the import.")
        self._load(name, reached)
        if chain and module.knows(chain[0]):
            reached.symbols.add((name, chain[0]))
            for origin in module.imports.get(chain[0], []):
                self._walk_origin(origin, chain[1:], reached, at)
        elif chain and self._module(f"{name}.{chain[0]}") is not None:
            self._walk(f"{name}.{chain[0]}", chain[1:], reached, at)
        elif module.is_package:
            raise SourceError(
                f"{at}: package {name!r} is used as a value, or for a name it does not define, so what is taken from "
                "it cannot be traced; import the module or function that is meant by its name."
            )
        else:
            for symbol in [*module.bindings, *module.imports]:
                self._walk(name, (symbol,), reached, at)

    def _is_config(self, module: Module, node: ast.ClassDef) -> bool:
        for base in node.bases:
            if not isinstance(base, ast.Name):
                continue
            owner, name = module, base.id
            if name not in module.bindings and module.imports.get(name):
                target, attribute = module.imports[name][0]
                if (target, attribute) == ("tasks.stage", "StageConfig"):
                    return True
                owner, name = self._module(target), attribute or ""
            for parent in owner.bindings.get(name, []) if owner else []:
                if isinstance(parent, ast.ClassDef) and parent is not node and self._is_config(owner, parent):
                    return True
        return False


def identity_config(config: StageConfig) -> dict[str, Any]:
    """The part of a config that is identity: every declared field, defaults filled in, except those marked
    `json_schema_extra={"identity": False}`.

    Raises:
        TypeError: a field's value has no canonical form; the message names the field.
    """
    return _plain(config, type(config).__name__)


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, BaseModel):
        kept = {}
        for name, info in type(value).model_fields.items():
            extra = info.json_schema_extra
            if not (isinstance(extra, dict) and extra.get("identity") is False):
                kept[name] = _plain(getattr(value, name), f"{where}.{name}")
        return kept
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(
        f"{where}: a {type(value).__name__} has no canonical form; use plain numbers, text, lists or mappings"
    )


def stage_payload(stage: Stage, config: StageConfig, inputs: Mapping[str, str], code: CodeIdentity) -> dict[str, Any]:
    """The complete identity of one stage run. `inputs` maps each input's name to the digest of its tree."""
    return {
        "algorithm": ALGORITHM,
        "stage": stage.name,
        "code": code.digest,
        "config": identity_config(config),
        "inputs": dict(inputs),
    }


def stage_key(payload: dict[str, Any]) -> str:
    """The key under which the record of this stage run is stored."""
    return payload_key(payload)
