"""Signals that ask a run to stop: noted here, agreed upon by all ranks at the end of a step."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""SIGTERM and SIGUSR1/2 come from schedulers before a time limit or a preemption, SIGINT from Ctrl-C, SIGHUP from a
lost terminal."""

EXIT_REQUEUE = 75
"""Exit code after a stop by signal, the state saved: start the same command again (EX_TEMPFAIL of sysexits.h)."""


class StopSignals:
    """Notes the last stop signal that this process got, in place of what the signal would do.

    A rank must not stop by itself: the others would wait for it in the next collective. So a signal changes nothing but
    `received`, and the loop asks all ranks at every step's end.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the last signal; 0: none."""
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number

    def close(self) -> None:
        """Put back what the signals did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
