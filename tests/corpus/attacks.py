"""Attempts to change the output behind the key's back: each one must miss, or be refused."""
# ruff: noqa: E501
# fmt: off

from __future__ import annotations

from tests.corpus.mutation import Edit, hit, miss, refused

BODY, HELPERS, LAZY, SHAPES, CONFIG, TEXT = "body.py", "helpers.py", "lazy.py", "shapes.py", "config.py", "text/__init__.py"


def _late(before: str, returned: str = "number + OFFSET") -> Edit:
    """`lazy.late` with other statements and another result."""
    return (LAZY, "def late(number):\n    return number + OFFSET", f"{before}\n\n\ndef late(number):\n    return {returned}")


MANGLED = _late("def _Holder__help():\n    return 1\n\n\nclass Holder:\n    def get(self):\n        return __help()", "number + Holder().get()")
DECLARED = _late("def setup():\n    global tool\n    from study.fast import speed as tool\n\n\ndef use():\n    setup()\n    return tool()", "number + use()")
IN_CLASS = _late("class Holder:\n    from study.fast import speed\n", "number + Holder.speed()")
MADE = (BODY, '"late": later(config.steps)', '"late": type(config)().rate')
MAKES = (BODY, '"late": later(config.steps)', '"late": ScoreConfig().trigger.text')
HOOKED = (BODY, '    texts = words(config, rows)', '    texts = words(config, rows)\n    context.on_log = texts.append\n    context.log("hooked")')
PROPERTY = ("records.py", "    def total(self)", "    @property\n    def counted(self):\n        self.notes.append(1)\n        return 1\n\n    def total(self)")
LOGGED = (BODY, '    context.log(f"{len(rows)} rows")', '    context.log(f"{len(rows)} rows")\n    first = rows[0]\n    context.log(f"{first.counted} rows")')
LENGTH = ("text/tokens.py", "        return len(self.vocabulary)", "        self.vocabulary['n'] = self.vocabulary.get('n', 0) + 1\n        return 1")
DISPATCH = _late("from functools import singledispatch\n\n\n@singledispatch\ndef kind(value):\n    return 0\n\n\ndef whole(value: int):\n    return 1\n\n\nkind.register(whole)", "number + kind(number)")
PARTIAL = _late("from functools import partial\n\nplus = partial(lambda a, b: a + b, 1)", "plus(number)")
META = _late("class Meta(type):\n    def __new__(meta, name, bases, space):\n        space['value'] = 1\n        return type.__new__(meta, name, bases, space)\n\n\nclass Made(metaclass=Meta):\n    pass", "number + Made.value")
WRAPPED = _late("def doubled(cls):\n    cls.value = 2\n    return cls\n\n\n@doubled\nclass Made:\n    pass", "number + Made.value")
MODULE_GETATTR = _late("from study import dynamic", "number + dynamic.anything")
DYNAMIC = ("dynamic.py", "", "def __getattr__(name):\n    return 1\n")
CIRCLE_A = _late("import study.circle as circle\n", "number + circle.back()")
CIRCLE_B = ("circle.py", "", "import study.lazy as lazy\n\n\ndef back():\n    return lazy.OFFSET\n")
NAMED = _late("import study.fast as fast\n\nNAMES = ['spe' + 'ed']", "number + getattr(fast, NAMES[0])()")
ALIAS = _late("from study import fast\n\nsame = fast\nagain = same", "number + again.speed()")
FOREIGN = _late("import collections\n\n\nclass Table(collections.UserDict):\n    def __missing__(self, key):\n        return 1", "number + Table()['a']")
ITEM = _late("TABLE = {'f': lambda n: n + 1}", "TABLE['f'](number)")
STAR = _late("PARTS = [1, 2]\nfirst, *others = PARTS", "number + sum(others)")
LOOP = _late("for last in (1, 2):\n    pass", "number + last")
DELETED = _late("sized = 1\nif sized:\n    extra = 1\nelse:\n    extra = 2", "number + extra")
DEFAULTED = _late("COUNT = []\n\n\ndef unused(x=COUNT.append(1)):\n    return x", "number + len(COUNT)")
ASSIGNED = _late("import math\n\nCOUNT = []\n_ = COUNT.append(1)", "number + len(COUNT)")
SETTER = _late("import math\n\n_ = setattr(math, 'floor', lambda x: 1)", "number + math.floor(2.5)")
PATCH = _late("import study.patch\nimport math", "number + math.floor(2.5)")
PATCHES = ("patch.py", "", "import math\n\nmath.floor = lambda x: 1\n")
INHERITED = ((BODY, '"late": later(config.steps)', '"late": Tile(2).label'),)
REGISTERED = _late("from study.registry import TABLE, register\n\nkept = register('late')(lambda n: n + 1)", "TABLE['late'](number)")
BASES = _late("class Base:\n    value = 1\n\n\nclass Made(*[Base]):\n    pass", "number + Made.value")
SLOTTED = _late("class Lazy:\n    def __get__(self, instance, owner):\n        return 1\n\n\nclass Made:\n    value = Lazy()", "number + Made().value")
CALLED = _late("class Adder:\n    def __call__(self, n):\n        return n + 1\n\n\nadd = Adder()", "add(number)")
ENTERED = _late("class Open:\n    def __enter__(self):\n        return 1\n\n    def __exit__(self, *error):\n        return None\n\n\ndef opened():\n    with Open() as value:\n        return value", "number + opened()")
MONKEY = _late("from study.shapes import Square\n\n\ndef bigger(self):\n    return 1\n\n\nSquare.area = bigger")
DUMPED = (BODY, '"late": later(config.steps)', '"late": list(config.model_dump())')
UNSET = (BODY, '"late": later(config.steps)', '"late": config.model_dump(exclude_unset=True)')
SERIAL = (CONFIG, "note: str | None = None", "note: Annotated[str | None, PlainSerializer(lambda v: 'one')] = None")
SERIALS = ((CONFIG, "import Literal", "import Annotated, Literal"), (CONFIG, "import Field,", "import Field, PlainSerializer,"), SERIAL, (BODY, '"late": later(config.steps)', '"late": config.model_dump()["note"]'))
EXTENDED = (CONFIG, '    """What several stages share."""', '    """What several stages share."""\n    model_config = {"extra": "allow"}')
LOCAL_ALIAS = (LAZY, "    return number + OFFSET", "    pick = speed\n    return number + pick()")
NESTED = _late("from dataclasses import dataclass, fields\n\n\ndef made():\n    class Local:\n        x: int = 1\n\n    return len(fields(dataclass(Local)))", "number + made()")
READER = _late("class Source:\n    value = 5\n\n    def get(self, n):\n        Source.value = n\n\n\nsource = Source()\n_ = source.get(1)", "number + Source.value")
CLASSMETHOD = ((CONFIG, "    def attach(self", "    @classmethod\n    def fresh(cls):\n        return cls().text\n\n    def attach(self"), (BODY, '"late": later(config.steps)', '"late": config.trigger.fresh()'))
BY_INIT = (BODY, '"late": later(config.steps)', '"late": type(config).__new__(type(config)).__class__().rate')
REASSIGNED = (LAZY, "OFFSET = 5", "from study.fast import speed\n\nOFFSET = 5")

ATTACKS = (
    # Code by other ways than its name.
    miss("attack: mangled global", "lazy.py::_Holder__help", (LAZY, "return 1", "return 2"), given=(MANGLED,)),
    miss("attack: import into a global by a function", "fast.py::speed", ("fast.py", "return 10", "return 11"), given=(DECLARED,)),
    miss("attack: import in a class body", "fast.py::speed", ("fast.py", "return 10", "return 11"), given=(IN_CLASS,)),
    miss("attack: metaclass", "lazy.py::Meta", (LAZY, "= 1\n        return type", "= 2\n        return type"), given=(META,)),
    miss("attack: class decorator", "lazy.py::doubled", (LAZY, "cls.value = 2", "cls.value = 3"), given=(WRAPPED,)),
    miss("attack: __getattr__ of a module", "dynamic.py::__getattr__", ("dynamic.py", "return 1", "return 2"), given=(MODULE_GETATTR, DYNAMIC)),
    miss("attack: circular imports", "lazy.py::OFFSET", (LAZY, "OFFSET = 5", "OFFSET = 6"), given=(CIRCLE_A, CIRCLE_B)),
    miss("attack: getattr with a name that is put together", "fast.py::speed", ("fast.py", "return 10", "return 11"), given=(NAMED,)),
    miss("attack: alias of an alias of a module", "fast.py::speed", ("fast.py", "return 10", "return 11"), given=(ALIAS,)),
    miss("attack: alias by a local", "fast.py::speed", ("fast.py", "return 10", "return 11"), given=(LOCAL_ALIAS, REASSIGNED)),
    miss("attack: method called by a base of a library", "lazy.py::Table", (LAZY, "return 1", "return 2"), given=(FOREIGN,)),
    miss("attack: function in a table", "lazy.py::TABLE", (LAZY, "n + 1", "n + 2"), given=(ITEM,)),
    miss("attack: partial", "lazy.py::plus", (LAZY, "a + b, 1", "a + b, 2"), given=(PARTIAL,)),
    miss("attack: starred bases", "lazy.py::Base", (LAZY, "value = 1", "value = 2"), given=(BASES,)),
    miss("attack: descriptor", "lazy.py::Lazy", (LAZY, "return 1", "return 2"), given=(SLOTTED,)),
    miss("attack: callable object", "lazy.py::Adder", (LAZY, "n + 1", "n + 2"), given=(CALLED,)),
    miss("attack: context manager class", "lazy.py::Open", (LAZY, "return 1", "return 2"), given=(ENTERED,)),
    miss("attack: registered by an assignment", "lazy.py::<module>", (LAZY, "n + 1", "n + 2"), given=(REGISTERED,)),
    miss("attack: dispatch by an annotation", "lazy.py::whole.__annotations__", (LAZY, "value: int", "value: str"), given=(DISPATCH,)),
    miss("attack: inherited property", "shapes.py::Shape", (SHAPES, "__name__}:", "__name__}="), given=INHERITED),
    miss("attack: annotation of a class in a function", "lazy.py::made.Local.__annotations__", (LAZY, "x: int = 1", "x = 1"), given=(NESTED,)),
    # Effects of importing.
    miss("attack: effect of a method that is named like a harmless one", "lazy.py::<module>", (LAZY, "source.get(1)", "source.get(2)"), given=(READER,)),
    miss("attack: method replaced from another file", "lazy.py::<module>", (LAZY, "return 1", "return 2"), given=(MONKEY,), cautious="the import comes after the squares"),
    miss("attack: library replaced from another file", "patch.py::<module>", ("patch.py", "x: 1", "x: 2"), given=(PATCH, PATCHES)),
    miss("attack: library replaced by a call", "lazy.py::<module>", (LAZY, "x: 1", "x: 2"), given=(SETTER,)),
    miss("attack: effect in an assigned value", "lazy.py::<module>", (LAZY, "_ = COUNT.append(1)", "_ = COUNT.extend([1, 2])"), given=(ASSIGNED,)),
    miss("attack: effect in the default of an unreached function", "lazy.py::<module>", (LAZY, "x=COUNT.append(1)", "x=COUNT.extend([1, 2])"), given=(DEFAULTED,)),
    miss("attack: starred assignment", "lazy.py::PARTS", (LAZY, "[1, 2]", "[1, 3]"), given=(STAR,)),
    miss("attack: variable of a loop", "lazy.py::last", (LAZY, "in (1, 2)", "in (1, 3)"), given=(LOOP,)),
    miss("attack: conditional constant", "lazy.py::sized", (LAZY, "sized = 1", "sized = 0"), given=(DELETED,)),
    miss("attack: conditional definition", "lazy.py::extra", (LAZY, "    extra = 1", "    extra = 3"), given=(DELETED,)),
    # Log lines that do something.
    miss("attack: log line that a hook writes to the output", "body.py::score.<log>", (BODY, '"hooked"', '"other"'), given=(HOOKED,)),
    miss("attack: log line that reads a property with effects", "body.py::score.<log>", (BODY, '    context.log(f"{first.counted} rows")\n', ""), given=(PROPERTY, LOGGED)),
    miss("attack: log line that measures with effects", "body.py::score.<log>", (BODY, "    squares = [", '    context.log(f"{len(reader)} words")\n    squares = ['), given=(LENGTH, (BODY, '"tokens": [', '"size": reader.vocabulary if reader else {},\n        "tokens": ['))),
    miss("attack: log line of something else", "body.py::score", (BODY, "    texts = words(config, rows)\n", "    texts = words(config, rows)\n    context = ScoreBoard(texts)\n    context.log('b')\n    context = context.kept\n"), given=((BODY, "@stage(", "class ScoreBoard:\n    def __init__(self, texts):\n        self.texts = texts\n\n    def log(self, text):\n        self.texts.append(text)\n\n\n@stage("),)),
    # Configs.
    miss("attack: config made by its name", "config.py::Trigger.model_fields", (CONFIG, '"now"', '"soon"'), given=(MAKES,)),
    miss("attack: config made by its type", "config.py::ScoreConfig.model_fields", (CONFIG, "Field(0.5, ge", "Field(0.25, ge"), given=(MADE,)),
    miss("attack: config made by a class method", "config.py::Trigger.model_fields", (CONFIG, '"now"', '"soon"'), given=CLASSMETHOD),
    miss("attack: config made by way of its type", "config.py::ScoreConfig.model_fields", (CONFIG, "Field(0.5, ge", "Field(0.25, ge"), given=(BY_INIT,)),
    miss("attack: order of dumped fields", "config.py::ScoreConfig", (CONFIG, "    note: str | None = None\n", ""), (CONFIG, "    steps: int", "    note: str | None = None\n    steps: int"), given=(DUMPED,)),
    miss("attack: serializer in an annotation", "config.py::ScoreConfig", (CONFIG, "'one'", "'two'"), given=SERIALS),
    hit("attack: config that allows extra fields, none given", (CONFIG, "# nothing\n", ""), given=((CONFIG, "DEFAULT_STEPS = 3", "# nothing\nDEFAULT_STEPS = 3"), EXTENDED)),
    # Refused.
    refused("refused: globals", _late("", "globals()['OFFSET'] + number")),
    refused("refused: locals", _late("", "locals()['number']")),
    refused("refused: names of the local variables", _late("", "len(dir())")),
    refused("refused: eval", _late("", "eval('number')")),
    refused("refused: getattr of sys", _late("import sys", "getattr(sys, 'modules')['study.fast'].speed()")),
    refused("refused: sys.modules under another name", _late("import sys as system", "system.modules['study.fast'].speed()")),
    refused("refused: sys given away", _late("import sys\nfrom operator import attrgetter", "attrgetter('modules')(sys)['study.fast'].speed()")),
    refused("refused: sys in a class body", _late("class Holder:\n    import sys", "Holder.sys.modules['study.fast'].speed()")),
    refused("refused: importlib", _late("from importlib import import_module", "import_module('study.fast').speed()")),
    refused("refused: __import__", _late("", "__import__('study.fast').fast.speed()")),
    refused("refused: function's globals", _late("from study.fast import speed", "speed.__globals__['speed']()")),
    refused("refused: dunder by getattr", _late("from study.fast import speed", "getattr(speed, '__globals__')['speed']()")),
    refused("refused: module's dict", _late("from study import fast", "fast.__dict__['speed']()")),
    refused("refused: builtin's self", _late("", "len.__self__.eval('number')")),
    refused("refused: frames", _late("import inspect", "inspect.currentframe().f_locals['number']")),
    refused("refused: source", _late("import inspect", "len(inspect.getsource(late))")),
    refused("refused: bytecode", _late("", "late.__code__.co_firstlineno + number")),
    refused("refused: docstring", _late("", "number + len(late.__doc__ or '')")),
    refused("refused: traceback", _late("import traceback", "traceback.format_stack()")),
    refused("refused: pickle", _late("import pickle", "pickle.loads(pickle.dumps(number))")),
    refused("refused: names resolved from text", _late("import pkgutil", "pkgutil.resolve_name('study.fast:speed')()")),
    refused("refused: patching by a text", _late("from unittest import mock", "mock.patch('study.fast.speed')")),
    refused("refused: subclasses", _late("class Base:\n    pass", "len(Base.__subclasses__())")),
    refused("refused: registering subclasses", _late("class Base:\n    def __init_subclass__(cls):\n        pass", "Base() and number")),
    refused("refused: environment", _late("import os", "os.environ['HOME']")),
    refused("refused: environment, from", _late("from os import getenv", "getenv('HOME')")),
    refused("refused: os given away", _late("import os", "getattr(os, 'env' + 'iron')['HOME']")),
    refused("refused: own file", _late("from pathlib import Path", "Path(__file__).read_text()")),
    refused("refused: star import", _late("from study.fast import *", "number + speed()")),
    refused("refused: another TYPE_CHECKING", _late("TYPE_CHECKING = True\nif TYPE_CHECKING:\n    from study.fast import speed", "number + speed()")),
    refused("refused: which fields were set", UNSET),
    refused("refused: package as a value", _late("import study", "getattr(study, 'Tile')(2).area()")),
)
