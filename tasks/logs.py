"""Which statements do nothing but write a log line, so that the key need not know them.

`context.log(...)` and `context.progress(...)` are such statements when `context` is the stage's own context and every
argument is free of effects: constants, variables, attributes, f-strings, arithmetic, comparisons, and `len`, `str`, `repr`,
`int`, `float`, `round`, `abs`, `bool` or `type` of such. A call of anything else, a subscript (which may insert into a
defaultdict) or an iteration (which may use up an iterator) keeps the statement. So does code of one's own that could
make any of this do more, such as a property or a `__len__`: the names of the methods that the arguments may call are
returned, and the statement counts when the code that the stage reaches defines one of them. What third-party objects do
when they are printed, measured or added is taken to have no effect.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass

METHODS = frozenset({"log", "progress"})
FORMAT = frozenset({"__format__", "__str__", "__repr__"})
NUMBER = frozenset({"__int__", "__float__", "__index__", "__round__", "__trunc__", "__floor__", "__ceil__", "__abs__"})
TRUTH = frozenset({"__bool__", "__len__"})
ACCESS = frozenset({"__getattr__", "__getattribute__", "__get__"})
BUILTINS = {"len": TRUTH, "str": FORMAT, "repr": FORMAT, "bool": TRUTH, "type": frozenset[str]()} | dict.fromkeys(
    ("int", "float", "round", "abs"), NUMBER
)
_OPERATORS = "add sub mul truediv floordiv mod pow neg pos invert and or xor lshift rshift matmul".split()
ARITHMETIC = frozenset(f"__{side}{name}__" for name in _OPERATORS for side in ("", "r")) | FORMAT
COMPARISON = frozenset({"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}) | TRUTH


@dataclass(frozen=True, slots=True)
class LogCall:
    """A statement `receiver.log(arguments)`."""

    receiver: str
    arguments: tuple[ast.expr, ...]
    needs: frozenset[str]


def log_call(statement: ast.stmt) -> LogCall | None:
    """`statement` as the call of a logging method, whatever its receiver is; None when it is something else."""
    if not isinstance(statement, ast.Expr) or not isinstance(call := statement.value, ast.Call):
        return None
    method = call.func
    if not isinstance(method, ast.Attribute) or method.attr not in METHODS or not isinstance(method.value, ast.Name):
        return None
    if any(keyword.arg is None for keyword in call.keywords):
        return None
    arguments = (*call.args, *(keyword.value for keyword in call.keywords))
    return LogCall(method.value.id, arguments, frozenset({method.attr, f"on_{method.attr}"}))


def is_effect_free(node: ast.expr, is_builtin: Callable[[str], bool], needs: set[str]) -> bool:
    """Whether evaluating `node` changes nothing, provided that no reached code defines a method in `needs` (added to)."""
    if isinstance(node, (ast.Constant, ast.Name)):
        return True
    found = frozenset[str]()
    parts: list[ast.expr] = []
    match node:
        case ast.Attribute(value=value, attr=attribute):
            parts, found = [value], ACCESS | {attribute}
        case ast.JoinedStr(values=values):
            parts, found = values, FORMAT
        case ast.FormattedValue(value=value, format_spec=spec):
            parts, found = [value, *([spec] if spec else [])], FORMAT
        case ast.BinOp(left=left, right=right):
            parts, found = [left, right], ARITHMETIC
        case ast.UnaryOp(operand=operand):
            parts, found = [operand], ARITHMETIC | TRUTH
        case ast.BoolOp(values=values):
            parts, found = values, TRUTH
        case ast.IfExp(test=test, body=body, orelse=other):
            parts, found = [test, body, other], TRUTH
        case ast.Compare(left=left, ops=operators, comparators=others):
            if any(isinstance(operator, (ast.In, ast.NotIn)) for operator in operators):
                return False
            parts, found = [left, *others], COMPARISON
        case ast.Tuple(elts=elements):
            parts = elements
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in BUILTINS and is_builtin(name):
            parts, found = arguments, BUILTINS[name]
        case _:
            return False
    needs |= found
    return all(is_effect_free(part, is_builtin, needs) for part in parts)
