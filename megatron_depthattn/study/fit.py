"""`fit` of a scale study: from the losses of its finished runs to what fit.json holds.

Everything here is a function of its arguments, the seed included. A figure that the runs do not determine is missing,
with the reason: a study of two rungs has differences and little else.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_depthattn.study.bootstrap import Noise, estimate, interval
from megatron_depthattn.study.differences import Clusters, Observation, cluster, paired_differences, reason_no_fall
from megatron_depthattn.study.law import EXPONENTS, FORM, PARAMETERS, Cells, Law, LawFit, fit_law, reason_not_fitted
from megatron_depthattn.study.multiplier import Fitted, Multiplier, multipliers, time_ratio
from megatron_depthattn.study.verdict import budget_differences, sentence, verdict

BAND_POINTS = 20
BAND_MARGIN = 1.25  # how far a band extends beyond the tokens of its rung, as a factor


@dataclass(frozen=True)
class ResampledLaw:
    fit: LawFit
    laws: list[Law]


def fit_study(
    observations: Sequence[Observation],
    *,
    baseline: str,
    time_ratios: Mapping[tuple[str, str], float],
    confidence: float = 0.9,
    resamples: int = 400,
    seed: int = 0,
) -> dict[str, Any]:
    """fit.json of a study: laws, the rung held out, paired differences, multipliers, bands.

    observations: finished runs only. time_ratios: (rung, method) to its seconds per token over the baseline's; where
    one is missing, there are no figures at equal time. They are taken as exact. An end of an interval is None where it
    is open or where a single seed leaves no interval. ValueError for observations that contradict one another.
    """
    clusters = cluster(observations, baseline)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is no share between 0 and 1: set e.g. 0.9")
    needed = math.ceil(2 / (1 - confidence) - 1 - 1e-9)  # an interval ends at the first and the last resample at most
    if resamples < needed:
        raise ValueError(f"{resamples} resamples for intervals of {confidence}: set at least {needed}")
    rng = np.random.default_rng(seed)
    noise = Noise(clusters.keys, clusters.present(), resamples, rng)
    laws = {method: _resample(clusters, method, noise) for method in clusters.losses}
    differences = paired_differences(clusters, baseline, confidence)
    by_seed = Noise(clusters.keys, clusters.present(), resamples, rng, whole_seeds=True)
    found = _multipliers(clusters, baseline, laws[baseline], by_seed, time_ratios, confidence)
    return {
        "baseline": baseline,
        "confidence": confidence,
        "resamples": resamples,
        "num_observations": len(observations),
        "form": FORM,
        "laws": {m: {"refused": of} if isinstance(of, str) else _law(of, confidence) for m, of in laws.items()},
        "held_out": _held_out(observations, clusters, baseline, confidence, resamples, rng),
        "differences": differences,
        "multipliers": found,
        "bands": [
            band for m, of in laws.items() if not isinstance(of, str) for band in _bands(clusters, m, of, confidence)
        ],
    }


def _resample(clusters: Clusters, method: str, noise: Noise) -> ResampledLaw | str:
    """The method's law and its refits to resampled noise, or why there is none."""
    ran = clusters.ran(method)
    sizes, tokens = clusters.sizes[ran], clusters.tokens[ran]
    reason = reason_not_fitted(sizes, tokens)
    if reason:
        return reason
    fit = fit_law(sizes, tokens, clusters.losses[method][ran])
    residuals = np.full(len(ran), math.nan)
    residuals[ran] = fit.residuals
    fitted, cells = fit.law.loss(sizes, tokens), Cells(sizes, tokens)
    drawn = fitted + noise.draw(residuals, fit.dof)[:, ran]
    return ResampledLaw(fit, [cells.fit(losses, [(fit.law.alpha, fit.law.beta)]) for losses in drawn])


def _law(of: ResampledLaw, confidence: float) -> dict[str, Any]:
    value, samples = of.fit.law.unscaled(), [law.unscaled() for law in of.laws]
    found: dict[str, Any] = {
        name: estimate(value[name], np.array([sample[name] for sample in samples]), confidence) for name in PARAMETERS
    }
    found |= {"rmse": of.fit.rmse, "p_misfit": of.fit.misfit_p}
    notes = []
    if of.fit.misses:
        notes.append(
            "the law misses the means of its points by more than seeds explain; its intervals are widened accordingly"
        )
    edges = [name for name in ("alpha", "beta") if not EXPONENTS[0] * 1.01 < value[name] < EXPONENTS[1] * 0.99]
    zeros = [name for name in ("E", "A", "B") if value[name] == 0]
    if edges or zeros:
        notes.append(f"{', '.join(edges + zeros)} at the edge of what is allowed: these runs do not distinguish them")
    return found | ({"note": "; ".join(notes)} if notes else {})


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
    largest = clusters.rungs[-1]
    rest = [o for o in observations if o.rung != largest]
    if not any(o.method == baseline for o in rest):
        return {"refused": f"without the largest rung {largest} no run of {baseline} is left: add rungs"}
    below = cluster(rest, baseline)
    noise = Noise(below.keys, below.present(), resamples, rng)
    methods: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for method in below.losses:
        measured = clusters.of_rung(largest) & clusters.ran(method)
        if not measured.any():
            continue
        of = _resample(below, method, noise)
        if isinstance(of, str):
            left_out[method] = f"without the largest rung {largest}: {of}"
            continue
        methods[method] = []
        size = clusters.sizes[measured]
        for column, tokens in enumerate(np.unique(clusters.tokens[measured])):
            losses = clusters.losses[method][measured & (clusters.tokens == tokens)]
            laws = np.array([law.loss(size[:1], np.array([tokens]))[0] for law in of.laws])
            run = math.sqrt(float(np.mean(of.fit.residuals**2)) / len(losses))
            drawn = laws + run * noise.scale(of.fit.dof) * noise.run[:, column]
            value, mean = float(of.fit.law.loss(size[:1], np.array([tokens]))[0]), float(losses.mean())
            methods[method].append(
                {"tokens": float(tokens), "predicted": estimate(value, drawn, confidence)}
                | {"measured": mean, "missed_by": mean - value}
            )
    if baseline not in methods:
        return {"refused": left_out.get(baseline, f"{baseline} has no run at the largest rung {largest}: run it there")}
    return {"rung": largest, "methods": methods} | ({"left_out": left_out} if left_out else {})


def _multipliers(
    clusters: Clusters,
    baseline: str,
    law: ResampledLaw | str,
    noise: Noise,
    time_ratios: Mapping[tuple[str, str], float],
    confidence: float,
) -> dict[str, Any]:
    others = [m for m in clusters.losses if m != baseline]
    unfit = (
        f"the law of {baseline} cannot be fitted: {law}" if isinstance(law, str) else reason_no_fall(clusters, baseline)
    )
    law_misses = isinstance(law, ResampledLaw) and law.fit.misses
    found: dict[str, Any] = {}
    for method in others:
        entry = found[method] = {
            "verdict": verdict(clusters, baseline, method, confidence, len(others)),
            "budget_differences": budget_differences(clusters, baseline, method, confidence),
        }
        ratio: float | str = ""
        if not clusters.ran(baseline, method).any():
            entry["refused"] = f"no run of {method} shares rung, budget and seed with one of {baseline}"
        elif unfit:
            entry["refused"] = unfit
        else:
            assert isinstance(law, ResampledLaw)
            of = multipliers(clusters, baseline, method, law.fit.law, law.laws, noise)
            ratio = time_ratio(time_ratios, of.common.rungs, method)
            entry |= _multiplier_figures(of, method, baseline, time_ratios, confidence)
        entry["sentence"] = sentence(entry, baseline, confidence, ratio, law_misses)
    return found


def _multiplier_figures(
    of: Fitted, method: str, baseline: str, time_ratios: Mapping[tuple[str, str], float], confidence: float
) -> dict[str, Any]:
    if not math.isfinite(of.common.value):
        return {
            "refused": f"{method} lies below what the law of {baseline} reaches at its sizes with any number of "
            "tokens: see the differences"
        }

    def both(one: Multiplier) -> dict[str, Any]:
        ratio = time_ratio(time_ratios, one.rungs, method)
        return {"equal_tokens": one.figure(confidence), "equal_time": _timed(one, ratio, confidence)}

    return both(of.common) | {
        "rungs": {rung: both(one) for rung, one in of.by_rung.items() if math.isfinite(one.value)},
        "budgets": {f"{budget:g}": both(one) for budget, one in of.by_budget.items() if math.isfinite(one.value)},
        "p_rungs": of.p_rungs,
        "p_budgets": of.p_budgets,
    }


def _timed(of: Multiplier, ratio: float | str, confidence: float) -> dict[str, Any]:
    return {"refused": ratio} if isinstance(ratio, str) else of.figure(confidence, ratio)


def _bands(clusters: Clusters, method: str, of: ResampledLaw, confidence: float) -> list[dict[str, Any]]:
    """The method's law with its interval (of the law, not of runs), at each rung on which it ran."""
    bands = []
    for rung in clusters.rungs:
        here = clusters.of_rung(rung) & clusters.ran(method)
        if not here.any():
            continue
        seen, size = clusters.tokens[here], clusters.sizes[here][:1]
        tokens = np.geomspace(seen.min() / BAND_MARGIN, seen.max() * BAND_MARGIN, BAND_POINTS)
        drawn = np.stack([law.loss(size, tokens) for law in of.laws])
        ends = [interval(column, confidence) for column in drawn.T]
        bands.append(
            {"method": method, "rung": rung, "size": float(size[0]), "tokens": tokens.tolist()}
            | {
                "value": of.fit.law.loss(size, tokens).tolist(),
                "low": [e[0] for e in ends],
                "high": [e[1] for e in ends],
            }
        )
    return bands
