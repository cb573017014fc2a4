"""Imported by nothing."""

import random

random.random = lambda: 4


def nothing():
    return 0
