"""What reading a statement yields, and how the names in it are resolved and noted. `tasks.normal` says what for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tasks.refusals import Origin, refuse_attributes, refuse_builtin, refuse_import
from tasks.scopes import (
    Scope,
    mangled,
    names_bound,
    resolve,
)
from tasks.source import Module, attribute_chain, imported

MENTION, CALL, VALUE = 0, 1, 2
"""How a name is used: in an annotation or a type test; called or looked into; or as an object that goes anywhere."""
FRAME_READERS = frozenset({"query", "eval", "evaluate", "sql", "execute"})
"""Methods that may read their caller's variables by name, when given an argument."""
CALLERS = frozenset("sorted min max map filter sum any all".split())
"""Builtins that do nothing with a function but call it."""
TESTERS = frozenset({"isinstance", "issubclass"})
DESCRIBERS = frozenset(
    "__annotations__ get_type_hints signature getdoc get_annotations getfullargspec model_json_schema json_schema"
    " TypeAdapter schema_json".split()
)
"""Names of what reads docstrings and annotations of whatever it is given."""
MAKERS = frozenset(
    "__class__ model_fields model_construct model_validate model_validate_json model_validate_strings parse_obj"
    " exclude_defaults __fields__ __pydantic_fields__".split()
)
"""Names of what reads or uses the defaults of a config class that it is not named by."""
NAMES_OF = frozenset({"__name__", "__qualname__", "__module__"})
HARMLESS_MEMBERS = NAMES_OF | frozenset({"__init__", "__new__", "__post_init__"})
VALIDATION = frozenset(
    "default default_factory ge gt le lt multiple_of min_length max_length pattern strict description title examples"
    " json_schema_extra allow_inf_nan validate_default".split()
)
"""Arguments of `Field` that only decide which values are accepted, or say so."""
LOG_HOOKS = frozenset({"log", "progress", "on_log", "on_progress"})
_SKIPPED = frozenset({"ctx", "kind", "type_comment", "simple"})
_FIELDS: dict[type, tuple[str, ...]] = {}

Use = tuple[tuple[str, ...], int]
"""A module-level name with the attributes taken from it, and how it is used."""


@dataclass(slots=True)
class Part:
    """A normal form, or a part of one that counts only under a condition, with what it uses."""

    tokens: list[str] = field(default_factory=list)
    uses: set[Use] = field(default_factory=set)
    imports: set[tuple[Origin, tuple[str, ...], int]] = field(default_factory=set)
    """What is used through import statements inside functions."""
    loads: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    """Names after a dot that are not called at once, and nested functions used as values. `*`: something
    may read docstrings and annotations of anything; `*methods`: any method may be taken; `*made`: config classes may be
    made without being named."""
    defines: set[str] = field(default_factory=set)
    """Names of methods, and whatever else could make a log line do something."""
    quiet: set[tuple[str, frozenset[str]]] = field(default_factory=set)
    """Methods that only return a value, with the names that must not be among `defines` for this to be so."""
    condition: str = ""
    """`value`: its symbol is used as a value; `made`: its symbol is used at all but in annotations; `log`; or none."""
    names: frozenset[str] = frozenset()
    """The part counts too when one of these is among all `attributes` (for `log`: among all `defines`)."""


@dataclass(frozen=True, slots=True)
class ClassKind:
    """What a class statement's decorators and bases say about it."""

    config: bool = False
    """A subclass of StageConfig."""
    plain: bool = False
    """Nothing reads its annotations."""
    known: bool = True
    """No base or decorator that might read docstrings or source."""


@dataclass(slots=True)
class Reading:
    """The normal form of a statement, and its conditional parts by qualified name (`f.__doc__`)."""

    main: Part = field(default_factory=Part)
    parts: dict[str, Part] = field(default_factory=dict)


class Restart(Exception):
    """Local names or log lines of this statement turned out to be visible."""


class NameReader:
    """Emits syntax in a scope, and notes every name that it uses."""

    def __init__(self, module: Module, class_kind: Any, is_silent: Any, *, verbatim: bool) -> None:
        self.module = module
        self.class_kind, self.is_silent = class_kind, is_silent
        self.verbatim = verbatim
        self.silent = not verbatim
        """False where all local names, docstrings and annotations are kept."""
        self.limit = VALUE
        """Names are used in no stronger way than this."""
        self.log_needs: set[str] = set()
        self.reading = Reading()
        self.part = self.reading.main
        self.out = self.part.tokens
        self.scope: Scope | None = None
        self.owner = ""
        self.path: list[str] = []
        self.in_class: ClassKind | None = None
        """The kind of the class whose body is being read, directly."""
        self.numbers: dict[tuple[Scope, str], str] = {}

    def names(self, node: ast.expr) -> list[str]:
        """The dotted names that `node` may stand for: of imports, of this module's definitions, of builtins."""
        root, *rest = attribute_chain(node)
        if not root:
            return ["?"]
        scope = resolve(self.scope, name := mangled(root, self.owner))
        if scope is not None and name not in scope.imports:
            return ["?"]
        if scope is not None:
            origins = [i.origin for s in scope.imports[name] for i in imported(s, self.module) if i.alias == root]
        elif name in self.module.bindings:
            origins = [(self.module.name, name)]
        else:
            origins = self.module.imports.get(name, [("builtins", name)])
        return [".".join([module, *([attribute] if attribute else []), *rest]) for module, attribute in origins]

    def use(self, chain: tuple[str, ...], kind: int, node: ast.expr) -> None:
        """Note the use of the name `chain[0]` with attributes."""
        chain = tuple(mangled(name, self.owner) for name in chain)
        where = f"{self.module.file}:{node.lineno}"
        refuse_attributes(chain[1:], where)
        self.mark(chain[1:], kind)
        name, scope = chain[0], resolve(self.scope, chain[0])
        if scope is None or scope.kind == "class":
            origins = self.module.imports.get(name, [])
            if not self.module.knows(name):
                refuse_builtin(chain, where)
                self.mark(chain[:1], CALL)
            for origin in origins:
                refuse_import(origin, chain[1:], where)
                self.mark(((origin[1] or ""),), CALL)
            self.part.uses.add((chain, min(kind, self.limit)))
        if scope is not None and name in scope.imports:
            for statement in scope.imports[name]:
                for found in imported(statement, self.module):
                    if mangled(found.alias, self.owner) == name:
                        refuse_import(found.origin, chain[1:], where)
                        self.mark(((found.origin[1] or ""),), CALL)
                        self.part.imports.add((found.origin, chain[1:], min(kind, self.limit)))
        elif scope is not None and kind == VALUE and len(chain) == 1 and name in scope.definitions:
            self.part.attributes.add(name)

    def mark(self, attributes: tuple[str, ...], kind: int) -> None:
        """Note what the names after a dot may read of an object that is not known here."""
        for number, name in enumerate(attributes):
            if name in DESCRIBERS:
                self.part.attributes.add("*")
            if name in MAKERS:
                self.part.attributes.add("*made")
            if kind == VALUE or number < len(attributes) - 1:
                self.part.attributes.add(name)

    def variable(self, name: str) -> None:
        """Emit a variable: the number of a local one, the name of any other."""
        if self.silent:
            key = mangled(name, self.owner)
            scope = resolve(self.scope, key)
            if scope is not None and key not in scope.fixed and not (key[:2] == "__" == key[-2:]):
                self.out.append(self.numbers.setdefault((scope, key), f"${len(self.numbers)}"))
                return
        self.out.append(name)

    # -- dispatch

    def visit(self, node: Any, kind: int = VALUE) -> None:
        """Emit an expression, statement or piece of either."""
        special = getattr(self, f"visit_{type(node).__name__}", None)
        if special is not None:
            special(node, kind)
        else:
            self.generic(node, kind)

    def generic(self, node: ast.AST, kind: int = VALUE) -> None:
        """Emit the type of a node and its fields, empty ones left out."""
        self.out.append(f"({type(node).__name__}")
        for name in _fields(type(node)):
            value = getattr(node, name, None)
            if value is None or value == []:
                continue
            self.out.append(f"{name}=")
            if isinstance(value, list):
                self.items(value)
            elif isinstance(value, ast.AST):
                self.visit(value)
            elif isinstance(value, str) and value in names_bound(node):
                self.variable(value)
            else:
                self.out.append(ascii(value))
        self.out.append(")")

    def items(self, values: list[Any]) -> None:
        """Emit a list: a block of statements, or anything else in order."""
        self.out.append("[")
        if values and isinstance(values[0], ast.stmt):
            self.body(values)
        else:
            for value in values:
                if isinstance(value, ast.AST):
                    self.visit(value)
                else:
                    self.out.append(ascii(value))
        self.out.append("]")

    @contextmanager
    def aside(self, name: str, condition: str, names: frozenset[str] = frozenset()) -> Iterator[None]:
        """Send what is emitted to a conditional part."""
        part = self.reading.parts.setdefault(name, Part(condition=condition, names=names))
        part.names |= names
        before = self.part, self.out, self.silent
        self.part, self.out, self.silent = part, part.tokens, False
        try:
            yield
        finally:
            self.part, self.out, self.silent = before

    @contextmanager
    def within(self, scope: Scope | None, *, owner: str | None = None, kind: ClassKind | None = None) -> Iterator[None]:
        """Read in another scope."""
        before = self.scope, self.owner, self.in_class
        self.scope, self.in_class = scope, kind
        self.owner = self.owner if owner is None else owner
        try:
            yield
        finally:
            self.scope, self.owner, self.in_class = before

    def is_builtin(self, name: str) -> bool:
        return resolve(self.scope, name) is None and not self.module.knows(name)


def _fields(kind: type) -> tuple[str, ...]:
    if kind not in _FIELDS:
        _FIELDS[kind] = tuple(name for name in kind._fields if name not in _SKIPPED)  # type: ignore[attr-defined]
    return _FIELDS[kind]
