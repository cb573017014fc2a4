"""The normal form of one top-level statement: what can change behaviour, and nothing else; and what the statement uses.

Left out: comments, formatting, `pass` and constants that stand alone, the arguments of `@stage(...)`, and

* the *names* of local variables, which become numbers: two forms are equal when one can be renamed into the other. Names
  that something else can see are kept: parameters (called by keyword), nested functions and classes (`__name__`), imports,
  attributes, what is declared `global`, the text of `f"{x=}"`. So are all names of a statement that calls something
  like `frame.query("x > @limit")`, which reads the variables of its caller;
* statements whose only effect is a log line (`tasks.logs`);
* docstrings and annotations that only a reader of the function or class *object* could see. They form parts of their own
  (`f.__doc__`, `f.__annotations__`), which count as soon as the object is used otherwise than by calling it. Under a
  decorator or a base class that may read them, they stay where they are, and so do all names;
* the order of neighbouring methods that have no decorators and plain defaults.

Of a config class the values of the fields are left out: they are in the config half of the key. The whole fields are a
part too (`C.model_fields`), which counts when the code makes a config of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tasks.logs import is_effect_free, log_call
from tasks.refusals import Origin, refuse_attributes, refuse_builtin, refuse_import
from tasks.scopes import (
    FUNCTIONS,
    Scope,
    arguments_of,
    class_scope,
    comprehension_scope,
    function_scope,
    mangled,
    names_bound,
    resolve,
    types_scope,
)
from tasks.source import Module, attribute_chain, imported, is_idle, is_stage_decorator

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


class _Restart(Exception):
    """Local names or log lines of this statement turned out to be visible."""


def read_statement(
    statement: ast.stmt,
    module: Module,
    class_kind: Callable[[ast.ClassDef, Callable[[ast.expr], list[str]]], ClassKind],
    is_silent: Callable[[ast.expr, Callable[[ast.expr], list[str]]], bool],
) -> Reading:
    """Read a top-level statement of `module`.

    `class_kind` and `is_silent` judge classes and decorators; each is given a function from an expression to the dotted
    names it may stand for.

    Raises:
        SourceError: it reaches code in a way that cannot be followed.
    """
    reader = _Reader(module, class_kind, is_silent, verbatim=False)
    try:
        reading = reader.read(statement)
    except _Restart:
        return _Reader(module, class_kind, is_silent, verbatim=True).read(statement)
    if reader.log_needs:
        whole = _Reader(module, class_kind, is_silent, verbatim=True).read(statement).main
        whole.condition, whole.names = "log", frozenset(reader.log_needs)
        reading.parts[f"{getattr(statement, 'name', '<module>')}.<log>"] = whole
    return reading


class _Reader:
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

    def read(self, statement: ast.stmt) -> Reading:
        self.body([statement])
        return self.reading

    # -- names

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

    # -- statements

    def body(self, statements: list[ast.stmt]) -> None:
        """Emit a block, without what does nothing."""
        for statement in statements:
            if is_idle(statement):
                if not self.silent:
                    self.visit(statement)
            elif not self.silent or not self.is_dropped(statement):
                self.visit(statement)

    def is_dropped(self, statement: ast.stmt) -> bool:
        """Whether a statement does nothing but log, or declare a local variable."""
        if self.scope is None or self.scope.kind != "function":
            return False
        if isinstance(statement, ast.AnnAssign):
            return statement.value is None and isinstance(statement.target, ast.Name)
        needs: set[str] = set()
        if not self._only_logs(statement, needs):
            return False
        self.log_needs |= needs | {"log", "on_log", "progress", "on_progress"}
        return True

    def _only_logs(self, statement: ast.stmt, needs: set[str]) -> bool:
        if isinstance(statement, ast.If):
            inner = [*statement.body, *statement.orelse]
            return is_effect_free(statement.test, self._is_builtin, needs) and all(
                is_idle(part) or self._only_logs(part, needs) for part in inner
            )
        call = log_call(statement)
        if call is None:
            return False
        scope = resolve(self.scope, call.receiver)
        if scope is None or call.receiver not in scope.contexts or call.receiver in scope.stored:
            return False
        needs.update(call.needs)
        return all(is_effect_free(argument, self._is_builtin, needs) for argument in call.arguments)

    def _is_builtin(self, name: str) -> bool:
        return resolve(self.scope, name) is None and not self.module.knows(name)

    def visit_Import(self, node: ast.Import | ast.ImportFrom, kind: int) -> None:
        for alias in node.names:
            level = getattr(node, "level", "")
            start = getattr(node, "module", "")
            self.out.append(f"({type(node).__name__} {level} {start} {alias.name} {alias.asname})")
        if self.scope is None:
            return
        for found in imported(node, self.module):
            self.part.loads.add(found.loads)
            refuse_attributes((found.origin[1] or "",), f"{self.module.file}:{node.lineno}")
            name = mangled(found.alias, self.owner)
            if self.scope.kind == "class" or name in self.scope.declared:
                refuse_import(found.origin, (), f"{self.module.file}:{node.lineno}")
                self.part.imports.add((found.origin, (), VALUE))

    visit_ImportFrom = visit_Import

    def visit_Global(self, node: ast.Global | ast.Nonlocal, kind: int) -> None:
        self.out.append(f"({type(node).__name__}")
        for name in node.names:
            if isinstance(node, ast.Global):
                self.part.uses.add(((mangled(name, self.owner),), CALL))
            elif self.silent and (scope := resolve(self.scope, name)) and name in scope.contexts:
                raise _Restart
            self.variable(name)
        self.out.append(")")

    visit_Nonlocal = visit_Global

    def visit_AnnAssign(self, node: ast.AnnAssign, kind: int) -> None:
        inside = self.in_class
        if inside is None and self.scope is not None and self.silent or inside is not None and inside.plain:
            if inside is not None:
                with self.described("__annotations__", True):
                    self.visit(node.target)
                    self.annotation(node.annotation, MENTION)
            if node.value is not None:
                self.assignment([node.target], node.value)
            elif inside is None:
                self.visit(node.target)
        elif inside is None and self.silent:
            self.assignment([node.target], node.value) if node.value else self.visit(node.target)
        else:
            self.out.append("(Annotated")
            self.visit(node.target)
            self.annotation(node.annotation, VALUE)
            if node.value is not None:
                self.visit(node.value)
            self.out.append(")")

    def visit_Assign(self, node: ast.Assign, kind: int) -> None:
        self.assignment(node.targets, node.value)

    def assignment(self, targets: list[ast.expr], value: ast.expr) -> None:
        self.out.append("(Assign")
        for target in targets:
            self.visit(target)
        self.out.append("=")
        self.visit(value)
        self.out.append(")")

    # -- expressions

    def visit_Name(self, node: ast.Name, kind: int) -> None:
        if isinstance(node.ctx, ast.Load):
            self.use((node.id,), kind, node)
        self.out.append("(Name")
        self.variable(node.id)
        self.out.append(")")

    def visit_Attribute(self, node: ast.Attribute, kind: int) -> None:
        if not isinstance(node.ctx, ast.Load) and (node.attr in LOG_HOOKS or node.attr[:2] == "__"):
            self.part.defines.add(node.attr)
        attributes, base = [node.attr], node.value
        while isinstance(base, ast.Attribute):
            attributes.append(base.attr)
            base = base.value
        self.out.append("(Attribute")
        self.out.extend(attributes)
        if isinstance(base, ast.Name):
            self.use((base.id, *reversed(attributes)), kind if isinstance(node.ctx, ast.Load) else CALL, node)
            self.out.append("of")
            self.variable(base.id)
        else:
            chain = tuple(mangled(name, self.owner) for name in reversed(attributes))
            refuse_attributes(chain, f"{self.module.file}:{node.lineno}")
            self.mark(chain, kind)
            is_type = isinstance(base, ast.Call) and isinstance(base.func, ast.Name) and base.func.id == "type"
            self.visit(base, MENTION if is_type and chain[0] in NAMES_OF else CALL)
        self.out.append(")")

    def visit_Subscript(self, node: ast.Subscript, kind: int) -> None:
        writes = not isinstance(node.ctx, ast.Load) and self.names(node.value) == ["os.environ"]
        self.out.append("(Subscript")
        if writes:
            self.out.append("os.environ")
        else:
            self.visit(node.value)
        self.visit(node.slice)
        self.out.append(")")

    def visit_Call(self, node: ast.Call, kind: int) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in FRAME_READERS and (node.args or node.keywords) and self.silent:
            raise _Restart
        builtin = isinstance(node.func, ast.Name) and self._is_builtin(name)
        if builtin and name == "dir" and not node.args:
            refuse_builtin(("locals",), f"{self.module.file}:{node.lineno}")
        if name in ("property", "cached_property"):
            self.part.defines.add("*")
        if builtin and name == "setattr" and not (len(node.args) > 1 and isinstance(node.args[1], ast.Constant)):
            self.part.defines.add("*")
        if builtin and name in ("getattr", "hasattr") and len(node.args) > 1:
            self._computed_attribute(node)
        if name == "schema" and not node.args and not node.keywords:
            self.part.attributes.add("*")
        if builtin and name == "type" and kind != MENTION:
            self.part.attributes.add("*made")
        how = MENTION if builtin and name in TESTERS else CALL if builtin and name in CALLERS else VALUE
        self.out.append("(Call")
        self.visit(node.func, CALL)
        for argument in node.args:
            self.visit(argument, how)
        for keyword in node.keywords:
            self.out.append(f"{keyword.arg}=")
            if keyword.arg in LOG_HOOKS:
                self.part.defines.add(keyword.arg)
            refuse_attributes(
                (keyword.arg,) if keyword.arg == "exclude_unset" else (), f"{self.module.file}:{node.lineno}"
            )
            if keyword.arg in MAKERS:
                self.part.attributes.add("*made")
            sorts = name in ("sort", "groupby") and keyword.arg == "key"
            self.visit(keyword.value, CALL if sorts else how)
        self.out.append(")")

    def _computed_attribute(self, node: ast.Call) -> None:
        """`getattr(x, "name")` reads an attribute that is named, `getattr(x, name)` any."""
        given = node.args[1]
        if isinstance(given, ast.Constant) and isinstance(given.value, str):
            refuse_attributes((given.value,), f"{self.module.file}:{node.lineno}")
            self.mark((given.value,), VALUE)
        else:
            self.part.attributes.add("*methods")

    def visit_Compare(self, node: ast.Compare, kind: int) -> None:
        self.out.append("(Compare")
        for operator, side in zip([None, *node.ops], [node.left, *node.comparators], strict=True):
            self.out.append(type(operator).__name__)
            self.visit(side, MENTION if isinstance(operator, (ast.Is, ast.IsNot)) else VALUE)
        self.out.append(")")

    def visit_Constant(self, node: ast.Constant, kind: int) -> None:
        value = node.value
        if isinstance(value, str):
            if value in LOG_HOOKS:
                self.part.defines.add(value)
            self.mark((value,), CALL)
            if value[:2] == "__":
                refuse_attributes((value,), f"{self.module.file}:{node.lineno}")
        text = hex(value) if type(value) is int else ascii(value)
        self.out.append(f"{type(value).__name__} {text}")

    def visit_JoinedStr(self, node: ast.JoinedStr, kind: int) -> None:
        """Neighbouring texts are joined and empty ones left out, as Python versions differ in how they split them."""
        text, pieces = "", []
        for value in node.values:
            if isinstance(value, ast.Constant):
                text += value.value
                continue
            if text:
                pieces.append(text)
            pieces.append(value)
            text = ""
        if not pieces:
            self.out.append(f"str {ascii(text)}")
            return
        self.out.append("(Joined")
        for piece in [*pieces, *([text] if text else [])]:
            if isinstance(piece, str):
                self.out.append(f"str {ascii(piece)}")
                continue
            self.out.append(f"(Formatted {piece.conversion}")
            self.visit(piece.value)
            if piece.format_spec is not None and piece.format_spec.values:
                self.visit(piece.format_spec)
            self.out.append(")")
        self.out.append(")")

    def comprehension(self, node: Any, kind: int) -> None:
        first = node.generators[0]
        self.out.append(f"({type(node).__name__}")
        self.visit(first.iter)
        with self.within(comprehension_scope(node, self.scope, self.owner)):
            for generator in node.generators:
                self.out.append(f"for {generator.is_async}")
                self.visit(generator.target)
                if generator is not first:
                    self.visit(generator.iter)
                self.items(generator.ifs)
            for name in ("key", "value", "elt"):
                if (result := getattr(node, name, None)) is not None:
                    self.visit(result)
        self.out.append(")")

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension

    def visit_ExceptHandler(self, node: ast.ExceptHandler, kind: int) -> None:
        self.out.append("(except")
        if node.type is not None:
            for part in node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]:
                self.visit(part, CALL)
        self.out.append("as")
        if node.name:
            self.variable(node.name)
        self.items(node.body)
        self.out.append(")")

    def visit_MatchClass(self, node: ast.MatchClass, kind: int) -> None:
        self.out.append("(MatchClass")
        self.visit(node.cls, CALL)
        self.items(node.patterns)
        self.items([ast.Constant(name) for name in node.kwd_attrs])
        self.items(node.kwd_patterns)
        self.out.append(")")

    # -- definitions

    def annotation(self, node: ast.expr, limit: int) -> None:
        """Emit an annotation; what a quoted one names is used too."""
        before, self.limit = self.limit, min(limit, self.limit)
        self.visit(node)
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                try:
                    quoted = ast.parse(part.value, mode="eval").body
                except (SyntaxError, ValueError):
                    continue
                tokens, self.out = self.out, []
                self.visit(quoted)
                self.out = tokens
        self.limit = before

    def decorators(self, node: Any) -> list[ast.expr]:
        return [d for d in node.decorator_list if not is_stage_decorator(d, self.module)]

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef, kind: int) -> None:
        refuse_builtin((node.name,), f"{self.module.file}:{node.lineno}")
        decorators = self.decorators(node)
        foreign = self.in_class is not None and not self.in_class.known
        foreign = foreign or not all(self.is_silent(d, self.names) for d in decorators)
        silent = self.silent and not foreign
        annotated = VALUE if foreign else MENTION
        self.define(node)
        if self.in_class is not None and self.in_class.config and decorators:
            if any(self.names(decorator) == ["builtins.classmethod"] for decorator in decorators):
                self.part.attributes.add("*made")
        self.out.append(f"({type(node).__name__} {node.name}")
        for decorator in decorators:
            self.visit(decorator, CALL)
        self.defaults(node.args)
        outer = types_scope(node, self.scope, self.owner)
        with self.named(node.name), self.within(outer), self.described("__annotations__", silent):
            for parameter in getattr(node, "type_params", ()):
                self.visit(parameter)
            for argument in arguments_of(node.args):
                if argument.annotation:
                    self.out.append(argument.arg)
                    self.annotation(argument.annotation, annotated)
            if node.returns:
                self.out.append("->")
                self.annotation(node.returns, annotated)
        scope = function_scope(node, outer, self.owner)
        scope.contexts.update(self.contexts(node, staged=len(decorators) < len(node.decorator_list)))
        with self.named(node.name), self.within(scope), self.keeping(silent):
            self.docstrings(node.body[:1], silent)
            self.out.append("[")
            self.body(node.body)
            self.out.append("])")

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda, kind: int) -> None:
        self.out.append("(Lambda")
        self.defaults(node.args)
        with self.within(function_scope(node, self.scope, self.owner)):
            self.visit(node.body)
        self.out.append(")")

    def define(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Note a definition that could make a log line do something: a method, or a module's `__getattr__`."""
        if self.in_class is None and not node.name[:2] == "__" == node.name[-2:]:
            return
        body = [statement for statement in node.body if not is_idle(statement)]
        needs: set[str] = set()
        if len(body) == 1 and isinstance(body[0], ast.Return) and body[0].value is not None:
            with self.within(function_scope(node, self.scope, self.owner)):
                if is_effect_free(body[0].value, self._is_builtin, needs):
                    self.part.quiet.add((node.name, frozenset(needs)))
                    return
        self.part.defines.add(node.name)

    def defaults(self, arguments: ast.arguments) -> None:
        """Emit the parameters' names and kinds, and their defaults, which the scope around the function evaluates."""
        for name in ("posonlyargs", "args", "kwonlyargs"):
            self.out.append(f"{name} {' '.join(argument.arg for argument in getattr(arguments, name))}")
        for argument in (arguments.vararg, arguments.kwarg):
            self.out.append(f"*{argument.arg if argument else ''}")
        for default in [*arguments.defaults, None, *arguments.kw_defaults]:
            self.visit(default) if default is not None else self.out.append("-")

    def contexts(self, node: Any, *, staged: bool) -> Iterator[str]:
        """Parameters that hold the stage context: the first one of a stage's body, and those annotated as such."""
        for number, argument in enumerate(arguments_of(node.args)):
            annotated = argument.annotation and self.names(argument.annotation) == ["tasks.stage.StageContext"]
            if annotated or (staged and number == 0):
                yield argument.arg

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Read the definition `name`, for the names of its parts."""
        self.path.append(name)
        try:
            yield
        finally:
            self.path.pop()

    @contextmanager
    def keeping(self, silent: bool) -> Iterator[None]:
        """Read what a decorator or base class may look into, with all its names unless `silent`."""
        before, self.silent = self.silent, self.silent and silent
        try:
            yield
        finally:
            self.silent = before

    @contextmanager
    def described(self, what: str, silent: bool) -> Iterator[None]:
        """Emit docstrings or annotations: aside, unless a decorator or base class may read them."""
        if not silent:
            yield
            return
        names = frozenset(self.path[1:] if self.is_nested() else self.path[-1:] if len(self.path) > 1 else ())
        with self.aside(f"{'.'.join(self.path)}.{what}", "" if self.is_nested() else "value", names):
            yield

    def is_nested(self) -> bool:
        """Whether the definition being read stands inside a function."""
        scope = self.scope
        while scope is not None and scope.kind != "function":
            scope = scope.parent
        return scope is not None

    def docstrings(self, statements: list[ast.stmt], silent: bool) -> None:
        texts = [s.value for s in statements if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
        if texts and silent:
            inside = self.scope
            self.scope = inside.parent if inside else None
            with self.described("__doc__", silent):
                for text in texts:
                    self.visit(text)
            self.scope = inside
        elif texts:
            for text in texts:
                self.visit(text)

    def visit_ClassDef(self, node: ast.ClassDef, kind: int) -> None:
        refuse_builtin((node.name,), f"{self.module.file}:{node.lineno}")
        found = self.class_kind(node, self.names)
        silent = self.silent and found.known
        self.out.append(f"(ClassDef {node.name}")
        for decorator in node.decorator_list:
            self.visit(decorator, CALL)
        outer = types_scope(node, self.scope, self.owner)
        with self.within(outer):
            for base in node.bases:
                self.visit(base, (MENTION if found.config else CALL) if found.known else VALUE)
            for keyword in node.keywords:
                self.visit(keyword)
        scope = class_scope(node, outer)
        with self.named(node.name), self.keeping(silent), self.within(scope, owner=node.name, kind=found):
            self.docstrings(node.body, silent)
            for parameter in getattr(node, "type_params", ()):
                self.visit(parameter)
            statements = _methods_sorted(node.body, self._is_builtin) if silent else node.body
            self.out.append("[")
            if found.config:
                self.config_body(node, statements)
            else:
                self.body(statements)
            self.out.append("])")

    def config_body(self, node: ast.ClassDef, statements: list[ast.stmt]) -> None:
        """A config class: its fields in order without their values, and everything else as in any class."""
        for statement in statements:
            if not is_config_field(statement):
                self.body([statement])
                continue
            assert isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            with self.aside(f"{'.'.join(self.path)}.model_fields", "made"):
                for base in node.bases:
                    self.visit(base, CALL)
                self.out.append(statement.target.id)
                self.annotation(statement.annotation, CALL)
                if statement.value is not None:
                    self.visit(statement.value)
            call = statement.value if isinstance(statement.value, ast.Call) else None
            if call is None or not _is_not_identity(call):
                self.out.append(f"(field {statement.target.id}")
                self.field_rest(statement.annotation, call)
                self.out.append(")")

    def field_rest(self, annotation: ast.expr, call: ast.Call | None) -> None:
        """What a field has beside its value: its types, arguments of `Field` such as `alias`, and code in `Annotated`."""
        tokens, self.out = self.out, []
        self.annotation(annotation, MENTION)
        self.out = tokens
        inner = [part for part in ast.walk(annotation) if isinstance(part, (ast.Call, ast.Lambda))]
        for part in [*inner, *([call] if call else [])]:
            if isinstance(part, ast.Call) and self.names(part.func) == ["pydantic.Field"]:
                for keyword in part.keywords:
                    if keyword.arg not in VALIDATION:
                        self.visit(keyword)
            elif part is not call:
                self.visit(part)


def _methods_sorted(body: list[ast.stmt], is_builtin: Callable[[str], bool]) -> list[ast.stmt]:
    """`body` with each run of methods that can stand in any order sorted by name."""
    done: list[ast.stmt] = []
    run: list[ast.stmt] = []

    def flush() -> None:
        names = [method.name for method in run]  # type: ignore[attr-defined]
        done.extend(sorted(run, key=lambda m: m.name) if len(set(names)) == len(names) else run)  # type: ignore[attr-defined]
        run.clear()

    for statement in body:
        if isinstance(statement, FUNCTIONS) and _is_free(statement, is_builtin):
            run.append(statement)
        elif not is_idle(statement):
            flush()
            done.append(statement)
    flush()
    return done


def _is_free(method: ast.FunctionDef | ast.AsyncFunctionDef, is_builtin: Callable[[str], bool]) -> bool:
    plain = ("staticmethod", "classmethod", "property")
    decorators = all(isinstance(d, ast.Name) and d.id in plain and is_builtin(d.id) for d in method.decorator_list)
    defaults = [d for d in [*method.args.defaults, *method.args.kw_defaults] if d is not None]
    return decorators and all(isinstance(default, ast.Constant) for default in defaults)


def is_config_field(statement: ast.stmt) -> bool:
    """Whether a statement of a config class declares a field, whose value is in the config half of the key."""
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        return False
    name = statement.target.id
    return not (name == "model_config" or name.startswith("_") or "ClassVar" in ast.unparse(statement.annotation))


def _is_not_identity(call: ast.Call) -> bool:
    extra = next((k.value for k in call.keywords if k.arg == "json_schema_extra"), None)
    return isinstance(extra, ast.Dict) and any(
        isinstance(k, ast.Constant) and k.value == "identity" and isinstance(v, ast.Constant) and v.value is False
        for k, v in zip(extra.keys, extra.values, strict=True)
    )


def _fields(kind: type) -> tuple[str, ...]:
    if kind not in _FIELDS:
        _FIELDS[kind] = tuple(name for name in kind._fields if name not in _SKIPPED)  # type: ignore[attr-defined]
    return _FIELDS[kind]
