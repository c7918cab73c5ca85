"""Runs of a study side by side: what ran in the same rung, token budget and seed, and how far methods differ there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import linregress
from scipy.stats import t as student

from megatron_depthattn.study.law import Floats

FALL_LEVEL = 0.05


@dataclass(frozen=True)
class Observation:
    """One finished run. size: N, weights of the rung without the embedding table, the same for all its methods;
    tokens: D; loss: held-out, nats per token."""

    rung: str
    method: str
    seed: int
    size: float
    tokens: float
    loss: float
    tokens_per_parameter: float


@dataclass(frozen=True)
class Clusters:
    """Runs by cluster (rung, token budget, seed), in order of size, tokens and seed; losses [clusters] of each method
    in nats, NaN where it did not run."""

    keys: list[tuple[str, float, int]]
    sizes: Floats
    tokens: Floats
    losses: dict[str, Floats]

    @property
    def rungs(self) -> list[str]:
        """By size."""
        return list(dict.fromkeys(rung for rung, _, _ in self.keys))

    def of_rung(self, rung: str) -> np.ndarray:
        return np.array([key[0] == rung for key in self.keys])

    @property
    def budgets(self) -> list[float]:
        """Tokens per weight, ascending."""
        return sorted({budget for _, budget, _ in self.keys})

    def of_budget(self, budget: float) -> np.ndarray:
        return np.array([key[1] == budget for key in self.keys])

    def ran(self, *methods: str) -> np.ndarray:
        """[clusters]: whether all of the methods ran."""
        return np.all([np.isfinite(self.losses[method]) for method in methods], axis=0)

    def num_blocks(self, of: np.ndarray) -> int:
        """How many (rung, seed) the clusters [clusters] hold: what replicates a study, for budgets share a seed."""
        return len({(self.keys[i][0], self.keys[i][2]) for i in np.flatnonzero(of)})

    def present(self) -> list[frozenset[str]]:
        return [frozenset(m for m, of in self.losses.items() if np.isfinite(of[i])) for i in range(len(self.keys))]


def cluster(observations: Sequence[Observation], baseline: str) -> Clusters:
    """ValueError for what cannot be paired: a run twice, a loss that is none, sizes or tokens that differ in a cell."""
    methods = sorted({o.method for o in observations}, key=lambda method: (method != baseline, method))
    if baseline not in methods:
        raise ValueError(
            f"no finished run of the baseline {baseline!r} among {methods}: run it, or name another baseline"
        )
    cells: dict[tuple[str, float], tuple[float, float]] = {}
    losses: dict[tuple[str, float, int], dict[str, float]] = {}
    for o in observations:
        where = f"{o.rung}/{o.method}/x{o.tokens_per_parameter:g}/seed{o.seed}"
        if not (math.isfinite(o.loss) and o.size > 0 and o.tokens > 0):
            raise ValueError(f"{where}: loss {o.loss}, size {o.size}, tokens {o.tokens}; leave out runs without a loss")
        first = cells.setdefault((o.rung, o.tokens_per_parameter), (o.size, o.tokens))
        if first != (o.size, o.tokens):
            raise ValueError(f"{where}: size and tokens are {(o.size, o.tokens)}, elsewhere in its cell {first}")
        of = losses.setdefault((o.rung, o.tokens_per_parameter, o.seed), {})
        if o.method in of:
            raise ValueError(f"{where} is there twice: one loss for each rung, method, budget and seed")
        of[o.method] = o.loss
    keys = sorted(losses, key=lambda key: (*cells[key[:2]], key[0], key[2]))
    table = {m: np.array([losses[key].get(m, math.nan) for key in keys]) for m in methods}
    sizes, tokens = (np.array([cells[key[:2]][which] for key in keys], np.float64) for which in (0, 1))
    return Clusters(keys, sizes, tokens, table)


def paired_differences(clusters: Clusters, baseline: str, confidence: float) -> list[dict[str, Any]]:
    """`differences` of fit.json: each method's loss less the baseline's, by rung and budget, seed by seed.

    Noise that a pair shares is not in its difference. No correction for the number of rows.
    """
    rows = []
    for method in [m for m in clusters.losses if m != baseline]:
        cells: dict[tuple[str, float], list[int]] = {}
        for i in np.flatnonzero(clusters.ran(baseline, method)):
            cells.setdefault(clusters.keys[i][:2], []).append(int(i))
        for (rung, budget), where in cells.items():
            base, loss = clusters.losses[baseline][where], clusters.losses[method][where]
            pairs = [
                {"seed": clusters.keys[i][2], "baseline": float(b), "loss": float(v), "difference": float(v - b)}
                for i, b, v in zip(where, base, loss, strict=True)
            ]
            rows.append(
                {"rung": rung, "tokens_per_parameter": budget, "tokens": float(clusters.tokens[where[0]])}
                | {"method": method, "pairs": pairs}
                | mean_difference([loss - base], confidence)
            )
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
    x, y, dof = [], [], -1
    for rung in clusters.rungs:
        here = clusters.of_rung(rung) & clusters.ran(baseline)
        if here.any():
            log_tokens, losses = np.log(clusters.tokens[here]), clusters.losses[baseline][here]
            x.append(log_tokens - log_tokens.mean())
            y.append(losses - losses.mean())
            dof += int(here.sum()) - 1
    within, losses = np.concatenate(x), np.concatenate(y)
    if dof < 1 or not np.ptp(within) > 0:
        return f"{baseline} has no rung with two token budgets and runs to spare: what tokens are worth is not measured"
    line = linregress(within, losses)
    # linregress counts one mean taken out where each rung had its own
    error = line.stderr * math.sqrt(max(len(within) - 2, 1) / dof)
    if line.slope < 0 and line.slope + student.ppf(1 - FALL_LEVEL, dof) * error < 0:
        return None
    return (
        f"the loss of {baseline} does not fall with tokens beyond its noise ({line.slope:+.4f} nats for e times the "
        f"tokens, standard error {error:.4f}): train longer or over a wider range of budgets"
    )
