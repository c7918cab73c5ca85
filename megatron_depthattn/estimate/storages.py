"""A ledger of tensors: which storages stay alive, each counted once. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Storages:
    """Tensors by name. What is kept of a view is all of the storage behind it, and what is kept twice is there once."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self._views: dict[str, str] = {}
        self._kept: set[str] = set()
        self._is_paused = False

    def make(self, name: str, num_bytes: int) -> str:
        """A tensor with memory of its own; returns its name."""
        self._bytes[name] = num_bytes
        return name

    def view(self, name: str, of: str) -> str:
        """A tensor that shares the memory of ``of``; returns its name."""
        self._views[name] = self._views.get(of, of)
        return name

    def is_view(self, name: str) -> bool:
        """Whether a tensor shares the memory of another."""
        return name in self._views

    def keep(self, *names: str) -> None:
        """What something needs later on."""
        if not self._is_paused:
            self._kept.update(self._views.get(name, name) for name in names)

    def keep_new(self, name: str, num_bytes: int) -> None:
        """A tensor with memory of its own that nothing else is a view of."""
        self.keep(self.make(name, num_bytes))

    @contextmanager
    def paused(self, pauses: bool) -> Iterator[None]:
        """Within it, if ``pauses``, tensors are made but none is kept: as in a forward pass without gradients."""
        self._is_paused = pauses
        yield
        self._is_paused = False

    @property
    def kept(self) -> dict[str, int]:
        """Bytes of every kept storage."""
        return {name: self._bytes[name] for name in self._bytes if name in self._kept}

    @property
    def total(self) -> int:
        """Bytes of all kept storages."""
        return sum(self.kept.values())
