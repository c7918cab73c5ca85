"""The form of every check: a condition, what is wrong, what to set."""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


def as_yaml(value: Any) -> str:
    """A value as a config writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Check:
    """One unsupported combination; the texts become an error and a row of docs/support.md.

    In the texts ``{a.b=}`` stands for the key and its value, ``{a.b is}`` for both in words, ``{a.b}`` for the value;
    what follows a ``|`` stands in the table alone.
    """

    section: str
    given: str
    applies: Callable[[Any, Any], Any]
    """Of the config, and of the number of ranks or what a machine has; values for the texts count as true."""
    why: str
    remedy: str

    def message(self, config: Any, context: Any = None, show: Callable[[Any], str] = as_yaml) -> str | None:
        """What was given, why it is unsupported and what to set; None: it is supported."""
        found = self.applies(config, context)
        if not found:
            return None
        values = found if isinstance(found, dict) else {}

        def text_of(match: re.Match[str]) -> str:
            name, form = match.groups()
            # Fields come and go between Megatron-Core versions: an absent one is None.
            value = values.get(name) if name in values else functools.reduce(_get, name.split("."), config)
            shown = value if name in values and isinstance(value, str) else show(value)
            return f"{name}{form}{' ' if form == ' is' else ''}{shown}" if form else shown

        text = f"{self.given}{': ' if self.why else ''}{self.why}; {self.remedy}"
        return re.sub(r"\{([\w.]+)(=| is)?(?:\|[^}]*)?\}", text_of, text)


def _get(section: Any, name: str) -> Any:
    return getattr(section, name, None)


def first_unsupported(checks: Iterable[Check], config: Any, context: Any = None) -> str | None:
    """The message of the first check that applies."""
    return next((message for check in checks if (message := check.message(config, context))), None)
