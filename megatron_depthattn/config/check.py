"""The form of every check: a condition, what is wrong, what to set."""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Condition = Callable[[Any, Any], Any]
"""Of the config, and of the number of ranks or what a machine has; values for the texts count as true."""


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
    applies: Condition
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
            value = values[name] if name in values else _value(config, name)
            shown = value if name in values and isinstance(value, str) else show(value)
            return f"{name}{form}{' ' if form == ' is' else ''}{shown}" if form else shown

        text = f"{self.given}{': ' if self.why else ''}{self.why}; {self.remedy}"
        return re.sub(r"\{([\w.]+)(=| is)?(?:\|[^}]*)?\}", text_of, text)


def checks(section: str, *rows: str | tuple[str, Condition]) -> tuple[Check, ...]:
    """Checks from their messages, ``given: why; remedy`` or ``given; remedy``.

    One without a condition beside it applies to a config in which every setting that ``given`` names is as it says:
    ``a.b=value`` has that value, ``{a.b=|above 1}`` is above 1, ``{a.b=}`` is neither null, false nor empty.
    """
    made = []
    for row in rows:
        text, condition = (row, None) if isinstance(row, str) else row
        problem, _, remedy = text.partition("; ")
        given, _, why = problem.partition(": ")
        made.append(Check(section, given, condition or _as_given(given), why, remedy))
    return tuple(made)


def _as_given(given: str) -> Condition:
    settings = re.findall(r"\{([\w.]+)(?:=| is)(?:\|above (\d+))?\}|([\w.]+\.\w+)=(\w+)", given)
    return lambda config, _: all(
        as_yaml(_value(config, key)) == text
        if key
        else _value(config, shown) > int(least)
        if least
        else _value(config, shown)
        for shown, least, key, text in settings
    )


def _value(config: Any, key: str) -> Any:
    # Fields come and go between Megatron-Core versions: an absent one is None.
    return functools.reduce(lambda section, name: getattr(section, name, None), key.split("."), config)


def first_unsupported(checks: Iterable[Check], config: Any, context: Any = None) -> str | None:
    """The message of the first check that applies."""
    return next((message for check in checks if (message := check.message(config, context))), None)
