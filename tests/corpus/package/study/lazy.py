"""Imported inside a function."""

OFFSET = 5


def late(number):
    return number + OFFSET


def later(number):
    return number - OFFSET
