"""What a measurement hands back."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """A table, and the figures behind it."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
