"""`fit` of a scale study: from the losses of its finished runs to what fit.json holds.

Everything here is a function of its arguments, the seed included. A figure that the runs do not determine is missing,
with the reason: a study of two rungs has differences and little else.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_depthattn.study.bootstrap import Noise, estimate
from megatron_depthattn.study.conclusion import budget_differences, conclusion, sentence
from megatron_depthattn.study.differences import Clusters, Observation, cluster, paired_differences, reason_no_fall
from megatron_depthattn.study.law import EXPONENTS, FORM, Cells, Law, LawFit, fit_law, reason_not_fitted
from megatron_depthattn.study.multiplier import multipliers

Resampled = tuple[LawFit, Law]
"""A method's law, and its refits to resampled noise as one law of arrays."""


def fit_study(
    observations: Sequence[Observation],
    *,
    baseline: str,
    time_ratios: Mapping[tuple[str, str], float],
    confidence: float = 0.9,
    resamples: int = 400,
    seed: int = 0,
) -> dict[str, Any]:
    """fit.json of a study: laws, the rung held out, paired differences, multipliers.

    observations: finished runs only. time_ratios: (rung, method) to its seconds per token over the baseline's; where
    one is missing, there are no figures at equal time. They are taken as exact. An end of an interval is None where it
    is open or where a single seed leaves no interval. ValueError for observations that contradict one another.
    """
    clusters = cluster(observations, baseline)
    needed = math.ceil(2 / (1 - confidence) - 1 - 1e-9)  # an interval ends at the first and the last resample at most
    if resamples < needed:
        raise ValueError(f"{resamples} resamples for intervals of {confidence}: set at least {needed}")
    rng = np.random.default_rng(seed)
    noise = Noise(clusters, resamples, rng)
    laws = {method: _resample(clusters, method, noise) for method in clusters.losses}
    by_seed = Noise(clusters, resamples, rng, whole_seeds=True)
    return {
        "baseline": baseline,
        "confidence": confidence,
        "resamples": resamples,
        "num_observations": len(observations),
        "form": FORM,
        "laws": {m: {"reason": of} if isinstance(of, str) else _law(*of, confidence) for m, of in laws.items()},
        "held_out": _held_out(observations, clusters, baseline, confidence, resamples, rng),
        "differences": paired_differences(clusters, baseline, confidence),
        "multipliers": _multipliers(clusters, baseline, laws[baseline], by_seed, time_ratios, confidence),
    }


def _resample(clusters: Clusters, method: str, noise: Noise) -> Resampled | str:
    """The method's law and its refits, or why there is none."""
    ran = clusters.ran(method)
    sizes, tokens = clusters.sizes[ran], clusters.tokens[ran]
    reason = reason_not_fitted(sizes, tokens)
    if reason:
        return reason
    fit = fit_law(sizes, tokens, clusters.losses[method][ran])
    residuals = np.full(len(ran), math.nan)
    residuals[ran] = fit.residuals
    drawn = fit.law.loss(sizes, tokens) + noise.draw(residuals, fit.dof)[:, ran]
    cells, start = Cells(sizes, tokens), [(fit.law.alpha, fit.law.beta)]
    return fit, Law(*np.array([cells.fit(losses, start) for losses in drawn]).T[:, :, None])


def _law(fit: LawFit, resampled: Law, confidence: float) -> dict[str, Any]:
    value, notes = fit.law._asdict(), []
    if fit.misses:
        notes.append(
            "the law misses the means of its points by more than seeds explain; its intervals are widened accordingly"
        )
    edges = [name for name in ("alpha", "beta") if not EXPONENTS[0] * 1.01 < value[name] < EXPONENTS[1] * 0.99]
    edges += [name for name in ("E", "A", "B") if value[name] == 0]
    if edges:
        notes.append(f"{', '.join(edges)} at the edge of what is allowed: these runs do not distinguish them")
    found: dict[str, Any] = {
        name: estimate(value[name], samples[:, 0], confidence) for name, samples in resampled._asdict().items()
    }
    return found | {"rmse": fit.rmse, "p_misfit": fit.misfit_p} | ({"note": "; ".join(notes)} if notes else {})


def _held_out(
    observations: Sequence[Observation],
    clusters: Clusters,
    baseline: str,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Laws refitted without the largest rung, and how far its cells' means lie from what they predict.

    The interval is of the mean of as many new runs as were measured: the law's uncertainty and the runs' noise.
    """
    largest = clusters.rung[-1]
    rest = [o for o in observations if o.rung != largest]
    if not any(o.method == baseline for o in rest):
        return {"reason": f"without the largest rung {largest} no run of {baseline} is left: add rungs"}
    below = cluster(rest, baseline)
    noise = Noise(below, resamples, rng)
    methods: dict[str, Any] = {}
    for method in below.losses:
        measured = clusters.by_budget((clusters.rung == largest) & clusters.ran(method)).values()
        of = _resample(below, method, noise) if measured else "no run of it there"
        if isinstance(of, str):
            if method == baseline:
                return {"reason": f"{baseline} is not predicted at the largest rung {largest} by the others: {of}"}
            continue
        fit, resampled = of
        methods[method] = []
        for column, here in enumerate(measured):
            at, losses = (clusters.sizes[here][:1], clusters.tokens[here][:1]), clusters.losses[method][here]
            run = math.sqrt(float(np.mean(fit.residuals**2)) / len(losses))
            drawn = resampled.loss(*at)[:, 0] + run * noise.scale(fit.dof) * noise.run[:, column]
            value, mean = float(fit.law.loss(*at)[0]), float(losses.mean())
            methods[method].append(
                {"tokens": float(at[1][0]), "predicted": estimate(value, drawn, confidence)}
                | {"measured": mean, "missed_by": mean - value}
            )
    return {"rung": str(largest), "methods": methods}


def _multipliers(
    clusters: Clusters,
    baseline: str,
    law: Resampled | str,
    noise: Noise,
    time_ratios: Mapping[tuple[str, str], float],
    confidence: float,
) -> dict[str, Any]:
    """Of every method: its conclusion, differences by budget and multipliers, or why it has none."""
    found: dict[str, Any] = {}
    for method in [m for m in clusters.losses if m != baseline]:
        entry = found[method] = {
            "conclusion": conclusion(clusters, baseline, method, confidence, len(clusters.losses) - 1),
            "budget_differences": budget_differences(clusters, baseline, method, confidence),
        }
        if not entry["budget_differences"]:
            entry["reason"] = f"no run of {method} shares rung, budget and seed with one of {baseline}"
        elif isinstance(law, str):
            entry["reason"] = f"the law of {baseline} cannot be fitted: {law}"
        elif reason := reason_no_fall(clusters, baseline):
            entry["reason"] = reason
        else:
            fit, resampled = law
            entry |= multipliers(clusters, baseline, method, fit.law, resampled, noise, time_ratios, confidence)
        entry["sentence"] = sentence(entry, baseline, confidence, not isinstance(law, str) and law[0].misses)
    return found
