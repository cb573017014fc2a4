"""The normal form of expressions. `tasks.normal` says what it is for."""

from __future__ import annotations

import ast
from typing import Any

from tasks.reading import (
    CALL,
    CALLERS,
    FRAME_READERS,
    LOG_HOOKS,
    MAKERS,
    MENTION,
    NAMES_OF,
    TESTERS,
    VALUE,
    NameReader,
    Restart,
)
from tasks.refusals import refuse_attributes, refuse_builtin
from tasks.scopes import (
    comprehension_scope,
    mangled,
)


class ExpressionReader(NameReader):
    """Emits expressions, handlers and patterns."""

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
            raise Restart
        builtin = isinstance(node.func, ast.Name) and self.is_builtin(name)
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
