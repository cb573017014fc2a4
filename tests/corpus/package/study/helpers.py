"""Functions of all shapes."""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce, wraps

from study import constants
from study.constants import LIMIT, RATE
from study.records import Row

CALLS = Counter()
state = "global"


def traced(function: Callable) -> Callable:
    """Count the calls of a function."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        CALLS[function.__name__] += 1
        return function(*args, **kwargs)

    return wrapper


@traced
def scaled(value: float, factor: float = RATE) -> float:
    """`value` times `factor`."""
    result = value * factor
    return result


def spread(*values: float, **options: float) -> list[float]:
    low = min(values)
    high = max(values)
    return [low, high, options.get("step", 1)]


def counted(rows: list[Row]) -> dict[str, int]:
    """How often each name occurs."""
    totals: dict[str, int] = {}
    for row in rows:
        name = row.name
        totals[name] = totals.get(name, 0) + 1
    return totals


def shadowing() -> str:
    """A local that could be mistaken for the module's `state`."""
    own = "local"
    return own + state


def counter() -> Callable[[], int]:
    """A closure with a variable that it changes."""
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    return step


def remember(value: str) -> None:
    global state
    state = value


def first_even(numbers: list[int]) -> int | None:
    if (found := next((number for number in numbers if number % 2 == 0), None)) is not None:
        return found
    return None


def classify(value: object) -> str:
    match value:
        case 0:
            return "zero"
        case int(number) if number > LIMIT:
            return "large"
        case [first, *rest]:
            return f"list of {first} and {len(rest)}"
        case {"kind": kind, **others}:
            return f"{kind} {sorted(others)}"
        case _:
            return "other"


def guarded(text: str) -> int:
    """A number, or what to say instead."""
    try:
        number = int(text)
    except ValueError as error:
        message = str(error)
        return -len(message)
    except (TypeError, KeyError):
        return -1
    else:
        number += 1
    finally:
        CALLS["guarded"] += 1
    return number


def debugged(value: int) -> str:
    doubled = value * 2
    return f"{doubled=}"


def shown(value: float) -> str:
    return f"{value:.2f}|{value!r}|{constants.TITLE}"


def numbers(count: int) -> Iterator[int]:
    for number in range(count):
        yield number


def ordered() -> list[str]:
    table = {"b": 1, "a": 2}
    return list(OrderedDict(table))


def arithmetic(left: int, right: int) -> list[float]:
    """One of each operator."""
    assert right != 0, "right is zero"
    total = left + right
    share = left / right
    whole = left // right
    if left > right and not left == 7:
        total -= 1
    return [total, share, whole, -left, left % 3, left << 1, math.floor(share), total if left else 0]


def defaults(base: int = 10, *, step: int = 1, pick: Callable[[int], int] = lambda number, plus=1: number + plus) -> int:
    return pick(base) + step


def folded(values: list[int]) -> int:
    added = partial(reduce, lambda left, right: left + right)
    return added(values)


@contextmanager
def opened(name: str) -> Iterator[list[str]]:
    lines = [name]
    yield lines
    lines.append("closed")


def dead() -> int:
    value = 1
    return value
    value = 2


def drawn(seed: int) -> float:
    generator = random.Random(seed)
    return generator.random()


def literals() -> list[object]:
    return [1, True, 1.5, "one", b"one", None, ..., 2j, 1e3, 0x10]


def unreached(value: int) -> int:
    """Called by nothing that the stage reaches."""
    return value * 3
