"""A table that is changed after it was made."""

TABLE = {"a": 1}
TABLE["b"] = 2


def table_of() -> dict:
    return TABLE


def beside() -> int:
    """Reached by nothing, but its file runs."""
    return 0
