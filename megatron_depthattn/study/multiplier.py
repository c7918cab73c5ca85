"""The effective compute multiplier of a method over the baseline.

The model: at size N and D tokens the method has the loss that the baseline's law has at mu D tokens,

    loss_m(N, D) = L(N, mu_m D),    so    loss_m - loss_baseline = t B / D^beta,    t = mu^-beta - 1.

At a fixed size training compute is proportional to tokens, so mu is also the multiplier of compute as far as a token
costs both the same; what it costs in time is the second figure, mu / (seconds per token over the baseline's).

t is fitted to the paired differences by least squares over the pairs (it is linear, so it has a closed form), with
B / D^beta from the law of the baseline alone. In a difference the noise that a pair shares cancels, and so does what
the law misses of a rung; the law only says what a difference is worth in tokens. One t over all rungs, and one a rung.
The intervals redraw both, the law and the differences (`bootstrap.Noise`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy.stats import f as f_distribution

from megatron_depthattn.study.bootstrap import Noise, estimate
from megatron_depthattn.study.differences import Clusters
from megatron_depthattn.study.law import Floats, Law

Group = TypeVar("Group")


@dataclass(frozen=True)
class Multiplier:
    """mu at equal tokens over the pairs of `rungs`; samples [resamples], None where one seed leaves no noise to draw.

    An infinite value or sample: below what the baseline's law reaches with any number of tokens.
    """

    rungs: tuple[str, ...]
    pairs: int
    value: float
    samples: Floats | None

    def figure(self, confidence: float, ratio: float = 1.0) -> dict[str, Any]:
        if self.samples is None:
            return {"value": self.value / ratio, "low": None, "high": None}
        return estimate(self.value / ratio, self.samples / ratio, confidence)


def _multiplier(shift: Floats, beta: Floats | float) -> Floats:
    """mu of t = mu^-beta - 1; infinite where t <= -1."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(1 + shift > 0, np.power(np.maximum(1 + shift, 0), -1 / beta), np.inf)


def _shift(term: Floats, difference: Floats) -> Floats:
    """t of least squares over the last axis; infinite where the law does not fall with tokens."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sum(term * difference, axis=-1) / np.sum(term * term, axis=-1)


class Fitted(NamedTuple):
    """A method's multipliers; p of the F test that one mu holds for all groups, None with one group."""

    common: Multiplier
    by_rung: dict[str, Multiplier]
    p_rungs: float | None
    by_budget: dict[float, Multiplier]
    p_budgets: float | None


def multipliers(clusters: Clusters, baseline: str, method: str, law: Law, resampled: list[Law], noise: Noise) -> Fitted:
    """Over all pairs, by rung and by token budget."""
    ran = clusters.ran(baseline, method)
    difference = clusters.losses[method] - clusters.losses[baseline]
    term = law.token_term(clusters.tokens)
    drawn_terms = np.stack([drawn.token_term(clusters.tokens) for drawn in resampled])
    betas = np.array([drawn.beta for drawn in resampled])
    of_rungs = {rung: here for rung in clusters.rungs if (here := ran & clusters.of_rung(rung)).any()}
    of_budgets = {budget: here for budget in clusters.budgets if (here := ran & clusters.of_budget(budget)).any()}

    def fit(groups: Mapping[Group, np.ndarray]) -> tuple[dict[Group, Multiplier], float, int]:
        fitted, dof = np.full(len(ran), math.nan), int(ran.sum()) - len(groups)
        shifts = {name: _shift(term[here], difference[here]) for name, here in groups.items()}
        for name, here in groups.items():
            fitted[here] = shifts[name] * term[here]
        residuals = difference - fitted
        blocks = clusters.num_blocks(ran)
        free = blocks - len(groups)  # budgets of one seed are not counted as replicates: see bootstrap.py
        drawn = noise.draw(residuals * math.sqrt(blocks / free), free) if free > 0 else None
        found = {}
        for name, here in groups.items():
            samples = None
            if drawn is not None and clusters.num_blocks(here) > 1:  # one seed says nothing of its noise
                samples = _multiplier(_shift(drawn_terms[:, here], fitted[here] + drawn[:, here]), betas)
            value = float(_multiplier(shifts[name], law.beta))
            rungs = tuple(rung for rung, of in of_rungs.items() if (of & here).any())
            found[name] = Multiplier(rungs, int(here.sum()), value, samples)
        return found, float(np.nansum(residuals**2)), dof

    common, common_square, common_dof = fit({"all": ran})

    def split(groups: Mapping[Group, np.ndarray]) -> tuple[dict[Group, Multiplier], float | None]:
        found, square, dof = fit(groups)
        if not (common_dof > dof > 0 and square > 0):
            return found, None
        ratio = (common_square - square) / (common_dof - dof) / (square / dof)
        return found, float(f_distribution.sf(ratio, common_dof - dof, dof))

    return Fitted(common["all"], *split(of_rungs), *split(of_budgets))


def time_ratio(ratios: Mapping[tuple[str, str], float], rungs: tuple[str, ...], method: str) -> float | str:
    """Seconds per token over the baseline's, the geometric mean over the rungs; or why there is none."""
    missing = [rung for rung in rungs if (rung, method) not in ratios]
    if missing:
        return f"no step time of {method} beside the baseline's at {', '.join(missing)}: time it there"
    return math.exp(sum(math.log(ratios[rung, method]) for rung in rungs) / len(rungs))
