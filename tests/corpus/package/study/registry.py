"""Functions that register themselves by name when this file is imported."""

from collections.abc import Callable

TABLE: dict[str, Callable[[int], int]] = {}


def register(name: str):
    """Enter a function into the table."""

    def enter(function):
        TABLE[name] = function
        return function

    return enter


@register("add")
def add(number: int) -> int:
    return number + 1


@register("double")
def double(number: int) -> int:
    doubled = number * 2
    return doubled


def apply(name: str, number: int) -> int:
    """Call what is registered as `name`."""
    return TABLE[name](number)
