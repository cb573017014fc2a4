"""What importing a file does beside binding its names, and what classes and decorators may look into.

A file whose top level only binds names contributes the names that a stage reaches, in any order. Every other file
contributes its whole top level to each stage that imports it. Quiet are: definitions without foreign decorators, imports,
constants, and assignments of expressions that call only what is known to change nothing. In doubt it is an effect.
Operators, attributes and subscripts are taken to be quiet.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable

from tasks.reading import ClassKind
from tasks.scopes import FUNCTIONS, Definition, arguments_of
from tasks.source import Module, attribute_chain, is_idle, is_stage_decorator

Names = Callable[[ast.expr], list[str]]
"""From an expression to the dotted names that it may stand for."""

SILENT_DECORATORS = frozenset(
    "builtins.property builtins.staticmethod builtins.classmethod abc.abstractmethod functools.cache functools.lru_cache"
    " functools.cached_property functools.wraps functools.total_ordering contextlib.contextmanager"
    " contextlib.asynccontextmanager typing.overload typing.final typing.override typing.runtime_checkable enum.unique"
    " dataclasses.dataclass pydantic.field_validator pydantic.model_validator torch.no_grad torch.inference_mode"
    " tasks.stage.stage".split()
)
"""Decorators that register nothing, and read no docstring, no annotation of a function and no source."""
QUIET_DECORATORS = frozenset({"abc", "contextlib", "dataclasses", "enum", "functools", "pydantic", "typing"})
"""Modules whose decorators leave no trace outside of what they decorate."""
KNOWN_BASES = frozenset(
    "builtins abc enum typing collections contextlib dataclasses json logging threading pydantic tasks"
    " torch transformers trl peft datasets tokenizers numpy".split()
)
"""Packages whose classes neither register nor read the source or docstrings of their subclasses."""
QUIET_MODULES = frozenset(
    "collections dataclasses datetime decimal enum fractions functools itertools math operator pathlib re string textwrap"
    " typing pydantic json hashlib logging.getLogger types.MappingProxyType types.SimpleNamespace contextvars.ContextVar"
    " statistics unicodedata".split()
)
QUIET_BUILTINS = frozenset(
    "abs all any bool bytes bytearray chr complex dict divmod enumerate filter float format frozenset hash hex int isinstance"
    " issubclass len list map max min object oct ord pow range repr reversed round set slice sorted str sum tuple type zip"
    " property staticmethod classmethod super Exception ValueError TypeError RuntimeError".split()
)
READING_METHODS = frozenset(
    "copy format get items join keys split values upper lower strip lstrip rstrip title capitalize casefold replace encode"
    " decode splitlines startswith endswith index count union intersection difference isoformat resolve joinpath"
    " with_suffix hexdigest digest removeprefix removesuffix fromkeys rsplit partition ljust rjust zfill".split()
)
HOLDERS = frozenset(
    "pydantic dataclasses json.JSONDecoder json.JSONEncoder functools.partial collections.defaultdict".split()
)
"""What takes code without running it at once."""
LITERALS = (ast.Constant, ast.JoinedStr, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.BinOp, ast.ListComp, ast.DictComp)
MAKING_METHODS = frozenset(
    "__init__ __new__ __post_init__ __call__ __set_name__ model_post_init __class_getitem__ __init_subclass__".split()
)


class Judge:
    """Judges statements of any first-party file. `find` gives the file of a first-party module, or None."""

    def __init__(self, find: Callable[[str], Module | None]) -> None:
        self._find = find
        self._effects: dict[Module, bool] = {}
        self._roots: dict[tuple[Module, str], frozenset[str]] = {}

    # -- classes and decorators

    def is_silent(self, decorator: ast.expr, names: Names) -> bool:
        """Whether a decorator reads nothing of a function but calls it."""
        return set(names(_called(decorator))) <= SILENT_DECORATORS

    def class_kind(self, node: ast.ClassDef, names: Names) -> ClassKind:
        """What the decorators and bases of a class make of it."""
        roots = self.roots(node, names)
        decorators = {name for decorator in node.decorator_list for name in names(_called(decorator))}
        known = decorators <= SILENT_DECORATORS and all(root.partition(".")[0] in KNOWN_BASES for root in roots)
        plain = known and not decorators and all(root.startswith("builtins.") for root in roots)
        return ClassKind(config="tasks.stage.StageConfig" in roots, plain=plain, known=known)

    def roots(self, node: ast.ClassDef, names: Names) -> frozenset[str]:
        """The foreign classes that a class descends from, by dotted name; `?` for what cannot be told."""
        found: set[str] = set()
        for base in node.bases:
            whole = base.value if isinstance(base, ast.Subscript) else base
            for dotted in names(whole) if attribute_chain(whole)[0] else ["?"]:
                found |= self._roots_of(dotted, 0)
        for keyword in node.keywords:
            is_abstract = keyword.arg == "metaclass" and names(keyword.value) == ["abc.ABCMeta"]
            found |= set() if is_abstract or isinstance(keyword.value, ast.Constant) else {"?"}
        return frozenset(found)

    def _roots_of(self, dotted: str, depth: int) -> frozenset[str]:
        place = self._place(dotted)
        if place is None or dotted.startswith("tasks.stage."):
            return frozenset({dotted})
        module, name = place
        if depth > 50:
            return frozenset({"?"})
        if place not in self._roots:
            self._roots[place] = frozenset({"?"})
            found: set[str] = set()
            for statement in module.bindings.get(name, []):
                found |= self.roots(statement, _names_in(module)) if isinstance(statement, ast.ClassDef) else {"?"}
            if name not in module.bindings:
                for base, attribute in module.imports.get(name, []):
                    found |= self._roots_of(".".join([base, *([attribute] if attribute else [])]), depth + 1)
            self._roots[place] = frozenset(found) if module.knows(name) else frozenset({"?"})
        return self._roots[place]

    def _place(self, dotted: str) -> tuple[Module, str] | None:
        """The first-party module and top-level name that a dotted name means."""
        parts = dotted.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if (module := self._find(".".join(parts[:end]))) is not None:
                return module, parts[end] if end == len(parts) - 1 else ""
        return None

    # -- effects

    def effects(self, module: Module) -> list[ast.stmt]:
        """The statements of a file that has effects, the whole top level; none for a file that only binds names."""
        if module not in self._effects:
            self._effects[module] = True
            self._effects[module] = module.rebinds or any(self._acts(s, module) for s in module.statements)
        return [s for s in module.statements if not is_idle(s)] if self._effects[module] else []

    def _acts(self, statement: ast.stmt, module: Module, owner: ast.ClassDef | None = None) -> bool:
        """True unless running `statement`, in the body of `owner`, can do nothing but bind its own names."""
        names = _names_in(module)
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.Pass():
                return False
            case ast.Expr(value=value):
                return not isinstance(value, ast.Constant)
            case ast.Assign(targets=targets, value=value):
                return any(_writes(target) for target in targets) or self._calls(value, module)
            case ast.AnnAssign(target=target, annotation=annotation, value=value):
                evaluated = [] if module.lazy_annotations else [annotation]
                return _writes(target) or any(self._calls(v, module) for v in [*evaluated, *([value] if value else [])])
            case ast.AugAssign(target=ast.Name(id="__all__"), value=value):
                return self._calls(value, module)
            case ast.If(test=test, body=body, orelse=other):
                return self._calls(test, module) or any(self._acts(s, module) for s in [*body, *other])
            case ast.Try(body=body, handlers=handlers, orelse=other, finalbody=last):
                inner = [*body, *other, *last, *(s for handler in handlers for s in handler.body)]
                types = [handler.type for handler in handlers if handler.type is not None]
                named = any(handler.name for handler in handlers)
                return named or any(self._calls(t, module) for t in types) or any(self._acts(s, module) for s in inner)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                arguments = statement.args
                parts = [d for d in [*arguments.defaults, *arguments.kw_defaults] if d is not None]
                if not module.lazy_annotations:
                    parts += [a.annotation for a in arguments_of(arguments) if a.annotation]
                    parts += [statement.returns] if statement.returns else []
                return self._decorated(statement, module, owner) or any(self._calls(part, module) for part in parts)
            case ast.ClassDef(bases=bases, body=body):
                if self._decorated(statement, module, owner) or not self.class_kind(statement, names).known:
                    return True
                if _calls_own_name(body):
                    return True
                return any(self._calls(b, module) for b in bases) or any(self._acts(s, module, statement) for s in body)
        return type(statement).__name__ != "TypeAlias"

    def _decorated(self, node: Definition, module: Module, owner: ast.ClassDef | None) -> bool:
        """Whether a decorator might do something beside decorating."""
        for decorator in node.decorator_list:
            if is_stage_decorator(decorator, module) or _is_property_part(decorator, owner):
                continue
            dotted = set(_names_in(module)(_called(decorator)))
            quiet = dotted <= SILENT_DECORATORS or all(name.partition(".")[0] in QUIET_DECORATORS for name in dotted)
            if not quiet and not all(self._decorates_quietly(name, isinstance(decorator, ast.Call)) for name in dotted):
                return True
            if isinstance(decorator, ast.Call) and any(
                self._calls(part, module) for part in [*decorator.args, *(k.value for k in decorator.keywords)]
            ):
                return True
        return False

    def _decorates_quietly(self, dotted: str, is_factory: bool) -> bool:
        """Whether a first-party decorator only wraps: it defines functions and returns one of them, or its argument."""
        place = self._place(dotted)
        while place is not None and place[1] not in place[0].bindings and len(place[0].imports.get(place[1], [])) == 1:
            base, name = place[0].imports[place[1]][0]
            place = self._place(f"{base}.{name}")
        if place is None:
            return False
        module, name = place
        statements = module.bindings.get(name, [])
        return len(statements) == 1 and self._only_wraps(statements[0], module, 1 + is_factory)

    def _only_wraps(self, function: ast.stmt, module: Module, levels: int) -> bool:
        """`levels`: how many of the nested functions are called when a function is decorated."""
        if not isinstance(function, ast.FunctionDef) or function.decorator_list:
            return False
        inner = [part for part in function.body if isinstance(part, ast.FunctionDef)]
        for part in function.body:
            if is_idle(part) or isinstance(part, ast.FunctionDef) and self._wraps_only(part, module):
                continue
            if not (isinstance(part, ast.Return) and isinstance(part.value, ast.Name)):
                return False
        return levels < 2 or (bool(inner) and all(self._only_wraps(part, module, levels - 1) for part in inner))

    def _wraps_only(self, function: ast.FunctionDef, module: Module) -> bool:
        """Whether defining a nested function does nothing else."""
        dotted = {name for d in function.decorator_list for name in _names_in(module)(_called(d))}
        return dotted <= SILENT_DECORATORS and not (function.args.defaults or any(function.args.kw_defaults))

    def _calls(self, value: ast.expr, module: Module) -> bool:
        """Whether evaluating an expression calls something that might do more than return a value."""
        for part in ast.walk(value):
            if isinstance(part, (ast.Await, ast.Yield, ast.YieldFrom)):
                return True
            if isinstance(part, ast.Call) and not self._is_quiet_call(part, module):
                return True
        return False

    def _is_quiet_call(self, call: ast.Call, module: Module) -> bool:
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        if any(isinstance(a, ast.Name) and self._is_code(a.id, module) for a in given):
            names = _names_in(module)(call.func)
            if not all(name in HOLDERS or name.partition(".")[0] in HOLDERS for name in names):
                return False
        if isinstance(call.func, ast.Attribute) and not self._is_imported(call.func, module):
            return call.func.attr in READING_METHODS and self._is_foreign_value(call.func.value, module)
        if not attribute_chain(call.func)[0]:
            return False
        for dotted in _names_in(module)(call.func):
            root, _, rest = dotted.partition(".")
            if root == "builtins":
                quiet = rest in QUIET_BUILTINS or _is_exception(rest)
            elif (place := self._place(dotted)) is not None:
                quiet = self._makes_quietly(*place)
            else:
                quiet = root in QUIET_MODULES or dotted in QUIET_MODULES
            if not quiet:
                return False
        return True

    def _is_foreign_value(self, node: ast.expr, module: Module, depth: int = 0) -> bool:
        """Whether a value is a literal or comes from a library, so that its methods are what their names say."""
        if isinstance(node, LITERALS):
            return True
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            return self._is_foreign_value(node.value, module, depth)
        if isinstance(node, ast.Call):
            return self._is_foreign_value(node.func, module, depth)
        if not isinstance(node, ast.Name) or depth > 20:
            return False
        if node.id in module.bindings:
            values = [getattr(statement, "value", None) for statement in module.bindings[node.id]]
            return all(value is not None and self._is_foreign_value(value, module, depth + 1) for value in values)
        return not any(self._find(base) for base, _ in module.imports.get(node.id, ()))

    def _is_code(self, name: str, module: Module) -> bool:
        """Whether `name` might be called by what it is given to: first-party code, or a lambda."""
        foreign = name in module.imports and not any(self._find(base) for base, _ in module.imports[name])
        values = [getattr(statement, "value", None) for statement in module.bindings.get(name, ())]
        return module.knows(name) and not foreign and not (values and all(isinstance(v, LITERALS) for v in values))

    def _is_imported(self, node: ast.Attribute, module: Module) -> bool:
        root = attribute_chain(node)[0]
        return root in module.imports and not isinstance(node.value, ast.Subscript)

    def _makes_quietly(self, module: Module, name: str) -> bool:
        """Whether calling the first-party class `name` only fills its fields."""
        if (module.name, name) == ("tasks.stage", "StageConfig"):
            return True
        statements = module.bindings.get(name, [])
        if not statements and name in module.imports:
            places = [self._place(".".join([m, *([a] if a else [])])) for m, a in module.imports[name]]
            return all(place is not None and self._makes_quietly(*place) for place in places)
        for statement in statements:
            if not isinstance(statement, ast.ClassDef) or not self.class_kind(statement, _names_in(module)).known:
                return False
            for part in statement.body:
                if isinstance(part, FUNCTIONS) and (part.name in MAKING_METHODS or _is_validator(part)):
                    return False
            for base in statement.bases:
                for dotted in _names_in(module)(base):
                    place = self._place(dotted)
                    if place is not None and not self._makes_quietly(*place):
                        return False
        return bool(statements)


def _is_validator(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Pydantic validators run when an object is made; the usual checks only raise, but may do anything."""
    return any("validator" in ast.unparse(_called(decorator)) for decorator in method.decorator_list)


def _is_exception(name: str) -> bool:
    found = getattr(builtins, name, None)
    return isinstance(found, type) and issubclass(found, BaseException)


def _is_property_part(decorator: ast.expr, owner: ast.ClassDef | None) -> bool:
    """`@x.setter` and the like, where `x` is a property of the same class."""
    if (
        owner is None
        or not isinstance(decorator, ast.Attribute)
        or decorator.attr not in ("setter", "deleter", "getter")
    ):
        return False
    root = attribute_chain(decorator)
    return len(root) == 2 and any(
        isinstance(part, FUNCTIONS) and part.name == root[0] and "property" in map(ast.unparse, part.decorator_list)
        for part in owner.body
    )


def _calls_own_name(body: list[ast.stmt]) -> bool:
    """Whether a class body calls a name that it binds itself, which may hide a builtin."""
    bound = {
        part.id for s in body for part in ast.walk(s) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    }
    bound |= {part.name for part in body if isinstance(part, (*FUNCTIONS, ast.ClassDef))}
    outside = [part for part in body if not isinstance(part, FUNCTIONS)]
    calls = [part for s in outside for part in ast.walk(s) if isinstance(part, ast.Call)]
    return any(attribute_chain(call.func)[0] in bound for call in calls)


def _called(decorator: ast.expr) -> ast.expr:
    return decorator.func if isinstance(decorator, ast.Call) else decorator


def _writes(target: ast.expr) -> bool:
    return any(isinstance(part, (ast.Attribute, ast.Subscript)) for part in ast.walk(target))


def _names_in(module: Module) -> Names:
    """Dotted names of what an expression at the top level of `module` may stand for."""

    def names(node: ast.expr) -> list[str]:
        root, *rest = attribute_chain(node)
        if not root:
            return ["?"]
        if root in module.bindings and root not in module.imports:
            origins = [(module.name, root)]
        else:
            origins = module.imports.get(root, [("builtins", root)])
        return [".".join([base, *([name] if name else []), *rest]) for base, name in origins]

    return names
