"""Sizes in bytes as people write them."""

import re

_UNITS = {"": 0, "b": 0, "kb": 1, "mb": 2, "gb": 3, "tb": 4, "kib": 1, "mib": 2, "gib": 3, "tib": 4}


def parse_bytes(size: int | str) -> int:
    """Bytes of "200gb" or a number; a unit is a power of 1024, written with or without the i, as streaming reads it.

    Raises:
        ValueError: it is no size above 0.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", str(size).lower(), re.ASCII)
    if (
        found is None
        or found[2] not in _UNITS
        or len(found[1]) > 18
        or not int(float(found[1]) * 1024 ** _UNITS[found[2]])
    ):
        raise ValueError(f"{size!r} is no size: set a number of bytes, or one with kb, mb, gb or tb, such as 200gb")
    return int(float(found[1]) * 1024 ** _UNITS[found[2]])


def shown(num_bytes: float) -> str:
    """A size for people, in a form that `parse_bytes` takes, rounded up."""
    unit = next((unit for unit in ("tb", "gb", "mb", "kb") if num_bytes >= 1024 ** _UNITS[unit]), "b")
    return f"{-(-num_bytes * 10 // 1024 ** _UNITS[unit]) / 10:g}{unit}"
