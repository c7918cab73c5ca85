"""Where ranks agree to stop: before each training step and each batch of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_depthattn.train.data import GlobalBatches
from megatron_depthattn.train.exchange import RankStatus, exchange
from megatron_depthattn.train.stop_signals import StopSignals

LOOK_SECONDS = 0.5
"""How long a rank waits for its data before it asks the others whether to stop."""


class StopAgreement:
    """Whether all ranks compute the next global batch; ``stop_signal`` says why they do not.

    In the steady state nothing is sent for it: ranks say in a step's own exchange whether they were asked to stop and
    have their next batch, and where none was and all have it, the next step begins. A signal that comes after that
    exchange is obeyed one step later.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.stop_signal = 0
        self._signals = signals
        self._agreed_on: GlobalBatches | None = None

    def may_continue(self, batches: GlobalBatches) -> bool:
        """Wait for all ranks' next global batch; false if one of them was asked to stop.

        They ask each other again while a rank waits for its data, which may never come.
        """
        agreed_on, self._agreed_on = self._agreed_on, None
        if agreed_on is batches:
            return True
        while not self.stop_signal:
            is_here = batches.wait(0.0 if self._signals.received else LOOK_SECONDS)
            ranks = exchange([self._signals.received, is_here])
            self.stop_signal = round(max(received for received, _ in ranks))
            if not self.stop_signal and all(here for _, here in ranks):
                return True
        return False

    def note(self, ranks: Sequence[RankStatus], batches: GlobalBatches) -> None:
        """Take what ranks said in a step's exchange as their answers about the next of ``batches``."""
        is_agreed = all(rank.has_next_batch and not rank.signal for rank in ranks)
        self._agreed_on = batches if is_agreed else None

    def ask_again(self) -> None:
        """Forget the answers: what came after them took long."""
        self._agreed_on = None
