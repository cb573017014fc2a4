"""What a stage's code must not do, because its key would then miss a change: reach code or read data out of sight.

A stage that does one of these things is refused with `SourceError`, never keyed somehow. Three kinds: names that reach code
by a computed name or look into frames and bytecode; modules of which only the harmless part may be used; and what reads
the surroundings (the environment, the source file), which are no part of a key.
"""

from __future__ import annotations

from collections.abc import Iterable

Origin = tuple[str, str | None]
"""(module, attribute) that an import binds; attribute None for a module."""

_NAMES = (
    "globals locals vars eval exec compile __import__ import_module __builtins__ __subclasses__ __init_subclass__"
    " __doc__ __globals__"
).split()
_ATTRIBUTES = (
    "__dict__ __code__ __closure__ __self__ __loader__ __spec__ __file__ __path__ __cached__ __traceback__ __getattribute__"
    " f_locals f_globals f_back f_code f_lineno tb_frame tb_lineno gi_frame gi_code cr_frame cr_code ag_frame ag_code"
    " exclude_unset model_fields_set __pydantic_fields_set__ __fields_set__"
).split()
NAMES = frozenset([*_NAMES, *_ATTRIBUTES, "__annotations__", "breakpoint"])
"""Names that are refused where they mean a builtin, or a variable of the module's machinery."""
ATTRIBUTES = (NAMES - {"eval", "exec", "compile", "globals", "locals", "vars", "__annotations__"}) | {"breakpointhook"}
"""The same after a dot, where `model.eval()`, `re.compile()` and the like are ordinary methods."""
MODULES = frozenset(
    "builtins runpy pickle cloudpickle dill marshal shelve joblib.load pkgutil zipimport imp code codeop pydoc linecache"
    " dis traceback unittest.mock torch.jit duckdb numexpr varname icecream sorcery os.environ os.environb os.getenv os.getenvb"
    " typing.get_overloads importlib.reload".split()
)
"""Modules, and members of modules, that are refused whole."""
GUARDED = {
    "sys": "stdout stderr stdin version_info version hexversion maxsize maxunicode platform byteorder float_info int_info"
    " exit getsizeof getrefcount intern getrecursionlimit setrecursionlimit flush",
    "importlib": "metadata.version metadata.PackageNotFoundError",
    "inspect": "signature Signature Parameter isclass isfunction ismethod isabstract isgenerator isgeneratorfunction"
    " iscoroutine iscoroutinefunction getdoc get_annotations getfullargspec",
    "gc": "collect disable enable freeze unfreeze isenabled",
}
"""Modules of which only these members may be used, and which may not be passed around."""
WHOLE = frozenset({"os", "unittest", "typing"})
"""Modules with refused members, which may therefore not be passed around."""
_ALLOWED = {module: tuple(f"{module}.{name}." for name in names.split()) for module, names in GUARDED.items()}
_SURROUNDINGS = frozenset({"os.environ", "os.environb", "os.getenv", "os.getenvb", "__file__"})


class SourceError(Exception):
    """A stage's code cannot be traced statically. The message names file, line, construct and what to write instead."""


def refuse_builtin(chain: tuple[str, ...], where: str) -> None:
    """Check a name that is no variable of the code's own, and the attributes taken from it.

    Raises:
        SourceError: it is one of those that cannot be followed.
    """
    if chain[0] in NAMES:
        _refuse(chain[0], where)
    refuse_attributes(chain[1:], where)


def refuse_attributes(attributes: Iterable[str], where: str) -> None:
    """Check names after a dot."""
    for attribute in attributes:
        if attribute in ATTRIBUTES:
            _refuse(attribute, where)


def refuse_import(origin: Origin, chain: tuple[str, ...], where: str) -> None:
    """Check what the attributes `chain` of something imported are; the bare name of a module stands for all of it."""
    module, attribute = origin
    if attribute in ATTRIBUTES:
        _refuse(attribute, where)
    dotted = ".".join([module, *([attribute] if attribute else []), *chain])
    parts = dotted.split(".")
    for end in range(1, len(parts) + 1):
        if (prefix := ".".join(parts[:end])) in MODULES:
            _refuse(prefix, where)
    if dotted in WHOLE or parts[0] in _ALLOWED and not f"{dotted}.".startswith(_ALLOWED[parts[0]]):
        _refuse(dotted, where)


def _refuse(what: str, where: str) -> None:
    if what in _SURROUNDINGS:
        raise SourceError(
            f"{where}: `{what}` reads the surroundings of the stage, which are no part of its key. "
            "Make what it reads a field of the config, or an input."
        )
    raise SourceError(
        f"{where}: `{what}` reaches code in a way that reading the source cannot follow, so the "
        "stage's key could not be trusted. Refer to the function, class or module by its name."
    )
