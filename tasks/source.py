"""What one source file says, read without importing it: the names that its top level binds, imports and runs.

Everything here is about the syntax of one file; `tasks.normal` reads single statements, `tasks.effects` judges what they
do when the file is imported, and `tasks.identity` decides which parts of which files belong to a stage.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tasks.refusals import Origin, SourceError
from tasks.scopes import COMPREHENSIONS, FUNCTIONS, names_bound

COMPOUND = (ast.If, ast.Try, ast.With, ast.For, ast.While, ast.Match, ast.TryStar)


@dataclass(frozen=True, slots=True)
class Import:
    """One name bound by an import statement."""

    alias: str
    origin: Origin
    loads: str
    """Dotted name of what is loaded; every prefix of it that is a module runs."""


@dataclass(slots=True, eq=False)
class Module:
    """The top level of one source file."""

    name: str
    file: str
    package: str
    statements: list[ast.stmt] = field(default_factory=list)
    """Those that run when the file is imported."""
    bindings: dict[str, list[ast.stmt]] = field(default_factory=dict)
    """Name -> every top-level statement that binds or changes it, in order; a plain import is in `imports` alone."""
    imports: dict[str, list[Origin]] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    lazy_annotations: bool = False
    """Annotations are not evaluated: `from __future__ import annotations`."""

    @property
    def is_package(self) -> bool:
        return self.name == self.package

    @property
    def rebinds(self) -> bool:
        """Whether any name has several bindings, so that the order of the statements matters."""
        counts = dict.fromkeys(self.bindings.keys() | self.imports.keys(), 0)
        for name, statements in self.bindings.items():
            counts[name] += len(statements)
        for name, origins in self.imports.items():
            if not any(isinstance(statement, COMPOUND) for statement in self.bindings.get(name, ())):
                counts[name] += len(set(origins))
        return any(count > 1 for name, count in counts.items() if name != "__all__")

    def knows(self, name: str) -> bool:
        return name in self.bindings or name in self.imports


def parse_module(data: bytes, name: str, file: str, package: str) -> Module:
    """Index the top level of a file.

    Raises:
        SourceError: it has a star import, or is not Python.
    """
    module = Module(name, file, package)
    try:
        tree = ast.parse(data, file)
    except (SyntaxError, ValueError) as error:
        raise SourceError(f"{file}: cannot be read as Python ({error}); correct the file.") from error
    module.statements = list(_executed(tree.body))
    for statement in module.statements:
        for bound in sorted(_stored(statement)):
            module.bindings.setdefault(bound, []).append(statement)
        for found in _module_imports(statement, module):
            module.imports.setdefault(found.alias, []).append(found.origin)
            module.loads.append(found.loads)
            bound_here = module.bindings.get(found.alias, [])
            if isinstance(statement, COMPOUND) and statement not in bound_here:
                module.bindings.setdefault(found.alias, []).append(statement)
    future = ("__future__", "annotations")
    module.lazy_annotations = future in module.imports.get("annotations", [])
    overridden = {"TYPE_CHECKING", "typing", "__name__"} & module.bindings.keys()
    if overridden or ("TYPE_CHECKING" in module.imports and module.imports["TYPE_CHECKING"] != [_TYPE_CHECKING]):
        raise SourceError(
            f"{file}: {', '.join(sorted(overridden or {'TYPE_CHECKING'}))} is not the one of Python, so what runs when the "
            "file is imported cannot be told; give it another name."
        )
    return module


_TYPE_CHECKING = ("typing", "TYPE_CHECKING")


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
        elif isinstance(node, COMPREHENSIONS):
            todo.extend(part.target for part in ast.walk(node) if isinstance(part, ast.NamedExpr))
        elif not isinstance(node, ast.Lambda):
            if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
                names.add(attribute_chain(node)[0])
            names.update(names_bound(node))
            todo.extend(ast.iter_child_nodes(node))
    return names - {""}


def attribute_chain(node: ast.AST) -> tuple[str, ...]:
    """(root name, attribute, ...) as far as the first thing that is not an attribute; ("",) without a root name."""
    attributes: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        attributes = [node.attr, *attributes] if isinstance(node, ast.Attribute) else []
        node = node.value
    return (node.id, *attributes) if isinstance(node, ast.Name) else ("",)


def _module_imports(statement: ast.AST, module: Module) -> Iterator[Import]:
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        return
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from imported(statement, module)
    for part in ast.iter_child_nodes(statement):
        if isinstance(part, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield from _module_imports(part, module)


def imported(statement: ast.Import | ast.ImportFrom, module: Module) -> Iterator[Import]:
    """The names that an import statement in `module` binds.

    Raises:
        SourceError: it is a star import.
    """
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


def is_stage_decorator(node: ast.expr, module: Module) -> bool:
    """`@stage(...)` of tasks.stage: how a stage is declared is no part of what it computes.

    Raises:
        SourceError: the decorator is called `stage` but is another one.
    """
    if not isinstance(node, ast.Call):
        return False
    root, *rest = attribute_chain(node.func)
    origins = [] if root in module.bindings else module.imports.get(root, [])
    dotted = {".".join([base, *([name] if name else []), *rest]) for base, name in origins}
    if dotted == {"tasks.stage.stage"}:
        return True
    if (root, rest) == ("stage", []) and module.knows("stage"):
        raise SourceError(
            f"{module.file}:{node.lineno}: `@stage(...)` is not the one of tasks.stage; give it another name."
        )
    return root == "stage" and not rest


def is_idle(part: Any) -> bool:
    """A docstring, any other constant that stands alone, or `pass`."""
    return isinstance(part, ast.Pass) or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
