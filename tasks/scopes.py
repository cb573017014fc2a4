"""Which variable a name means: Python's scoping rules, read from a syntax tree.

A scope knows the names bound in it. `resolve` finds the scope that a name belongs to, or None for the module and the
builtins. Names that anything can observe beside the code that uses them (parameters, nested functions and classes,
imports, type parameters) are `fixed`; the others could be called anything.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(slots=True, eq=False)
class Scope:
    """One function, class body, comprehension or list of type parameters."""

    kind: str
    parent: Scope | None
    owner: str = ""
    """Name of the innermost class, which mangles names like `__x`."""
    bound: set[str] = field(default_factory=set)
    fixed: set[str] = field(default_factory=set)
    definitions: set[str] = field(default_factory=set)
    """Nested functions and classes."""
    imports: dict[str, list[ast.Import | ast.ImportFrom]] = field(default_factory=dict)
    declared: dict[str, str] = field(default_factory=dict)
    """Names declared `global` or `nonlocal`."""
    stored: set[str] = field(default_factory=set)
    """Names assigned by ordinary statements, parameters among them where the body assigns to one."""
    contexts: set[str] = field(default_factory=set)
    """Parameters that hold the stage context."""


def resolve(scope: Scope | None, name: str) -> Scope | None:
    """The scope that `name`, used in `scope`, belongs to; None for the module or a builtin."""
    innermost = True
    while scope is not None:
        if innermost or scope.kind != "class":
            declared = scope.declared.get(name)
            if declared == "global":
                return None
            if declared is None and name in scope.bound:
                return scope
        scope, innermost = scope.parent, False
    return None


def mangled(name: str, owner: str) -> str:
    """`name` as it is looked up inside the class `owner`."""
    if name.startswith("__") and not name.endswith("__") and (stripped := owner.lstrip("_")):
        return f"_{stripped}{name}"
    return name


def function_scope(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, parent: Scope | None, owner: str
) -> Scope:
    """The scope of a function's or lambda's body."""
    scope = Scope("function", parent, owner)
    scope.fixed.update(mangled(argument.arg, owner) for argument in arguments_of(node.args))
    scope.bound.update(scope.fixed)
    _collect([node.body] if isinstance(node, ast.Lambda) else node.body, scope)
    return scope


def class_scope(node: ast.ClassDef, parent: Scope | None) -> Scope:
    """The scope of a class body. All its names are fixed: they are attributes."""
    scope = Scope("class", parent, node.name)
    _collect(node.body, scope)
    scope.fixed = scope.bound
    return scope


def comprehension_scope(node: ast.expr, parent: Scope | None, owner: str) -> Scope:
    """The scope of a comprehension, in which everything but its first iterable is evaluated."""
    scope = Scope("comprehension", parent, owner)
    for generator in node.generators:  # type: ignore[attr-defined]
        for part in ast.walk(generator.target):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                scope.bound.add(mangled(part.id, owner))
    return scope


def types_scope(node: ast.AST, parent: Scope | None, owner: str) -> Scope | None:
    """The scope of the type parameters of `def f[T]` or `class C[T]`; `parent` where there are none."""
    names = {mangled(parameter.name, owner) for parameter in getattr(node, "type_params", ())}
    return Scope("types", parent, owner, bound=names, fixed=names) if names else parent


def arguments_of(arguments: ast.arguments) -> list[ast.arg]:
    """Every parameter, in order."""
    variadic = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variadic]


def names_bound(node: ast.AST) -> Iterator[str]:
    """Names that a node binds by itself, as strings: exception handlers and patterns."""
    for attribute in ("name", "rest"):
        if isinstance(bound := getattr(node, attribute, None), str) and not isinstance(node, ast.alias):
            yield bound


def imported_names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Names that an import statement binds."""
    for alias in node.names:
        whole = isinstance(node, ast.ImportFrom)
        yield alias.asname or (alias.name if whole else alias.name.partition(".")[0])


def _collect(body: Iterable[ast.AST], scope: Scope) -> None:
    """Enter what `body` binds into its scope, without entering scopes below it."""
    todo: list[tuple[ast.AST, bool]] = [(part, False) for part in body]  # (node, inside a comprehension)
    while todo:
        node, nested = todo.pop()
        if isinstance(node, ast.Name):
            if not nested and not isinstance(node.ctx, ast.Load):
                _store(scope, node.id)
            continue
        if isinstance(node, (ast.Constant, ast.expr_context)):
            continue
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            name = mangled(node.name, scope.owner)
            scope.bound.add(name)
            scope.fixed.add(name)
            scope.definitions.add(name)
            todo.extend((part, False) for part in _outside(node))
            continue
        if isinstance(node, ast.Lambda):
            todo.extend((part, nested) for part in [*node.args.defaults, *node.args.kw_defaults] if part)
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for bound in imported_names(node):
                name = mangled(bound, scope.owner)
                scope.bound.add(name)
                scope.fixed.add(name)
                scope.imports.setdefault(name, []).append(node)
            continue
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            kind = "global" if isinstance(node, ast.Global) else "nonlocal"
            scope.declared.update((mangled(name, scope.owner), kind) for name in node.names)
            continue
        if isinstance(node, ast.NamedExpr):
            _store(scope, node.target.id)
            todo.append((node.value, nested))
            continue
        if type(node).__name__ == "TypeAlias":
            scope.fixed.add(mangled(node.name.id, scope.owner))  # type: ignore[attr-defined]
        for bound in names_bound(node):
            _store(scope, bound)
        inside = nested or isinstance(node, COMPREHENSIONS)
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(value, ast.AST):
                todo.append((value, inside))
            elif isinstance(value, list):
                todo.extend((child, inside) for child in value if isinstance(child, ast.AST))


def _store(scope: Scope, name: str) -> None:
    name = mangled(name, scope.owner)
    scope.bound.add(name)
    scope.stored.add(name)


def _outside(node: Definition) -> Iterator[ast.AST]:
    """The parts of a definition that are evaluated in the scope around it."""
    yield from node.decorator_list
    if isinstance(node, ast.ClassDef):
        yield from node.bases
        yield from node.keywords
    else:
        yield from (part for part in [*node.args.defaults, *node.args.kw_defaults] if part)
        yield from (argument.annotation for argument in arguments_of(node.args) if argument.annotation)
        if node.returns:
            yield node.returns
