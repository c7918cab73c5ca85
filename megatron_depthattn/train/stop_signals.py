"""Signals that ask a run to stop, wherever it is.

Until something has been trained, the process that gets one ends at once: there is nothing to save. From then on
a signal is only noted; a rank that stopped by itself would leave the others in a collective. The loop agrees with all
ranks on each training step and each batch of an evaluation (`data.StopAgreement`), and saves.

Python runs a signal's handler in the main thread, when that comes back from C: not while it waits for another rank or
a dead disk. So a thread reads the signals too, through `signal.set_wakeup_fd`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

from megatron_depthattn.train.errors import leave_at_once

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""SIGTERM and SIGUSR1/2 come from schedulers before a time limit or a preemption, SIGINT from Ctrl-C, SIGHUP from a
lost terminal."""

EXIT_REQUEUE = 75
"""Exit code after a stop by signal, what was trained saved: start the same command again (EX_TEMPFAIL of
sysexits.h)."""


class StopSignals:
    """What this process does on a stop signal, from here to its end; construct it in the main thread, once.

    Args:
        rank: for the line that says why the process ends.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.received = 0
        """Number of the last signal; 0: none."""
        self.nothing_to_save = True
        """Until the first step begins."""
        self._ends_at_once, self._leaving = True, threading.Lock()
        numbers, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: started by nohup
                signal.signal(number, self._note)
        threading.Thread(target=self._listen, args=(numbers,), name="stop signals", daemon=True).start()

    def only_note(self) -> None:
        """From now on the loop is to ask for signals, which end nothing by themselves any more."""
        self._ends_at_once = False

    def leave(self, number: int) -> NoReturn:
        """End this process after a signal that came before anything was trained."""
        self._leaving.acquire()  # never released: only one thread ends the process
        name = signal.Signals(number).name
        line = f"stopped by {name} before the first step, nothing to save: start the same command again"
        print(f"{line} (rank {self.rank})", file=sys.stderr, flush=True)
        leave_at_once(EXIT_REQUEUE)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number

    def _listen(self, numbers: int) -> None:
        while True:
            for number in os.read(numbers, 1):
                if number in STOP_SIGNALS and self._ends_at_once:
                    self.leave(number)
