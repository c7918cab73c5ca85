"""How a start ended on each node, and what follows from it for all of them: a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

EXIT_DONE, EXIT_ERROR, EXIT_HANG, EXIT_REQUEUE = 0, 1, 70, 75
"""What the launchers return; the last two are those of a training process."""

Outcome = Literal["finished", "saved", "interrupted", "hung", "failed", "lost"]
"""Of one node: done; stopped by a signal with its state saved; stopped by one before there was anything to save; ended
by the watchdog; ended by an error; gone without a word."""
_BROKEN = ("hung", "failed", "lost")


@dataclass(frozen=True)
class Failure:
    """What ended a rank, or a node."""

    time: float
    """Seconds since 1970, by that node's clock."""
    host: str
    who: str
    """`rank 3`, or `node 1`."""
    text: str
    """For people: one line, or a traceback."""
    retry: bool = True
    """Whether the same command may end better if started again."""
    is_consequence: bool = False
    """Whether it speaks of another rank that has gone or failed: news only where there is no other."""

    @property
    def order(self) -> tuple[bool, float]:
        """The first one in this order is what ended the run."""
        return self.is_consequence, self.time

    @property
    def summary(self) -> str:
        """One line."""
        last = self.text.strip().splitlines()[-1:] or ["no message"]
        return f"{self.who} on {self.host}: {last[0]}"


@dataclass(frozen=True)
class Ended:
    """How a start ended on one node."""

    node: int
    outcome: Outcome
    failure: Failure | None = None
    signalled: bool = False
    """Whether this launcher was asked to stop."""


@dataclass(frozen=True)
class Verdict:
    """What all nodes do next."""

    again: bool
    code: int
    line: str
    """Why, for people."""
    failure: Failure | None = None
    """The first one of all nodes."""


def decide(ended: Sequence[Ended], restarts_left: int) -> Verdict:
    """The same command once more, or the exit code of every launcher.

    A failure is the world's: the first one is what the user is told, as those after it are mostly ranks that lost a
    neighbour. It is followed by a new start unless it cannot mend itself, somebody asked to stop, or there were
    enough.
    """
    outcomes = {end.outcome for end in ended}
    failures = sorted((end.failure for end in ended if end.failure), key=lambda failure: failure.order)
    if not outcomes & set(_BROKEN):
        if "finished" in outcomes:
            return Verdict(False, EXIT_DONE, "done")
        saved = "saved: start the same command again" if "saved" in outcomes else "before there was anything to save"
        return Verdict(False, EXIT_REQUEUE, f"stopped by a signal, {saved}")
    first = failures[0] if failures else None
    what = first.summary if first else "no rank left word"
    code = EXIT_HANG if "hung" in outcomes else EXIT_ERROR
    if first and not first.retry:
        return Verdict(False, code, f"not started again, as the same would follow: {what}", first)
    if any(end.signalled for end in ended):
        return Verdict(False, code, f"asked to stop, and failed: {what}", first)
    if restarts_left < 1:
        return Verdict(False, code, f"no restart left (MAX_RESTARTS): {what}", first)
    return Verdict(True, code, f"starting again, {restarts_left - 1} restarts left after that: {what}", first)


def to_json(value: Ended | Verdict) -> dict[str, Any]:
    """For a message."""
    return asdict(value)


def ended_from(values: dict[str, Any]) -> Ended:
    """The reverse of `to_json`."""
    return Ended(**values | {"failure": _failure(values["failure"])})


def verdict_from(values: dict[str, Any]) -> Verdict:
    """The reverse of `to_json`."""
    return Verdict(**values | {"failure": _failure(values["failure"])})


def _failure(values: dict[str, Any] | None) -> Failure | None:
    return Failure(**values) if values else None
