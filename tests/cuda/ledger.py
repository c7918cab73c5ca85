"""What the rehearsal counts, what it objects to, and which host memory a device may still be at."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import typing_extensions

REPOSITORY = str(Path(__file__).parents[2])
NOBODY = (str(Path(__file__).parent), str(Path(torch.__file__).parent), typing_extensions.__file__)
"""Whose frames do not count: this folder's, torch's and those of its decorators."""
LIBRARIES = "/site-packages/"

SYNCS: Counter[tuple[str, str]] = Counter()
"""How often the host has waited for the device, by ``(kind, "path:line")``."""
COPIES: Counter[tuple[str, str]] = Counter()
"""Copies between host and device, by ``(kind, "path:line")``; those that are waited for are in `SYNCS` as well."""
FAULTS: list[str] = []
"""Every objection so far, also those whose error was caught on its way: a rehearsal has passed if there is none."""


class Counts(NamedTuple):
    """What `SYNCS` and `COPIES` gained within `counted`."""

    syncs: Counter[tuple[str, str]]
    copies: Counter[tuple[str, str]]


_counting: list[Counts] = []


class RehearsalError(RuntimeError):
    """Something that a GPU would not do, or that would be wrong there."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} at {' < '.join(lines(6))}")
        FAULTS.append(str(self))


@contextmanager
def counted() -> Iterator[Counts]:
    """Fresh counters of what happens within, on all threads."""
    counts = Counts(Counter(), Counter())
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting.remove(counts)


def lines(depth: int = 1) -> list[str]:
    """The innermost ``path:line`` of the project and of libraries; not of Python, nor of `NOBODY`."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < depth:
        name = frame.f_code.co_filename
        if not name.startswith(NOBODY):
            if LIBRARIES in name:
                found.append(f"{name.rpartition(LIBRARIES)[2]}:{frame.f_lineno}")
            elif name.startswith(REPOSITORY):
                found.append(f"{name[len(REPOSITORY) + 1 :]}:{frame.f_lineno}")
        frame = frame.f_back
    return found or ["python"]


def waited(kind: str) -> None:
    """The host has waited: whatever the device was given before is done."""
    _count(0, kind)
    _arriving.clear()
    _leaving.clear()


def copied(kind: str) -> None:
    """Bytes went from host to device or back."""
    _count(1, kind)


def _count(which: int, kind: str) -> None:
    key = (kind, lines()[0])
    (SYNCS, COPIES)[which][key] += 1
    for counts in _counting:
        counts[which][key] += 1


# ---- host memory, by the address of its storage


_pinned: dict[int, torch.Tensor] = {}
"""Kept for good, so that no pageable memory gets such an address."""
_arriving: dict[int, str] = {}
"""Where a copy from the device arrives that nobody has waited for, and who began it."""
_leaving: dict[int, str] = {}
"""Pinned memory that the device may still read, and who began that copy."""


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, from now on in page-locked memory."""
    _pinned[address(tensor)] = tensor
    return tensor


def is_pinned(tensor: torch.Tensor) -> bool:
    return address(tensor) in _pinned


def will_arrive(tensor: torch.Tensor) -> None:
    """A copy into the host's ``tensor`` was begun; only `waited` makes it readable."""
    _arriving[address(tensor)] = lines()[0]


def will_leave(tensor: torch.Tensor) -> None:
    """A copy from the pinned ``tensor`` was begun; pageable memory is staged before the call returns."""
    _leaving[address(tensor)] = lines()[0]


def check_read(tensor: torch.Tensor) -> None:
    if _arriving and (begun := _arriving.get(address(tensor))):
        raise RehearsalError(f"host memory is read, and nobody has waited for the copy into it that {begun} began")


def check_written(tensor: torch.Tensor) -> None:
    if _leaving and (begun := _leaving.get(address(tensor))):
        raise RehearsalError(
            f"pinned memory is written, and nobody has waited for the copy out of it that {begun} began"
        )


def is_any_on_its_way() -> bool:
    return bool(_arriving or _leaving)
