"""Waits that end, and say for whom: torch's store waits without a limit for a process that is stopped."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import TypeVar

from megatron_depthattn.terminal import printable

T = TypeVar("T")
SAID_AFTER = 15.0
"""Seconds of waiting after which a process says for whom."""


class WaitedInVain(TimeoutError):
    """Raised by `within`, and by nothing that it calls."""


@contextmanager
def announced(who: str, whom: Callable[[], str], seconds: float | None = None) -> Iterator[None]:
    """While it takes long, one line on stderr says for whom this process waits, and how long it will, where given."""

    def say() -> None:
        limit = f", until {seconds:g} s have passed" if seconds is not None else ""
        print(printable(f"{who}: waiting for {whom()}{limit}"), file=sys.stderr, flush=True)

    timer = threading.Timer(SAID_AFTER, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def within(seconds: float, who: str, whom: Callable[[], str], call: Callable[[], T]) -> T:
    """What ``call`` returns or raises; its thread is left behind when it takes longer.

    Raises:
        WaitedInVain: it takes longer than ``seconds``.
    """
    outcome: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="wait", daemon=True).start()
    with announced(who, whom, seconds):
        futures.wait([outcome], seconds)
    if not outcome.done():
        raise WaitedInVain(f"{who} has waited {seconds:g} s in vain for {whom()}")
    return outcome.result()
