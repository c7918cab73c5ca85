"""The law of a scale study: L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3).

N is the size of a rung (weights without the embedding table), D the tokens it was trained on, L nats per token.

Fitted by variable projection, which arXiv:2603.22339 recommends over fitting parabolas to slices: for given
exponents the law is linear in (E, A, B), and `scipy.optimize.nnls` solves for the three, none below zero; only the
two exponents are searched, by `scipy.optimize.leastsq` from several starts. Least squares of the loss itself,
without Hoffmann's Huber loss: a scale study has few runs, all from one program, and a run that lies far from the law
is to be seen as misfit (`LawFit.misfit_p`), not to be weighted away. N and D are divided by their geometric means while
fitting, so that A and B are losses of the same order as E.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import leastsq, nnls
from scipy.special import expit, logit
from scipy.stats import f as f_distribution

FORM = (
    "L(N, D) = E + A/N^alpha + B/D^beta, with E, A, B >= 0; least squares of the loss by variable projection "
    "(scipy nnls for E, A, B; scipy leastsq for the exponents, from several starts)"
)
EXPONENTS = (0.02, 2.0)  # published exponents lie between 0.05 and 1
STARTS = [(alpha, beta) for alpha in (0.1, 0.3, 0.9) for beta in (0.1, 0.3, 0.9)]
MISFIT_LEVEL = 0.05

Floats = NDArray[np.float64]


class Law(NamedTuple):
    """The parameters for N in weights, D in tokens and L in nats: numbers, or arrays [resamples, 1] of many laws."""

    E: Any
    A: Any
    alpha: Any
    B: Any
    beta: Any

    def token_term(self, tokens: Floats) -> Floats:
        """B / D^beta: what more tokens can still take off the loss, in nats."""
        return np.asarray(self.B * tokens**-self.beta)

    def loss(self, sizes: Floats, tokens: Floats) -> Floats:
        return np.asarray(self.E + self.A * sizes**-self.alpha + self.token_term(tokens))


class LawFit(NamedTuple):
    """A fitted law with what its intervals need.

    residuals: one per run, scaled up by sqrt(n / (n - 5)), for five parameters were fitted to n runs, and further where
    the law misses its cells (misfit_p < MISFIT_LEVEL), so that they stand for the law's misfit as well as for seeds.
    dof: degrees of freedom of the residuals' scale. misfit_p: of the F test of the cells' means about the law against
    runs about their cell's mean; None without two runs in a cell or with no cell to spare.
    """

    law: Law
    residuals: Floats
    dof: int
    rmse: float
    misfit_p: float | None

    @property
    def misses(self) -> bool:
        """The law misses its points by more than their seeds explain."""
        return self.misfit_p is not None and self.misfit_p < MISFIT_LEVEL


def reason_not_fitted(sizes: Floats, tokens: Floats) -> str | None:
    """Why these runs cannot distinguish the five parameters, and what to add; None if they can."""
    cells = set(zip(sizes.tolist(), tokens.tolist(), strict=True))
    budgets = [sum(n == size for n, _ in cells) for size in {n for n, _ in cells}]
    repeated = sum(count > 1 for count in budgets)
    needs = (
        (len(budgets), 3, "sizes where A/N^alpha beside E needs 3: add rungs"),
        (repeated, 2, "sizes with two token budgets or more where B/D^beta needs 2: add tokens_per_parameter"),
        (len({d for _, d in cells}), 3, "token counts where B/D^beta beside E needs 3: add tokens_per_parameter"),
        (len(cells), 6, "points of (size, tokens) where five parameters need 6: add rungs or budgets"),
        (len(sizes), 7, "runs where five parameters and their noise need 7: add seeds or budgets"),
    )
    return "; ".join(f"{count} {text}" for count, needed, text in needs if count < needed) or None


class Cells:
    """Runs grouped by (size, tokens): the law sees only the cells' means, weighted by their number of runs."""

    def __init__(self, sizes: Floats, tokens: Floats) -> None:
        cells, self.index, self.counts = np.unique(
            np.stack([sizes, tokens]), axis=1, return_inverse=True, return_counts=True
        )
        self.units = np.exp(np.log(cells).mean(axis=1))
        self.logs = np.log(cells / self.units[:, None])

    def means(self, losses: Floats) -> Floats:
        return np.bincount(self.index, losses) / self.counts

    def fit(self, losses: Floats, starts: list[tuple[float, float]]) -> Law:
        """The law of least squares for one loss a run; the best of the given starts of (alpha, beta)."""
        weights = np.sqrt(self.counts)
        columns, target = np.repeat(weights[:, None], 3, axis=1), weights * self.means(losses)
        low, high = EXPONENTS

        def solve(free: Floats) -> Floats:
            columns[:, 1:] = weights[:, None] * np.exp(-(low + (high - low) * expit(free)) * self.logs.T)
            linear: Floats = nnls(columns, target)[0]
            return linear

        def misses(free: Floats) -> Floats:
            linear = solve(free)
            return columns @ linear - target

        # The logistic keeps the exponents in their bounds; MINPACK called directly is several times as fast as
        # `least_squares`.
        inside = logit(np.clip((np.array(starts) - low) / (high - low), 0.005, 0.995))
        found = [leastsq(misses, start, xtol=1e-6, ftol=1e-6)[0] for start in inside]
        best = min(found, key=lambda free: float((misses(free) ** 2).sum()))
        E, A, B = solve(best).tolist()
        alpha, beta = (low + (high - low) * expit(best)).tolist()
        return Law(E, float(A * self.units[0] ** alpha), alpha, float(B * self.units[1] ** beta), beta)


def fit_law(sizes: Floats, tokens: Floats, losses: Floats) -> LawFit:
    """Fit one law to runs [n] of size N, tokens D, loss in nats, for which `reason_not_fitted` gives no reason."""
    cells = Cells(sizes, tokens)
    law = cells.fit(losses, STARTS)
    residuals = losses - law.loss(sizes, tokens)
    total, pure = float(residuals @ residuals), float(((losses - cells.means(losses)[cells.index]) ** 2).sum())
    spare, replicates = len(cells.counts) - len(Law._fields), len(losses) - len(cells.counts)
    dof = spare + replicates
    square, scale, misfit_p = total / dof, math.sqrt(len(losses) / dof), None
    if spare > 0 and replicates > 0 and pure > 0:
        lack = (total - pure) / spare
        misfit_p = float(f_distribution.sf(lack / (pure / replicates), spare, replicates))
        if misfit_p < MISFIT_LEVEL:
            # As a particle-data average is widened when its measurements disagree: the misfit of a cell is the same
            # for all its seeds, so seeds do not average it away, and only the cells to spare show how large it is.
            scale, dof = scale * math.sqrt(max(lack / square, 1.0)), spare
    return LawFit(law, residuals * scale, dof, math.sqrt(square), misfit_p)
