"""The effective compute multiplier of a method over the baseline.

The model: at size N and D tokens the method has the loss that the baseline's law has at mu D tokens,

    loss_m(N, D) = L(N, mu_m D),    so    loss_m - loss_baseline = t B / D^beta,    t = mu^-beta - 1.

At a fixed size training compute is proportional to tokens, so mu is also the multiplier of compute as far as a token
costs both the same; what it costs in time is the second figure, mu / (seconds per token over the baseline's).

t is fitted to the paired differences by least squares over the pairs (it is linear, so it has a closed form), with
B / D^beta from the law of the baseline alone. In a difference the noise that a pair shares cancels, and so does what
the law misses of a rung; the law only says what a difference is worth in tokens. One t over all rungs, one a rung and
one a budget. The intervals redraw both, the law and the differences (`bootstrap.Noise`).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import f as f_distribution

from megatron_depthattn.study.bootstrap import Noise, estimate
from megatron_depthattn.study.differences import Clusters
from megatron_depthattn.study.law import Floats, Law


def _multiplier(shift: Floats, beta: Floats | float) -> Floats:
    """mu of t = mu^-beta - 1; infinite where t <= -1: below what the law reaches with any number of tokens."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(1 + shift > 0, np.power(np.maximum(1 + shift, 0), -1 / beta), np.inf)


def _shift(term: Floats, difference: Floats) -> Floats:
    """t of least squares over the last axis; infinite where the law does not fall with tokens."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sum(term * difference, axis=-1) / np.sum(term * term, axis=-1)


def multipliers(
    clusters: Clusters,
    baseline: str,
    method: str,
    law: Law,
    resampled: Law,
    noise: Noise,
    time_ratios: Mapping[tuple[str, str], float],
    confidence: float,
) -> dict[str, Any]:
    """`equal_tokens` and `equal_time` over all pairs and of each of `rungs` and `budgets`, without those below the
    law's floor; `p_rungs`, `p_budgets`: of the F test that one mu holds for all, None with one group."""
    ran = clusters.ran(baseline, method)
    difference, blocks = clusters.losses[method] - clusters.losses[baseline], clusters.num_blocks(ran)
    term, drawn_terms = law.token_term(clusters.tokens), resampled.token_term(clusters.tokens)

    def fit(groups: Mapping[Any, np.ndarray]) -> tuple[dict[Any, Any], float, int]:
        """(Figures of each group, sum of squares of the pairs about them, its degrees of freedom)."""
        shifts, fitted = {name: _shift(term[here], difference[here]) for name, here in groups.items()}, np.copy(term)
        for name, here in groups.items():
            fitted[here] *= shifts[name]
        residuals = difference - fitted
        free = blocks - len(groups)  # budgets of one seed are not counted as replicates: see bootstrap.py
        drawn = noise.draw(residuals * math.sqrt(blocks / free), free) if free > 0 else None
        found = {}
        for name, here in groups.items():
            samples = None
            if drawn is not None and clusters.num_blocks(here) > 1:  # one seed says nothing of its noise
                shift = _shift(drawn_terms[:, here], fitted[here] + drawn[:, here])
                samples = _multiplier(shift, resampled.beta[:, 0])
            figure = estimate(float(_multiplier(shifts[name], law.beta)), samples, confidence)
            timed = _at_equal_time(figure, [*clusters.by_rung(here)], method, time_ratios)
            found[name] = {"equal_tokens": figure, "equal_time": timed}
        figures = {name: of for name, of in found.items() if math.isfinite(of["equal_tokens"]["value"])}
        return figures, float(np.nansum(residuals[ran] ** 2)), int(ran.sum()) - len(groups)

    common, common_square, common_dof = fit({"all": ran})
    if not common:
        reason = "at its sizes with any number of tokens: see the differences"
        return {"reason": f"{method} lies below what the law of {baseline} reaches {reason}"}
    found: dict[str, Any] = common["all"]
    for kind, groups in (("rungs", clusters.by_rung(ran)), ("budgets", clusters.by_budget(ran))):
        figures, square, dof = fit(groups)
        p = None
        if common_dof > dof > 0 and square > 0:
            ratio = (common_square - square) / (common_dof - dof) / (square / dof)
            p = float(f_distribution.sf(ratio, common_dof - dof, dof))
        named = {name if kind == "rungs" else f"{name:g}": of for name, of in figures.items()}
        found |= {kind: named, f"p_{kind}": p}
    return found


def _at_equal_time(
    figure: Mapping[str, float | None], rungs: list[str], method: str, ratios: Mapping[tuple[str, str], float]
) -> dict[str, Any]:
    """The figure over the seconds per token over the baseline's, the geometric mean over the rungs."""
    missing = [rung for rung in rungs if (rung, method) not in ratios]
    if missing:
        return {"reason": f"no step time of {method} beside the baseline's at {', '.join(missing)}: time it there"}
    ratio = math.exp(sum(math.log(ratios[rung, method]) for rung in rungs) / len(rungs))
    return {key: None if value is None else value / ratio for key, value in figure.items()}
