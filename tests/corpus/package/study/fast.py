"""One of two modules of which `compat` takes one."""


def speed() -> int:
    return 10
