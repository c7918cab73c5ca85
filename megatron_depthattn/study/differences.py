"""Runs of a study side by side: what ran in the same rung, token budget and seed, and how far methods differ there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import linregress
from scipy.stats import t as student

from megatron_depthattn.study.law import Floats


class Observation(NamedTuple):
    """One finished run. size: N, weights of the rung without the embedding table, the same for all its methods;
    tokens: D; loss: held-out, nats per token."""

    rung: str
    method: str
    seed: int
    size: float
    tokens: float
    tokens_per_parameter: float
    loss: float


@dataclass(frozen=True)
class Clusters:
    """Runs by cluster (rung, token budget, seed), in order of size, tokens and seed: arrays [clusters], the losses of
    each method in nats, NaN where it did not run."""

    rung: np.ndarray
    budget: Floats
    seed: np.ndarray
    sizes: Floats
    tokens: Floats
    losses: dict[str, Floats]

    def by_rung(self, of: np.ndarray) -> dict[str, np.ndarray]:
        """The rungs of these clusters, by size, with those of each; `of` and values as masks [clusters]."""
        return {rung: of & (self.rung == rung) for rung in dict.fromkeys(self.rung[of].tolist())}

    def by_budget(self, of: np.ndarray) -> dict[float, np.ndarray]:
        """The same of token budgets, ascending."""
        return {budget: of & (self.budget == budget) for budget in sorted({*self.budget[of].tolist()})}

    def ran(self, *methods: str) -> np.ndarray:
        """[clusters]: whether all of the methods ran."""
        return np.all([np.isfinite(self.losses[method]) for method in methods], axis=0)

    def num_blocks(self, of: np.ndarray) -> int:
        """How many (rung, seed) these clusters hold: what replicates a study, for budgets share a seed."""
        return len({*zip(self.rung[of].tolist(), self.seed[of].tolist(), strict=True)})


def cluster(observations: Sequence[Observation], baseline: str) -> Clusters:
    """ValueError for what cannot be paired: no run of the baseline, or sizes or tokens that differ in a cell."""
    methods = sorted({o.method for o in observations}, key=lambda method: (method != baseline, method))
    if baseline not in methods:
        raise ValueError(
            f"no finished run of the baseline {baseline!r} among {methods}: run it, or name another baseline"
        )
    cells: dict[tuple[str, float], tuple[float, float]] = {}
    for o in observations:
        first = cells.setdefault((o.rung, o.tokens_per_parameter), (o.size, o.tokens))
        if first != (o.size, o.tokens):
            raise ValueError(
                f"{o.rung}, {o.tokens_per_parameter:g} tokens per weight: size and tokens of {o.method} are "
                f"{(o.size, o.tokens)}, of other runs {first}; give its methods one batch and sequence length"
            )
    losses = {(o.rung, o.tokens_per_parameter, o.seed, o.method): o.loss for o in observations}
    keys = sorted({key[:3] for key in losses}, key=lambda key: (*cells[key[:2]], key[0], key[2]))
    rung, budget, seed = (np.array(of) for of in zip(*keys, strict=True))
    sizes, tokens = np.array([cells[key[:2]] for key in keys], np.float64).T
    table = {m: np.array([losses.get((*key, m), math.nan) for key in keys]) for m in methods}
    return Clusters(rung, budget, seed, sizes, tokens, table)


def paired_differences(clusters: Clusters, baseline: str, confidence: float) -> list[dict[str, Any]]:
    """`differences` of fit.json: each method's loss less the baseline's, by rung and budget, seed by seed.

    Noise that a pair shares is not in its difference. No correction for the number of rows.
    """
    rows = []
    for method in [m for m in clusters.losses if m != baseline]:
        for rung, of_rung in clusters.by_rung(clusters.ran(baseline, method)).items():
            for budget, here in clusters.by_budget(of_rung).items():
                base, loss = clusters.losses[baseline][here], clusters.losses[method][here]
                columns = (of.tolist() for of in (clusters.seed[here], base, loss, loss - base))
                keys = ("seed", "baseline", "loss", "difference")
                pairs = [dict(zip(keys, pair, strict=True)) for pair in zip(*columns, strict=True)]
                row = {"rung": rung, "tokens_per_parameter": budget, "tokens": float(clusters.tokens[here][0])}
                rows.append(row | {"method": method, "pairs": pairs} | mean_difference([loss - base], confidence))
    return rows


def mean_difference(parts: Sequence[Floats], confidence: float) -> dict[str, float | None]:
    """Mean over rungs of the means of their pairs; Student's t interval from the scatter of seeds within rungs."""
    mean, dof = float(np.mean([part.mean() for part in parts])), sum(len(part) - 1 for part in parts)
    if dof == 0:
        return {"mean": mean, "low": None, "high": None}
    square = sum(float(((part - part.mean()) ** 2).sum()) for part in parts) / dof
    error = math.sqrt(square * sum(1 / len(part) for part in parts)) / len(parts)
    half = float(student.ppf((1 + confidence) / 2, dof)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half}


def reason_no_fall(clusters: Clusters, baseline: str) -> str | None:
    """Why the baseline's runs do not show that more tokens lower its loss; None if they do (one-sided t, 5 %).

    The regression of loss on log tokens within rungs: without a fall no number of tokens is worth a difference of loss.
    """
    rungs = clusters.by_rung(clusters.ran(baseline)).values()
    log_tokens, losses = (
        np.concatenate([of[here] - of[here].mean() for here in rungs])
        for of in (np.log(clusters.tokens), clusters.losses[baseline])
    )
    dof = len(losses) - len(rungs) - 1
    if dof < 1 or not np.ptp(log_tokens) > 0:
        return f"{baseline} has no rung with two token budgets and runs to spare: what tokens are worth is not measured"
    line = linregress(log_tokens, losses)
    # linregress counts one mean taken out where each rung had its own
    error = line.stderr * math.sqrt(max(len(losses) - 2, 1) / dof)
    if line.slope + student.ppf(0.95, dof) * error < 0:
        return None
    return (
        f"the loss of {baseline} does not fall with tokens beyond its noise ({line.slope:+.4f} nats for e times the "
        f"tokens, standard error {error:.4f}): train longer or over a wider range of budgets"
    )
