"""Runs with the same weights and the same batches in two precisions, compared: paired gaps, cosines, what is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WINDOWS = 30
"""Into so many windows the steps of a run are cut: gaps are those of the mean loss in a window."""
TAIL = 0.2
"""The share of the windows, at the end, that is judged."""


class Gap(NamedTuple):
    """Relative gaps of the loss to the base's, over windows of steps and over seeds."""

    mean: float
    """Over the tail's windows and all seeds."""
    low: float
    high: float
    """Least and largest of them."""
    largest: float
    """The gap that is farthest from 0 in any window of any seed, the tail's or not."""
    largest_step: int
    """Last step of that window."""

    @property
    def worst(self) -> float:
        """The tail's gap that is farthest from 0, without its sign."""
        return float(np.abs([self.low, self.high]).max())


class Cosine(NamedTuple):
    """Cosines between two gradients."""

    model: float
    """Of all parameters as one vector."""
    worst: float
    """The least of a single parameter's."""
    worst_parameter: str


def window_size(steps: int) -> int:
    """Steps of one window; windows end with the last step, and steps before the first whole one are left out."""
    return max(1, steps // WINDOWS)


def num_tail_windows(steps: int) -> int:
    """Windows that are judged."""
    return max(1, round(TAIL * (steps // window_size(steps))))


def paired_gap(own: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Gap:
    """Gaps of losses ``[seeds, steps]``; the runs of one place have the same seed."""
    steps = len(own[0])
    size = window_size(steps)

    def means(runs: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
        return np.asarray(runs, np.float64)[:, steps % size :].reshape(len(runs), -1, size).mean(axis=2)

    gaps = means(own) / means(base) - 1
    tail = gaps[:, -num_tail_windows(steps) :]
    seed, window = np.unravel_index(np.abs(gaps).argmax(), gaps.shape)
    ends = steps % size + size * (int(window) + 1)
    return Gap(float(tail.mean()), float(tail.min()), float(tail.max()), float(gaps[seed, window]), ends)


def gradient_cosine(own: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Cosine:
    """Cosines in fp64 over the parameters that both have by the same name and that have a gradient in the base.

    Layers of another spec name some norms otherwise: those are left out.
    """
    products, cosines = torch.zeros(3, dtype=torch.float64), {}
    for name in (name for name in base if name in own):
        x, y = own[name].double().flatten(), base[name].double().flatten()
        sums = torch.stack([x @ y, x @ x, y @ y]).cpu()
        products += sums
        if sums[2] > 0:
            cosines[name] = _cosine(sums)
    worst = min(cosines, key=lambda name: cosines[name])
    return Cosine(_cosine(products), cosines[worst], worst)


def _cosine(sums: Tensor) -> float:
    """Of (x·y, x·x, y·y); 0 where x is zero."""
    return float(sums[0] / (sums[1].sqrt() * sums[2].sqrt())) if sums[1] > 0 else 0.0


def over(
    gap: Gap, cosines: Sequence[float], exported: Sequence[float], *, tolerance: float, least_cosine: float
) -> list[str]:
    """What is over its bound, in words; nothing: the setting is within the tolerance. NaN is over.

    Args:
        cosines: of the whole gradient of the first step, one a seed.
        exported: relative gaps of the exported model's held-out loss to the one in training precision, one a seed.
        tolerance: largest relative gap of a loss, in every judged window and in every export.
        least_cosine: least cosine of the whole gradient.
    """
    found = []
    if not gap.worst <= tolerance:
        found.append(f"loss gap {gap.worst:.2%} over {tolerance:.2%}")
    if not all(cosine >= least_cosine for cosine in cosines):
        found.append(f"gradient cosine {min(cosines):.4f} under {least_cosine}")
    if not all(abs(value) <= tolerance for value in exported):
        found.append(f"exported model {max(exported, key=abs):+.2%}, over {tolerance:.2%}")
    return found
