"""What one source file says, read without importing it: the names it binds, what it runs for effect, what it uses.

Everything here is about syntax alone; `tasks.identity` decides which parts of which files belong to a stage. What cannot
be understood statically is refused with `SourceError`, never ignored: a key that misses a change is worse than an error.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

UNTRACEABLE = frozenset(
    "globals locals vars eval exec compile __import__ import_module __builtins__ __subclasses__ __init_subclass__ __doc__"
    " __globals__".split()
)
"""Names that reach code in ways that no reading of the source can follow. A stage whose code uses one is refused."""
UNTRACEABLE_ATTRIBUTES = UNTRACEABLE - {"eval", "exec", "compile", "globals", "locals", "vars"}
"""The same after a dot, where `model.eval()`, `re.compile()` and the like are ordinary methods."""
UNTRACEABLE_IMPORTS = frozenset({"sys.modules", "importlib.reload", "builtins", "runpy"})
PURE_DECORATORS = frozenset({"abc", "contextlib", "dataclasses", "enum", "functools", "pydantic", "typing"})
"""Modules whose decorators leave no trace outside of what they decorate."""
PLAIN_DECORATORS = frozenset({"property", "staticmethod", "classmethod"})
READING_METHODS = frozenset({"copy", "format", "get", "items", "join", "keys", "split", "values"})

Origin = tuple[str, str | None]
"""(module, attribute) that an import binds; attribute None for a module."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class SourceError(Exception):
    """A stage's code cannot be traced statically. The message names file, line, construct and what to write instead."""


@dataclass(frozen=True, slots=True)
class Import:
    """One name bound by an import statement."""

    alias: str
    origin: Origin
    loads: str
    """Dotted name of what is loaded; every prefix of it that is a module runs."""


@dataclass(slots=True)
class Module:
    """The top level of one source file."""

    name: str
    file: str
    package: str
    bindings: dict[str, list[ast.stmt]] = field(default_factory=dict)
    """Name -> every top-level statement that binds or changes it, in order."""
    imports: dict[str, list[Origin]] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    effects: list[ast.stmt] = field(default_factory=list)
    """Empty when each statement only binds names of its own, so that order is free; otherwise the whole top level."""

    @property
    def is_package(self) -> bool:
        return self.name == self.package

    def knows(self, name: str) -> bool:
        return name in self.bindings or name in self.imports


@dataclass(slots=True)
class Uses:
    """The names that a statement uses, each with the attribute chains taken from it (`()` for the bare name)."""

    chains: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)
    imports: list[Import] = field(default_factory=list)


def parse_module(text: str, name: str, file: str, package: str) -> Module:
    """Index the top level of a file.

    Raises:
        SourceError: it has a star import.
    """
    module = Module(name, file, package)
    statements = list(_executed(ast.parse(text, file).body))
    for statement in statements:
        for bound in sorted(_stored(statement)):
            module.bindings.setdefault(bound, []).append(statement)
        for imported in _module_imports(statement, module):
            module.imports.setdefault(imported.alias, []).append(imported.origin)
            module.loads.append(imported.loads)
    rebound = any(
        len(module.bindings.get(name, [])) + len(set(module.imports.get(name, []))) > 1
        for name in module.bindings.keys() | module.imports.keys()
    )
    if rebound or any(_has_effect(statement, module) for statement in statements):
        module.effects = [statement for statement in statements if not _is_idle(statement)]
    return module


def _executed(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The top-level statements that run when the file is imported."""
    for statement in body:
        if isinstance(statement, ast.If) and _is_never_true(statement.test):
            yield from _executed(statement.orelse)
        else:
            yield statement


def _is_never_true(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'")


def _stored(statement: ast.stmt) -> set[str]:
    """Names that a top-level statement binds; storing to `X.a` or `X[k]` changes, and so binds, `X`."""
    names: set[str] = set()
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            todo.extend(part.target for part in ast.walk(node) if isinstance(part, ast.NamedExpr))
        elif not isinstance(node, ast.Lambda):
            if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
                names.add(_chain(node)[0])
            for attribute in ("name", "rest"):
                if isinstance(bound := getattr(node, attribute, None), str) and not isinstance(node, ast.alias):
                    names.add(bound)
            todo.extend(ast.iter_child_nodes(node))
    return names - {""}


def _chain(node: ast.AST) -> tuple[str, ...]:
    """(root name, attribute, ...) as far as the first thing that is not an attribute; ("",) without a root name."""
    attributes: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        attributes = [node.attr, *attributes] if isinstance(node, ast.Attribute) else []
        node = node.value
    return (node.id, *attributes) if isinstance(node, ast.Name) else ("",)


def _module_imports(statement: ast.stmt, module: Module) -> Iterator[Import]:
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        return
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from _imported(statement, module)
    for part in ast.iter_child_nodes(statement):
        if isinstance(part, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield from _module_imports(part, module)


def _imported(statement: ast.Import | ast.ImportFrom, module: Module) -> Iterator[Import]:
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            bound = alias.name if alias.asname else alias.name.partition(".")[0]
            yield Import(alias.asname or bound, (bound, None), alias.name)
        return
    base = statement.module or ""
    if statement.level:
        above = module.package.split(".")
        base = ".".join([*above[: len(above) - statement.level + 1], *([base] if base else [])])
    for alias in statement.names:
        if alias.name == "*":
            raise SourceError(
                f"{module.file}:{statement.lineno}: `from {base} import *` hides where names come from; "
                "import each name that is used."
            )
        yield Import(alias.asname or alias.name, (base, alias.name), f"{base}.{alias.name}")


def _has_effect(statement: ast.stmt, module: Module) -> bool:
    """True unless running `statement` can do nothing but bind its own names. In doubt, True."""
    if isinstance(statement, (ast.Import, ast.ImportFrom, ast.Pass)):
        return False
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        stores = any(isinstance(part, (ast.Attribute, ast.Subscript)) for t in targets for part in ast.walk(t))
        return stores or (statement.value is not None and _calls_into_module(statement.value, module))
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        if not all(_is_pure_decorator(decorator, module) for decorator in statement.decorator_list):
            return True
        inner = statement.body if isinstance(statement, ast.ClassDef) else []
        return bool(getattr(statement, "keywords", [])) or any(_has_effect(part, module) for part in inner)
    return True


def _calls_into_module(value: ast.expr, module: Module) -> bool:
    """Whether an assigned value calls a function of this file, or a method that may change one of its objects."""
    for call in ast.walk(value):
        if isinstance(call, ast.Call) and (chain := _chain(call.func))[0] in module.bindings:
            if len(chain) > 1 and chain[-1] not in READING_METHODS:
                return True
            if len(chain) == 1 and not all(isinstance(s, ast.ClassDef) for s in module.bindings[chain[0]]):
                return True
    return False


def _is_pure_decorator(decorator: ast.expr, module: Module) -> bool:
    root = _chain(decorator.func if isinstance(decorator, ast.Call) else decorator)[0]
    if is_stage_decorator(decorator) or (root in PLAIN_DECORATORS and not module.knows(root)):
        return True
    origins = module.imports.get(root, [])
    return bool(origins) and root not in module.bindings and all(o[0] in PURE_DECORATORS for o in origins)


def is_stage_decorator(node: ast.AST) -> bool:
    """`@stage(...)`: how a stage is declared is no part of what it computes."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "stage"


def _is_stage_from_tasks(module: Module) -> bool:
    origins = module.imports.get("stage", [])
    return "stage" not in module.bindings and all(origin == ("tasks.stage", "stage") for origin in origins)


def uses(statement: ast.stmt, module: Module) -> Uses:
    """Every name that `statement` uses outside annotations that nothing reads.

    Raises:
        SourceError: it reaches code in a way that cannot be followed.
    """
    found = Uses()

    def name(chain: tuple[str, ...], line: int) -> None:
        _refuse_untraceable(chain, line, module)
        found.chains.setdefault(chain[0], set()).add(chain[1:])

    def visit(part: ast.AST, in_class: bool, in_annotation: bool) -> None:
        if isinstance(part, ast.Attribute):
            name(chain := _chain(part), part.lineno)
            if len(chain) == 1:
                _refuse_untraceable(("", part.attr), part.lineno, module)
                visit(part.value, False, in_annotation)
            elif not _is_plain_chain(part):
                visit(part.value, False, in_annotation)
        elif isinstance(part, ast.Name):
            if isinstance(part.ctx, ast.Load):
                name((part.id,), part.lineno)
        elif in_annotation and isinstance(part, ast.Constant) and isinstance(part.value, str):
            if quoted := _quoted(part.value):
                visit(quoted, False, True)
        else:
            enter(part, in_class, in_annotation)

    def enter(part: ast.AST, in_class: bool, in_annotation: bool) -> None:
        if isinstance(part, (ast.Import, ast.ImportFrom)):
            for imported in _imported(part, module):
                _refuse_untraceable((imported.alias,), part.lineno, module, [imported.origin])
                found.imports.append(imported)
        if isinstance(part, (*FUNCTIONS, ast.ClassDef)):
            _refuse_definition(part, module)
        if isinstance(part, ast.Global):
            for bound in part.names:
                name((bound,), part.lineno)
        for field_name, value in _fields(part, in_class):
            annotation = in_annotation or field_name in ("annotation", "returns")
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, isinstance(part, ast.ClassDef), annotation)

    visit(statement, False, False)
    found.chains.pop("", None)
    for imported in found.imports:
        for chain in found.chains.get(imported.alias, ()):
            _refuse_untraceable((imported.alias, *chain), statement.lineno, module, [imported.origin])
    return found


def _refuse_definition(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, module: Module) -> None:
    _refuse_untraceable((node.name,), node.lineno, module)
    if any(is_stage_decorator(d) for d in node.decorator_list) and not _is_stage_from_tasks(module):
        raise SourceError(
            f"{module.file}:{node.lineno}: `@stage(...)` is not the one of tasks.stage; give it another name."
        )


def _is_plain_chain(node: ast.AST) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _quoted(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        return None


def _refuse_untraceable(chain: tuple[str, ...], line: int, module: Module, origins: list[Origin] | None = None) -> None:
    bad = chain[0] if chain[0] in UNTRACEABLE else next((a for a in chain[1:] if a in UNTRACEABLE_ATTRIBUTES), None)
    for target, attribute in origins or module.imports.get(chain[0], []):
        dotted = ".".join([target, *([attribute] if attribute else []), *chain[1:]])
        if attribute in UNTRACEABLE_ATTRIBUTES:
            bad = attribute
        bad = next((i for i in UNTRACEABLE_IMPORTS if f"{dotted}.".startswith(f"{i}.")), bad)
    if bad:
        raise SourceError(
            f"{module.file}:{line}: `{bad}` reaches code in a way that reading the source cannot follow, so the "
            "stage's key could not be trusted. Refer to the function, class or module by its name."
        )


def _fields(node: ast.AST, in_class: bool) -> Iterator[tuple[str, Any]]:
    """The parts of a node that can change behaviour. `in_class`: it stands directly in a class body."""
    keeps_annotations = isinstance(node, FUNCTIONS) and any(
        not is_stage_decorator(d) and not (isinstance(d, ast.Name) and d.id in PLAIN_DECORATORS)
        for d in node.decorator_list
    )
    for name, value in ast.iter_fields(node):
        if value is None or value == [] or name in ("ctx", "kind", "type_comment", "simple"):
            continue
        if name == "returns" and not keeps_annotations:
            continue
        if name == "annotation" and isinstance(node, ast.AnnAssign) and not in_class:
            continue
        if name == "args" and isinstance(node, FUNCTIONS) and keeps_annotations:
            yield "annotations", [arg.annotation for arg in _arguments(value) if arg.annotation]
        if name == "annotation" and isinstance(node, ast.arg):
            continue
        if name == "decorator_list":
            value = [decorator for decorator in value if not is_stage_decorator(decorator)]
        elif isinstance(value, list):
            value = [part for part in value if not _is_idle(part)]
        yield name, value


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    variadic = [arg for arg in (arguments.vararg, arguments.kwarg) if arg]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variadic]


def _is_idle(part: Any) -> bool:
    """A docstring, any other constant that stands alone, or `pass`."""
    return isinstance(part, ast.Pass) or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))


def normal(node: Any, *, config_class: bool = False, in_class: bool = False) -> Any:
    """A JSON form of the syntax tree without what cannot change behaviour, the same on every Python version.

    Of a config class, the fields are left out: their values are in the config half of the key.
    """
    if isinstance(node, list):
        kept = [part for part in node if not (config_class and _is_config_field(part))]
        return [normal(part, in_class=in_class) for part in kept]
    if isinstance(node, ast.Constant):
        return ["Constant", type(node.value).__name__, repr(node.value)]
    if not isinstance(node, ast.AST):
        return node
    form: list[Any] = [type(node).__name__]
    inside = isinstance(node, ast.ClassDef)
    for name, value in _fields(node, in_class):
        part = normal(value, config_class=config_class and name == "body", in_class=inside)
        if part != []:
            form.append([name, part])
    return form


def _is_config_field(part: Any) -> bool:
    if isinstance(part, ast.Assign):
        return [ast.unparse(target) for target in part.targets] == ["model_config"]
    if not isinstance(part, ast.AnnAssign) or not isinstance(part.target, ast.Name):
        return False
    return part.target.id == "model_config" or not (
        part.target.id.startswith("_") or "ClassVar" in ast.unparse(part.annotation)
    )
