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
from typing import Any

from tasks.expressions import ExpressionReader
from tasks.logs import is_effect_free, log_call
from tasks.reading import (
    CALL,
    MENTION,
    VALIDATION,
    VALUE,
    ClassKind,
    Reading,
    Restart,
)
from tasks.refusals import refuse_attributes, refuse_builtin, refuse_import
from tasks.scopes import (
    FUNCTIONS,
    arguments_of,
    class_scope,
    function_scope,
    mangled,
    resolve,
    types_scope,
)
from tasks.source import Module, imported, is_idle, is_stage_decorator


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
    except Restart:
        return _Reader(module, class_kind, is_silent, verbatim=True).read(statement)
    if reader.log_needs:
        whole = _Reader(module, class_kind, is_silent, verbatim=True).read(statement).main
        whole.condition, whole.names = "log", frozenset(reader.log_needs)
        reading.parts[f"{getattr(statement, 'name', '<module>')}.<log>"] = whole
    return reading


class _Reader(ExpressionReader):
    """Emits statements and definitions."""

    def read(self, statement: ast.stmt) -> Reading:
        self.body([statement])
        return self.reading

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
            return is_effect_free(statement.test, self.is_builtin, needs) and all(
                is_idle(part) or self._only_logs(part, needs) for part in inner
            )
        call = log_call(statement)
        if call is None:
            return False
        scope = resolve(self.scope, call.receiver)
        if scope is None or call.receiver not in scope.contexts or call.receiver in scope.stored:
            return False
        needs.update(call.needs)
        return all(is_effect_free(argument, self.is_builtin, needs) for argument in call.arguments)

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
                raise Restart
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
                if is_effect_free(body[0].value, self.is_builtin, needs):
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
            statements = _methods_sorted(node.body, self.is_builtin) if silent else node.body
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
