"""Statistics that all measurements share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

T = TypeVar("T")


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def text(self, unit: float = 1.0, digits: int = 2) -> str:
        """``median (lower to upper quartile)`` in multiples of ``unit``."""
        median, low, high = (f"{value / unit:.{digits}f}" for value in self)
        return f"{median} ({low} to {high})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of measured values."""
    return Spread(*np.quantile(values, [0.5, 0.25, 0.75]).tolist())


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap interval (95 %) of the median of ``values`` (Efron 1979); seeded."""
    medians = np.median(np.random.default_rng(0).choice(values, (5000, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975]).tolist()
    return low, high


def taking_turns(items: Sequence[T], round_number: int) -> list[T]:
    """The order of a round: every item comes first equally often, and every second time round the other way."""
    start = round_number % len(items)
    order = [*items[start:], *items[:start]]
    return order[::-1] if round_number // len(items) % 2 else order


def device_clock(device: torch.device) -> Callable[[], float]:
    """Seconds, when the device has done what it was given: CPU time of the process on a CPU with one thread, which
    other processes hardly change; else the wall's."""
    if device.type == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now
