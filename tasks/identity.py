"""What a stage run *is*: the digest of its reachable code, its canonical config, and the content of its inputs.

`key = BLAKE3(canonical JSON {algorithm, stage, code, config, inputs})`. The code digest covers the stage body and every
first-party function, class and constant that it reaches by name, through any number of modules, read from source without
importing anything. So editing a helper is a miss that names the helper, while comments, docstrings, formatting, type
annotations of functions, the order of definitions and the arguments of `@stage(...)` change nothing.

Two boundaries: the machinery in `tasks.stage` is not part of any stage (by contract it cannot change an output), and
third-party libraries enter by their dotted names only (their versions are recorded beside the result, not in its key).
A config class contributes its methods; the values of its fields are in the config half of the key already.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from artifacts.digest import canonical_json, digest_bytes
from artifacts.record import ALGORITHM, payload_key
from tasks.stage import Stage, StageConfig

BOUNDARY = frozenset({"tasks.stage"})
"""First-party modules that are machinery, not part of any stage's code."""
UNTRACEABLE = frozenset({"globals", "eval", "exec", "__import__", "import_module"})
"""Calls that reach code by a computed name. A stage whose code uses one is refused: its key could not be trusted."""


@dataclass(frozen=True, slots=True)
class CodeIdentity:
    """Digest of everything a stage reaches, and the digest of each part, so that a change can be named."""

    digest: str
    symbols: dict[str, str]
    """`path/to/file.py::symbol` -> digest of its normalised source."""


class SourceError(Exception):
    """A stage's code cannot be traced statically. The message names file, line and construct."""


@dataclass(slots=True)
class _Module:
    """The top level of one source file."""

    name: str
    file: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """Local name -> (module, attribute); attribute None for `import module`."""


class CodeReader:
    """Computes code identities. Keep one for a whole graph: modules are parsed once."""

    def __init__(self, root: Path | None = None, packages: tuple[str, ...] = ("tasks", "artifacts")) -> None:
        self.root = root or Path(__file__).resolve().parent.parent
        self.packages = packages
        self._modules: dict[str, _Module | None] = {}
        self._symbols: dict[tuple[str, str], tuple[str, frozenset[tuple[str, str]]]] = {}

    def stage(self, stage: Stage) -> CodeIdentity:
        """The identity of a declared stage: its body and its config class, and all they reach."""
        return self.reach(
            [(stage.body.__module__, stage.body.__name__), (stage.config.__module__, stage.config.__name__)]
        )

    def reach(self, start: list[tuple[str, str]]) -> CodeIdentity:
        """The identity of the code reachable from the (module, symbol) pairs `start`."""
        symbols: dict[str, str] = {}
        seen: set[tuple[str, str]] = set()
        todo = list(start)
        while todo:
            where = todo.pop()
            if where in seen or where[0] in BOUNDARY:
                continue
            seen.add(where)
            module = self._module(where[0])
            if module is None:
                raise SourceError(f"no source for module {where[0]!r} under {self.root}")
            digest, reached = self._symbol(module, where[1])
            symbols[f"{module.file}::{where[1]}"] = digest
            todo.extend(reached)
        return CodeIdentity(digest_bytes(canonical_json(symbols)), dict(sorted(symbols.items())))

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def _parse(self, name: str) -> _Module | None:
        if name.partition(".")[0] not in self.packages:
            return None
        base = self.root.joinpath(*name.split("."))
        path = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        if not path.is_file():
            return None
        module = _Module(name, path.relative_to(self.root).as_posix())
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        _collect(ast.parse(path.read_text(), str(path)).body, module, package)
        return module

    def _symbol(self, module: _Module, name: str) -> tuple[str, frozenset[tuple[str, str]]]:
        where = (module.name, name)
        if where not in self._symbols:
            self._symbols[where] = self._digest(module, name)
        return self._symbols[where]

    def _digest(self, module: _Module, name: str) -> tuple[str, frozenset[tuple[str, str]]]:
        if name not in module.definitions:
            if name in module.imports:
                target = self._resolve_import(*module.imports[name])
                return digest_bytes(b"re-export"), frozenset([target] if target else [])
            raise SourceError(f"{module.file} has no top-level definition {name!r}")
        node = module.definitions[name]
        config_class = isinstance(node, ast.ClassDef) and self._is_config(module, node)
        form = _normal(node, drop_fields=config_class)
        reached: set[tuple[str, str]] = set()
        external: dict[str, str] = {}
        for used, attributes in _names(node, follow_field_types=config_class):
            if used in UNTRACEABLE:
                raise SourceError(
                    f"{module.file}:{node.lineno}: {name} uses {used}(), which reaches code by a computed name; "
                    "the stage's key could not be trusted. Refer to the function or class by its name."
                )
            if used in module.definitions and used != name:
                reached.add((module.name, used))
            elif used in module.imports:
                self._follow(module.imports[used], used, attributes, reached, external)
        for origin, alias, attributes in _local_imports(node, module.name.rpartition(".")[0]):
            self._follow(origin, alias, attributes, reached, external)
        return digest_bytes(canonical_json([form, external])), frozenset(reached)

    def _follow(
        self,
        origin: tuple[str, str | None],
        alias: str,
        attributes: frozenset[str],
        reached: set[tuple[str, str]],
        external: dict[str, str],
    ) -> None:
        target, attribute = origin
        if target.partition(".")[0] not in self.packages:
            external[alias] = target if attribute is None else f"{target}:{attribute}"
            return
        resolved = self._resolve_import(target, attribute)
        if resolved is not None:
            reached.add(resolved)
            return
        as_module = target if attribute is None else f"{target}.{attribute}"
        module = self._module(as_module)
        if module is None:
            raise SourceError(f"cannot find first-party module {as_module!r}")
        wanted = attributes & (module.definitions.keys() | module.imports.keys()) or frozenset(module.definitions)
        reached.update((as_module, symbol) for symbol in wanted)

    def _resolve_import(self, target: str, attribute: str | None) -> tuple[str, str] | None:
        module = self._module(target)
        if attribute is None or module is None:
            return None
        known = attribute in module.definitions or attribute in module.imports
        return (target, attribute) if known else None

    def _is_config(self, module: _Module, node: ast.ClassDef) -> bool:
        for base in node.bases:
            if not isinstance(base, ast.Name):
                continue
            if module.imports.get(base.id) == ("tasks.stage", "StageConfig"):
                return True
            target = module.imports.get(base.id)
            if base.id in module.definitions:
                parent, owner = module.definitions[base.id], module
            elif target and (other := self._module(target[0])) and target[1] in other.definitions:
                parent, owner = other.definitions[target[1]], other
            else:
                continue
            if isinstance(parent, ast.ClassDef) and self._is_config(owner, parent):
                return True
        return False


def _collect(body: list[ast.stmt], module: _Module, package: str, whole: ast.stmt | None = None) -> None:
    """Index the names a module defines at its top level; inside `if` and `try`, the whole statement defines them."""
    for statement in body:
        owner = whole or statement
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            module.definitions[statement.name] = owner
        elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        module.definitions[name.id] = owner
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            for alias, origin in _imported(statement, package):
                module.imports[alias] = origin
        elif isinstance(statement, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
            parts = [getattr(statement, part, []) for part in ("body", "orelse", "finalbody")]
            parts += [handler.body for handler in getattr(statement, "handlers", [])]
            for part in parts:
                _collect(part, module, package, owner)


def _imported(statement: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, tuple[str, str | None]]]:
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            yield alias.asname or alias.name.partition(".")[0], (alias.name, None)
        return
    base = statement.module or ""
    if statement.level:
        above = package.split(".")[: len(package.split(".")) - statement.level + 1]
        base = ".".join([*above, base] if base else above)
    for alias in statement.names:
        yield alias.asname or alias.name, (base, alias.name)


def _local_imports(node: ast.stmt, package: str) -> Iterator[tuple[tuple[str, str | None], str, frozenset[str]]]:
    uses = dict(_names(node, follow_field_types=False))
    for inner in ast.walk(node):
        if isinstance(inner, (ast.Import, ast.ImportFrom)):
            for alias, origin in _imported(inner, package):
                yield origin, alias, uses.get(alias, frozenset())


def _names(node: ast.stmt, *, follow_field_types: bool) -> Iterator[tuple[str, frozenset[str]]]:
    """Every name that `node` uses outside function annotations, each with the attributes taken from it."""
    uses: dict[str, set[str]] = {}

    def visit(part: ast.AST, in_class: bool) -> None:
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            uses.setdefault(part.value.id, set()).add(part.attr)
        elif isinstance(part, ast.Name):
            uses.setdefault(part.id, set())
        if isinstance(part, ast.Attribute) and part.attr == "import_module":
            uses.setdefault(part.attr, set())
        for name, value in ast.iter_fields(part):
            if _skipped(part, name, in_class and follow_field_types):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not _is_stage_decorator(child):
                    visit(child, isinstance(part, ast.ClassDef))

    visit(node, False)
    for name, attributes in uses.items():
        yield name, frozenset(attributes)


def _skipped(part: ast.AST, name: str, keep_annotation: bool) -> bool:
    if name == "returns" and isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return True
    return name == "annotation" and (isinstance(part, ast.arg) or not keep_annotation)


def _is_stage_decorator(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "stage"


def _normal(node: Any, *, drop_fields: bool = False) -> Any:
    """A JSON form of the syntax tree without what cannot change behaviour, the same on every Python version."""
    if isinstance(node, list):
        return [_normal(item) for item in node if not _is_stage_decorator(item)]
    if isinstance(node, ast.Constant):
        return ["Constant", type(node.value).__name__, repr(node.value)]
    if not isinstance(node, ast.AST):
        return node
    fields: list[Any] = [type(node).__name__]
    for name, value in ast.iter_fields(node):
        if value is None or value == [] or name in ("ctx", "kind", "type_comment") or _skipped(node, name, True):
            continue
        if name == "body" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            value = [s for s in value if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            if drop_fields:
                value = [s for s in value if not isinstance(s, (ast.AnnAssign, ast.Assign))]
        normal = _normal(value)
        if normal != []:
            fields.append([name, normal])
    return fields


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
