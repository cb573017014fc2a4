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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from artifacts.digest import canonical_json, digest_bytes
from artifacts.record import ALGORITHM, payload_key
from tasks.effects import Judge
from tasks.normal import read_statement
from tasks.reading import CALL, HARMLESS_MEMBERS, MENTION, VALUE, Part, Reading
from tasks.refusals import Origin, SourceError
from tasks.source import Module, parse_module
from tasks.stage import Stage, StageConfig

__all__ = ["CodeIdentity", "CodeReader", "SourceError", "identity_config", "stage_key", "stage_payload"]

EFFECTS = "<module>"
"""Pseudo symbol: what a module runs for effect when it is imported."""

PACKAGES = ("tasks", "artifacts", "flows", "benchmarks")
"""The packages whose code counts. What a stage imports from elsewhere is a library, known by its names only."""
MACHINERY = frozenset({"tasks.stage"})
_PUBLIC = ("stage", "Stage", "StageConfig", "StageContext", "StageError", "StageStopped", "Checkpoints")
BOUNDARY = frozenset((module, name) for module in MACHINERY for name in (*_PUBLIC, EFFECTS))
"""What a stage may use of the machinery, which is no part of any stage's code."""
ORDER = "(order)"
"""Entry of a mapping in a config whose keys are not sorted: code that reads it sees its order."""
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

    symbols: set[tuple[Symbol, int]] = field(default_factory=set)
    """With how each is used: `MENTION`, `CALL` or `VALUE`."""
    walked: set[tuple[str, tuple[str, ...], int]] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Piece:
    """The digest of a symbol, or of a part of one that counts only under a condition, and what it leads to."""

    digest: str | None
    """None for a module that has no effects."""
    reached: frozenset[tuple[Symbol, int]]
    attributes: frozenset[str]
    defines: frozenset[str]
    quiet: frozenset[tuple[str, frozenset[str]]]
    condition: str = ""
    names: frozenset[str] = frozenset()


class CodeReader:
    """Computes code identities. Keep one for a whole graph: modules are parsed once."""

    def __init__(self, root: Path | None = None, packages: tuple[str, ...] = ()) -> None:
        self.root = root or Path(__file__).resolve().parent.parent
        self.packages = frozenset({*PACKAGES, *packages})
        self._modules: dict[str, Module | None] = {}
        self._judge = Judge(self._module)
        self._readings: dict[ast.stmt, Reading] = {}
        self._pieces: dict[Symbol, dict[str, _Piece]] = {}

    def stage(self, stage: Stage) -> CodeIdentity:
        """The identity of a declared stage: its body and its config class, and all they reach."""
        return self.reach(
            [(stage.body.__module__, stage.body.__name__)], [(stage.config.__module__, stage.config.__name__)]
        )

    def reach(self, start: list[Symbol], configs: list[Symbol] = []) -> CodeIdentity:  # noqa: B006 - never changed
        """The identity of the code reachable from the (module, symbol) pairs `start`, and from config classes.

        Raises:
            SourceError: some of it cannot be found, or reaches code in a way that cannot be followed.
        """
        first = _Reached()
        for symbol, kind in [*((s, CALL) for s in start), *((s, MENTION) for s in configs)]:
            module = self._module(symbol[0])
            if module is None:
                raise SourceError(f"no source for module {symbol[0]!r} under {self.root}")
            if not module.knows(symbol[1]) and symbol not in BOUNDARY:
                raise SourceError(f"{module.file} has no top-level definition {symbol[1]!r}")
            self._walk(symbol[0], (symbol[1],), kind, first, module.file)
        return _Closure(self).close(first.symbols)

    def pieces(self, where: Symbol) -> dict[str, _Piece]:
        """The pieces of a symbol by name; the symbol itself is named as it is."""
        if where not in self._pieces:
            module = self._modules[where[0]]
            assert module is not None
            self._pieces[where] = self._read(module, where[1])
        return self._pieces[where]

    def file(self, name: str) -> str:
        """The file of a module that was read, relative to the root."""
        module = self._modules[name]
        assert module is not None
        return module.file

    def _module(self, name: str) -> Module | None:
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def _parse(self, name: str) -> Module | None:
        if not self._is_first_party(name):
            return None
        base = self.root.joinpath(*name.split("."))
        path = base / "__init__.py" if (base / "__init__.py").is_file() else base.with_suffix(".py")
        if not path.is_file():
            return None
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        return parse_module(path.read_bytes(), name, path.relative_to(self.root).as_posix(), package)

    def _is_first_party(self, name: str) -> bool:
        return name.partition(".")[0] in self.packages

    def _read(self, module: Module, name: str) -> dict[str, _Piece]:
        """The pieces of a symbol."""
        reached = _Reached()
        statements = self._judge.effects(module) if name == EFFECTS else module.bindings.get(name, [])
        if name == EFFECTS:
            for dotted in module.loads:
                self._load(dotted, reached)
        self._load(module.name, reached)
        readings = []
        for statement in statements:
            if statement not in self._readings:
                self._readings[statement] = read_statement(
                    statement, module, self._judge.class_kind, self._judge.is_silent
                )
            readings.append((self._readings[statement], f"{module.file}:{statement.lineno}"))
        silent = name == EFFECTS and not readings
        found = {name: self._piece(module, name, [(r.main, at) for r, at in readings], reached, silent=silent)}
        for reading, at in readings if name != EFFECTS else []:
            for part_name, part in reading.parts.items():
                found[part_name] = self._piece(module, "", [(part, at)], _Reached())
        return found

    def _piece(
        self, module: Module, name: str, parts: list[tuple[Part, str]], reached: _Reached, *, silent: bool = False
    ) -> _Piece:
        origins = {name: module.imports[name]} if name in module.imports else {}
        for part, at in parts:
            for chain, kind in part.uses:
                if chain[0] in module.imports:
                    origins[chain[0]] = module.imports[chain[0]]
                self._follow(module, chain, kind, reached, at)
            for origin, chain, kind in part.imports:
                self._walk_origin(origin, chain, kind, reached, at)
            for dotted in part.loads:
                self._load(dotted, reached)
        text = "\n".join(["\n".join(part.tokens) for part, _ in parts] + [canonical_json(origins).decode()])
        return _Piece(
            digest=None if silent else digest_bytes(text.encode()),
            reached=frozenset(reached.symbols),
            attributes=frozenset().union(*(part.attributes for part, _ in parts)),
            defines=frozenset().union(*(part.defines for part, _ in parts)),
            quiet=frozenset().union(*(part.quiet for part, _ in parts)),
            condition=parts[0][0].condition if parts else "",
            names=parts[0][0].names if parts else frozenset(),
        )

    def _follow(self, module: Module, chain: tuple[str, ...], kind: int, reached: _Reached, at: str) -> None:
        if chain[0] in module.bindings:
            reached.symbols.add(((module.name, chain[0]), _kind_of_root(chain[1:], kind)))
        for origin in module.imports.get(chain[0], []):
            self._walk_origin(origin, chain[1:], kind, reached, at)

    def _load(self, dotted: str, reached: _Reached) -> None:
        """Importing `a.b.c` runs `a`, `a.b` and `a.b.c`, as far as these are first-party modules."""
        parts = dotted.split(".")
        for end in range(1, len(parts) + 1):
            if self._module(prefix := ".".join(parts[:end])) is not None:
                reached.symbols.add(((prefix, EFFECTS), MENTION))

    def _walk_origin(self, origin: Origin, chain: tuple[str, ...], kind: int, reached: _Reached, at: str) -> None:
        module, attribute = origin
        self._walk(module, chain if attribute is None else (attribute, *chain), kind, reached, at)

    def _walk(self, name: str, chain: tuple[str, ...], kind: int, reached: _Reached, at: str) -> None:
        """Reach what the attributes `chain`, taken from the module `name`, lead to."""
        if (
            not self._is_first_party(name)
            or chain
            and (name, chain[0]) in BOUNDARY
            or (name, chain, kind) in reached.walked
        ):
            return
        reached.walked.add((name, chain, kind))
        module = self._module(name)
        if module is None:
            raise SourceError(f"{at}: cannot find first-party module {name!r} under {self.root}; correct the import.")
        self._load(name, reached)
        if chain and module.knows(chain[0]):
            reached.symbols.add(((name, chain[0]), _kind_of_root(chain[1:], kind)))
            for origin in module.imports.get(chain[0], []):
                self._walk_origin(origin, chain[1:], kind, reached, at)
        elif chain and self._module(f"{name}.{chain[0]}") is not None:
            self._walk(f"{name}.{chain[0]}", chain[1:], kind, reached, at)
        elif module.is_package:
            raise SourceError(
                f"{at}: package {name!r} is used as a value, or for a name it does not define, so what is taken from "
                "it cannot be traced; import the module or function that is meant by its name."
            )
        else:
            for symbol in [*module.bindings, *module.imports]:
                self._walk(name, (symbol,), VALUE, reached, at)


class _Closure:
    """Everything that a set of symbols leads to, with the conditional pieces that count."""

    def __init__(self, reader: CodeReader) -> None:
        self.reader = reader
        self.kinds: dict[Symbol, int] = {}
        self.found: dict[tuple[Symbol, str], _Piece] = {}
        self.attributes: set[str] = set()
        self.defines: set[str] = set()
        self.quiet: set[tuple[str, frozenset[str]]] = set()

    def close(self, start: Iterable[tuple[Symbol, int]]) -> CodeIdentity:
        todo = list(start)
        while todo:
            while todo:
                where, kind = todo.pop()
                if where not in BOUNDARY and kind > self.kinds.get(where, -1):
                    self.kinds[where] = kind
                    todo.extend(self._add(where, where[1]))
            for where, kind in list(self.kinds.items()):
                for name, piece in self.reader.pieces(where).items():
                    if (where, name) not in self.found and self._counts(piece, kind):
                        todo.extend(self._add(where, name))
        symbols = {
            f"{self.reader.file(where[0])}::{name}": piece.digest
            for (where, name), piece in self.found.items()
            if piece.digest is not None
        }
        return CodeIdentity(digest_bytes(canonical_json(symbols)), dict(sorted(symbols.items())))

    def _add(self, where: Symbol, name: str) -> frozenset[tuple[Symbol, int]]:
        piece = self.reader.pieces(where)[name]
        self.found[where, name] = piece
        self.attributes |= piece.attributes
        self.defines |= piece.defines
        self.quiet |= piece.quiet
        while more := {name for name, needs in self.quiet if name not in self.defines and needs & self.defines}:
            self.defines |= more
        return piece.reached

    def _counts(self, piece: _Piece, kind: int) -> bool:
        if piece.condition == "log":
            return "*" in self.defines or not piece.names.isdisjoint(self.defines)
        if piece.condition == "made":
            return kind >= CALL or "*made" in self.attributes
        if piece.condition == "value" and kind == VALUE:
            return True
        if "*methods" in self.attributes and piece.names:
            return True
        return "*" in self.attributes or not piece.names.isdisjoint(self.attributes)


def _kind_of_root(attributes: tuple[str, ...], kind: int) -> int:
    """How a symbol is used when `attributes` are taken from it."""
    if not attributes:
        return kind
    describes = attributes[0].startswith(("model_", "__", "schema")) and attributes[0] not in HARMLESS_MEMBERS
    return VALUE if describes else min(kind, CALL)


def identity_config(config: StageConfig) -> dict[str, Any]:
    """The part of a config that is identity: every declared field, defaults filled in, except those marked
    `json_schema_extra={"identity": False}`.

    Raises:
        TypeError: a field's value has no canonical form; the message names the field.
    """
    return _plain(config, type(config).__name__)


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, BaseModel):
        if value.model_extra:
            raise TypeError(f"{where}: {', '.join(value.model_extra)} is not declared; every field must be")
        kept = {}
        for name, info in type(value).model_fields.items():
            extra = info.json_schema_extra
            if not (isinstance(extra, dict) and extra.get("identity") is False):
                kept[name] = _plain(getattr(value, name), f"{where}.{name}")
        return kept
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            if type(key) is not str or key == ORDER:
                raise TypeError(f"{where}: the key {key!r} has no canonical form; use text")
            plain[key] = _plain(item, f"{where}.{key}")
        return plain if list(plain) == sorted(plain) else {**plain, ORDER: list(plain)}
    if isinstance(value, tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if value is None or type(value) in (str, bool, int, float):
        return value
    raise TypeError(
        f"{where}: a {type(value).__name__} has no canonical form; use plain numbers, text, tuples or mappings"
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
