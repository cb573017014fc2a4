"""A key changes exactly when the output can: code by what it reaches, config by declared fields, inputs by content."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from artifacts.digest import canonical_json
from tasks.identity import CodeReader, SourceError, identity_config, stage_key, stage_payload
from tasks.stage import StageConfig
from tests import toy_stages

PACKAGE = {
    "body.py": '''
        """Doc."""
        from study.helper import helped, Shape
        from study import numbers
        import torch

        RATE = 2  # a comment
        UNUSED = 5

        def local(x: int) -> int:
            """Doc."""
            return x * RATE

        @stage("s", trains=False)
        def body(context, config, data=None):
            """Doc."""
            def inner():
                from study.late import late
                return late()
            return local(helped(1)) + numbers.two() + Shape().area() + inner() + torch.ones(1)

        def unrelated():
            return 1
    ''',
    "helper.py": """
        from study.deep import deep as renamed

        def helped(x):
            return renamed(x)

        class Shape:
            side = 3

            def area(self):
                return self.side ** 2
    """,
    "deep.py": "def deep(x):\n    return x + 1\n",
    "numbers.py": "def two():\n    return 2\n\n\ndef three():\n    return 3\n",
    "late.py": "def late():\n    return 0\n",
    "__init__.py": "",
}


def package(root: Path, **changes: tuple[str, str]) -> CodeReader:
    """A copy of the package with (old, new) replaced in the named modules."""
    (root / "study").mkdir(parents=True)
    for name, text in PACKAGE.items():
        text = textwrap.dedent(text)
        if name[:-3] in changes:
            old, new = changes[name[:-3]]
            assert old in text
            text = text.replace(old, new)
        (root / "study" / name).write_text(text)
    return CodeReader(root, ("study",))


def identity(reader: CodeReader):
    return reader.reach([("study.body", "body")])


HITS = {
    "comment": ("body", "# a comment", "# another comment"),
    "docstring": ("body", '"""Doc."""', '"""Other words."""'),
    "formatting": ("body", "return x * RATE", "return (x\n        * RATE)"),
    "annotation": ("body", "x: int", "x: float"),
    "stage decorator": ("body", "trains=False", "trains=True"),
    "unused constant": ("body", "UNUSED = 5", "UNUSED = 6"),
    "unreached function": ("numbers", "return 3", "return 4"),
    "unrelated function": ("body", "return 1\n", "return 7\n"),
}
MISSES = {
    "constant": ("body", "RATE = 2", "RATE = 3", "study/body.py::RATE"),
    "local helper": ("body", "x * RATE", "x + RATE", "study/body.py::local"),
    "imported helper": ("helper", "return renamed(x)", "return renamed(x) + 1", "study/helper.py::helped"),
    "helper of a helper": ("deep", "x + 1", "x + 2", "study/deep.py::deep"),
    "module attribute": ("numbers", "return 2", "return 22", "study/numbers.py::two"),
    "class attribute": ("helper", "side = 3", "side = 4", "study/helper.py::Shape"),
    "method": ("helper", "self.side ** 2", "self.side ** 3", "study/helper.py::Shape"),
    "local import": ("late", "return 0", "return 9", "study/late.py::late"),
    "default argument": ("body", "data=None", "data=1", "study/body.py::body"),
    "library function": ("body", "torch.ones(1)", "torch.zeros(1)", "study/body.py::body"),
    "library": ("body", "import torch\n", "import jax as torch\n", "study/body.py::body"),
}


@pytest.mark.parametrize("name", HITS)
def test_harmless_edit_keeps_the_code_digest(name: str, tmp_path: Path) -> None:
    """An edit that cannot change the output does not change the identity."""
    module, old, new = HITS[name]
    assert identity(package(tmp_path / "a")) == identity(package(tmp_path / "b", **{module: (old, new)}))


@pytest.mark.parametrize("name", MISSES)
def test_real_edit_changes_exactly_its_symbol(name: str, tmp_path: Path) -> None:
    """An edit that can change the output changes the digest, and the changed symbol is named."""
    module, old, new, symbol = MISSES[name]
    before, after = identity(package(tmp_path / "a")), identity(package(tmp_path / "b", **{module: (old, new)}))
    assert before.digest != after.digest
    changed = [s for s in before.symbols.keys() | after.symbols.keys() if before.symbols.get(s) != after.symbols.get(s)]
    assert changed == [symbol]


def test_computed_names_are_refused(tmp_path: Path) -> None:
    """Code that reaches other code by a computed name has no key that could be trusted."""
    with pytest.raises(SourceError, match="study/body.py:.*globals"):
        identity(package(tmp_path, body=("return x * RATE", "return globals()['RATE'] * x")))


def study(root: Path, **files: str) -> CodeReader:
    """A package of the given modules; `sub__h` is `sub/h.py`."""
    for name, text in {"__init__": "", **files}.items():
        path = root / "study" / (name if name == "__init__" else name.replace("__", "/", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(text, encoding="utf-8")
    return CodeReader(root, ("study",))


def body(before: str, returned: str, **others: str) -> dict[str, str]:
    """The modules of a study whose body returns an expression."""
    return {"body": f"{before}\n\ndef body(context, config):\n    return {returned}\n", **others}


def digests(tmp_path: Path, files: dict[str, str], module: str, old: str, new: str) -> tuple[str, str]:
    """The digests of a study before and after an edit."""
    assert old in files[module]
    edited = {**files, module: files[module].replace(old, new)}
    return identity(study(tmp_path / "a", **files)).digest, identity(study(tmp_path / "b", **edited)).digest


TWO = "def a():\n    return 1\ndef b():\n    return 2\n"
DEEP = "def f():\n    return 1\n"
CONFIG = "from tasks.stage import StageConfig\n"
REACHING = {
    "rebound by a decorator call": (
        body("def deco(g):\n    return g\ndef f():\n    return 1\nf = deco(f)", "f()"),
        "body",
        "return 1",
        "return 9",
    ),
    "bound twice": (body("X = 1\nX = X + 1", "X"), "body", "X = 1\n", "X = 7\n"),
    "augmented": (body("X = 1\nX += 1", "X"), "body", "X = 1\n", "X = 7\n"),
    "first of a stored item": (body("T = {'a': 1}\nT['b'] = 2", "T"), "body", "'a': 1", "'a': 7"),
    "key of a stored item": (body("K = 'k'\nT = {}\nT[K] = 2", "T"), "body", "K = 'k'", "K = 'z'"),
    "class attribute stored later": (body("class S:\n    a = 1\nS.b = 2", "S().a"), "body", "a = 1", "a = 9"),
    "call for effect": (body("T = {}\nT.update(a=1)", "T"), "body", "a=1", "a=9"),
    "call for effect in an assignment": (body("T = {}\n_ = T.pop('a', 1)", "T"), "body", "1", "9"),
    "registry decorator": (
        body("R = {}\ndef reg(f):\n    R[f.__name__] = f\n    return f\n@reg\ndef one():\n    return 1", "R['one']()"),
        "body",
        "return 1",
        "return 9",
    ),
    "single dispatch": (
        body(
            "from functools import singledispatch\n@singledispatch\ndef f(x):\n    return 0\n"
            "@f.register\ndef _(x: int):\n    return 1",
            "f(1)",
        ),
        "body",
        "x: int",
        "x: str",
    ),
    "module imported for its effect": (
        body(
            "import study.patch\nimport random", "random.random()", patch="import random\nrandom.random = lambda: 1\n"
        ),
        "patch",
        ": 1",
        ": 9",
    ),
    "effect of a package": (
        body("from study.sub.h import f", "f()", sub____init__="import math\nmath.tau = 1\n", sub__h=DEEP),
        "sub____init__",
        "= 1",
        "= 9",
    ),
    "two imports of one package": (
        body("import study.a\nimport study.b", "study.a.f() + study.b.f()", a=DEEP, b=DEEP),
        "a",
        "return 1",
        "return 9",
    ),
    "names swapped in an import": (
        body("from study.h import a as x, b as y", "x() - y()", h=TWO),
        "body",
        "a as x, b as y",
        "b as x, a as y",
    ),
    "re-export of a library": (
        body("from study.h import np", "np.ones(1)", h="import numpy as np\n"),
        "h",
        "numpy",
        "jax.numpy",
    ),
    "re-export of a module": (
        body("from study.h import deep", "deep.f()", h="from study import deep\n", deep=DEEP),
        "deep",
        "1",
        "9",
    ),
    "module of a module": (
        body("from study import h", "h.deep.f()", h="from study import deep\n", deep=DEEP),
        "deep",
        "1",
        "9",
    ),
    "getattr of a module": (body("from study import h", "h.a() + getattr(h, 'b')()", h=TWO), "h", "2", "9"),
    "module as a value": (body("from study import h", "h.a() + (lambda m: m.b())(h)", h=TWO), "h", "2", "9"),
    "module __getattr__": (
        body("from study.h import foo", "foo", h="def __getattr__(name):\n    return 1\n"),
        "h",
        "return 1",
        "return 9",
    ),
    "a call that is named stage": (
        body("def stage(x):\n    return x", "sum([stage(1), stage(2)])"),
        "body",
        "stage(2)",
        "stage(9)",
    ),
    "ClassVar of a config": (
        body(CONFIG + "from typing import ClassVar\nclass C(StageConfig):\n    K: ClassVar[int] = 3", "C.K"),
        "body",
        "= 3",
        "= 9",
    ),
    "private attribute of a config": (body(CONFIG + "class C(StageConfig):\n    _K = 3", "C._K"), "body", "= 3", "= 9"),
    "type of a field": (
        body("from dataclasses import dataclass\nclass In:\n    v = 1\n@dataclass\nclass C:\n    i: 'In'", "C"),
        "body",
        "v = 1",
        "v = 9",
    ),
    "annotation that a decorator reads": (
        body(
            "from pydantic import validate_call, AfterValidator as A\nfrom typing import Annotated\n"
            "def check(x):\n    return x + 1\n@validate_call\ndef f(x: Annotated[int, A(check)]):\n    return x",
            "f(1)",
        ),
        "body",
        "x + 1",
        "x + 9",
    ),
    "order of effects": (
        body("X = 1\nT = {}\nT.update(a=X)\nX = 2", "T"),
        "body",
        "T = {}\nT.update(a=X)\nX = 2",
        "X = 2\nT = {}\nT.update(a=X)",
    ),
    "walrus": (body("(X := 3)", "X"), "body", "3", "9"),
    "for": (body("for X in (3,):\n    pass", "X"), "body", "3", "9"),
    "with": (body("import contextlib\nwith contextlib.nullcontext(3) as X:\n    pass", "X"), "body", "3", "9"),
    "match": (body("match 1:\n    case 1:\n        X = 3\n    case _:\n        X = 4", "X"), "body", "X = 3", "X = 9"),
    "try": (body("try:\n    X = 3\nexcept OSError:\n    X = 4", "X"), "body", "X = 4", "X = 9"),
    "branch that imports": (
        body("if 1 == 1:\n    from study.a import f\nelse:\n    from study.b import f", "f()", a=DEEP, b=DEEP),
        "body",
        "1 == 1",
        "1 != 1",
    ),
}
IDLE = {
    "local annotation": (body("def f():\n    x: int = 1\n    return x", "f()"), "body", "x: int", "x: float"),
    "pass": (body(DEEP, "f()"), "body", "    return 1", "    pass\n    return 1"),
    "string in a branch": (body("def f():\n    if 1:\n        'a'\n        return 1", "f()"), "body", "'a'", "'b'"),
    "string after a class field": (
        body(CONFIG + "class C(StageConfig):\n    x: int = 1\n    'a'", "isinstance(config, C)"),
        "body",
        "'a'",
        "'b'",
    ),
    "main block": (body("if __name__ == '__main__':\n    print(1)", "1"), "body", "print(1)", "print(2)"),
    "import for types": (
        body("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import os", "1"),
        "body",
        "import os",
        "import re",
    ),
    "method named eval": (body("# a comment", "context.model.eval()"), "body", "# a", "# another"),
}
REFUSED = {
    "star import": (body("from study.h import *", "a()", h=TWO), "body.py:1: .*import \\*"),
    "vars": (body("from study import h", "vars(h)", h=TWO), "body.py:4: `vars`"),
    "locals": (body("", "locals()"), "body.py:4: `locals`"),
    "sys.modules": (body("import sys", "sys.modules['study.h']"), "body.py:4: `sys.modules`"),
    "modules from sys": (body("from sys import modules as m", "m['study.h']"), "body.py:4: `sys.modules`"),
    "import_module": (body("import importlib", "importlib.import_module('study.h')"), "body.py:4: `import_module`"),
    "builtins": (body("import builtins", "builtins.eval('1')"), "body.py:4: `builtins`"),
    "subclasses": (body("class A:\n    pass", "A.__subclasses__()"), "body.py:5: `__subclasses__`"),
    "package as a value": (body("import study.h", "getattr(study, 'h')", h=TWO), "body.py:3: package 'study'"),
    "another stage": (body("def stage(n):\n    return len\n@stage(1)\ndef f():\n    pass", "f"), "body.py:3: `@stage"),
    "sys.modules by a local import": (
        body("def f():\n    import sys\n    return sys.modules", "f()"),
        "body.py:3: `sys.modules`",
    ),
    "missing module": (body("import study.nothing", "study.nothing.f()"), "body.py:3: package 'study'"),
}


@pytest.mark.parametrize("name", REACHING)
def test_edit_by_an_unusual_way_changes_the_digest(name: str, tmp_path: Path) -> None:
    """No way of binding, changing, importing or registering a name hides an edit."""
    before, after = digests(tmp_path, *REACHING[name])
    assert before != after


@pytest.mark.parametrize("name", IDLE)
def test_idle_statements_keep_the_digest(name: str, tmp_path: Path) -> None:
    """What runs nothing, or only outside of a stage, does not change the identity."""
    before, after = digests(tmp_path, *IDLE[name])
    assert before == after


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name: str, tmp_path: Path) -> None:
    """Code that reading cannot follow is an error that names file, line and construct."""
    files, message = REFUSED[name]
    with pytest.raises(SourceError, match=message):
        identity(study(tmp_path, **files))


class Inner(StageConfig):
    rate: float = 1.0


class Outer(StageConfig):
    inner: Inner = Inner()
    names: tuple[str, ...] = ("a",)
    place: str | None = Field(None, json_schema_extra={"identity": False})


def test_config_identity() -> None:
    """Defaults are filled in, equal values are equal, and fields that are not identity are left out."""
    assert identity_config(Outer()) == {"inner": {"rate": 1.0}, "names": ["a"]}
    assert identity_config(Outer(inner=Inner(rate=1), place="/x")) == identity_config(Outer())
    assert identity_config(Outer(names=("b",))) != identity_config(Outer())


class Shade(Enum):
    DARK = "d"


class Odd(StageConfig):
    value: Any = None


@pytest.mark.parametrize("value", [[1], {1: 2}, {"a": {2}}, {"(order)": 1}, Path("x"), type("Text", (str,), {})("x")])
def test_config_values_without_a_canonical_form(value: object) -> None:
    """A value that could be told from another of the same encoding is refused, naming the field."""
    with pytest.raises(TypeError, match="Odd.value"):
        identity_config(Odd(value=value))


def test_extra_config_fields_are_refused() -> None:
    """A config that takes undeclared fields has no identity once it is given one."""

    class Open(StageConfig):
        model_config = {"extra": "allow"}

    assert identity_config(Open()) == {}
    with pytest.raises(TypeError, match="Open: surprise"):
        identity_config(Open(surprise=1))


def test_order_of_a_mapping_is_identity() -> None:
    """Code that walks through a mapping sees its order, and an enum member is not its value."""
    assert identity_config(Odd(value={"a": 1, "b": 2})) != identity_config(Odd(value={"b": 2, "a": 1}))
    assert identity_config(Odd(value=Shade.DARK)) != identity_config(Odd(value="d"))


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), object(), {1: 2}])
def test_values_without_a_canonical_form(value: object) -> None:
    """What has no one stable encoding is refused by name instead of being hashed somehow."""
    with pytest.raises(TypeError, match="value.field"):
        canonical_json({"field": value})


def test_key_depends_on_nothing_else() -> None:
    """The key of a stage is the same in another process, working directory and hash seed."""
    code = (
        "from tests.toy_stages import *; from tasks.identity import *\n"
        "code = CodeReader(packages=('tasks', 'tests')).stage(steps)\n"
        "print(stage_key(stage_payload(steps, StepsConfig(steps=3), {'a': '0' * 64}, code)))"
    )
    reader = CodeReader(packages=("tasks", "tests"))
    payload = stage_payload(
        toy_stages.steps, toy_stages.StepsConfig(steps=3), {"a": "0" * 64}, reader.stage(toy_stages.steps)
    )
    root = Path(__file__).parent.parent
    for seed in ("0", "1", "random"):
        found = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd="/",
            env={"PYTHONPATH": str(root), "PYTHONHASHSEED": seed},
        )
        assert found.stdout.strip() == stage_key(payload), found.stderr


def test_helper_of_a_toy_stage_is_reached() -> None:
    """A helper of a declared stage is part of its code, the stage machinery is not."""
    symbols = CodeReader(packages=("tasks", "tests")).stage(toy_stages.source).symbols
    assert "tests/toy_stages.py::decorated" in symbols
    assert not [symbol for symbol in symbols if symbol.startswith("tasks/stage.py")]
