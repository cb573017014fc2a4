"""A key changes exactly when the output can: code by what it reaches, config by declared fields, inputs by content."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

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
