"""Clocks and statistics that all measurements share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

FLUSH_BYTES = 512 << 20  # written before every timed call on a GPU: over ten times the L2 of an H100
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
    low, median, high = np.quantile(np.asarray(values), [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 5000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of ``values`` (Efron 1979)."""
    draws = np.random.default_rng(seed).choice(np.asarray(values), (resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.median(draws, axis=1), [tail, 1 - tail])
    return float(low), float(high)


def taking_turns(items: Sequence[T], round_number: int) -> list[T]:
    """The order of a round: every item comes first equally often, and every second time round the other way."""
    start = round_number % len(items)
    order = [*items[start:], *items[:start]]
    return order[::-1] if round_number // len(items) % 2 else order


class Clock:
    """Times one call at a time: with CUDA events on a GPU, its L2 cache overwritten before; else on the wall."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self._is_cuda else 0, dtype=torch.int8, device=device)

    def time(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds and result. On a GPU the flush is still running when the call is made: launches hide behind it."""
        if not self._is_cuda:
            started = time.perf_counter()
            result = function()
            return time.perf_counter() - started, result
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, result


def last_level_cache_bytes() -> int:
    """Bytes of the largest cache of the first core; 0 where Linux does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(text[:-1]) * units[text[-1]] for text in (path.read_text().strip() for path in sizes)), default=0)
