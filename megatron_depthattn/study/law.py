"""The law of a scale study: L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3).

N is the size of a rung (weights without the embedding table), D the tokens it was trained on, L nats per token.

Fitted by variable projection, which arXiv:2603.22339 recommends over fitting parabolas to slices: for given
exponents the law is linear in (E, A, B), and `scipy.optimize.nnls` solves for the three, none below zero; only the
two exponents are searched, by `scipy.optimize.least_squares` from several starts. Least squares of the loss itself,
without Hoffmann's Huber loss: a scale study has few runs, all from one program, and a run that lies far from the law
is to be seen as misfit (`LawFit.misfit_p`), not to be weighted away. N and D are divided by their geometric means while
fitting, so that A and B are losses of the same order as E.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls
from scipy.special import expit, logit
from scipy.stats import f as f_distribution

FORM = (
    "L(N, D) = E + A/N^alpha + B/D^beta, with E, A, B >= 0; least squares of the loss by variable projection "
    "(scipy nnls for E, A, B; scipy least_squares for the exponents, from several starts)"
)
PARAMETERS = ("E", "A", "alpha", "B", "beta")
EXPONENTS = (0.02, 2.0)  # published exponents lie between 0.05 and 1
STARTS = (0.1, 0.3, 0.9)
MISFIT_LEVEL = 0.05

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """E, A, B of scaled sizes and tokens: L = E + A (N/size_unit)^-alpha + B (D/token_unit)^-beta, in nats."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    size_unit: float
    token_unit: float

    def token_term(self, tokens: Floats) -> Floats:
        """B / D^beta: what more tokens can still take off the loss, in nats."""
        return self.B * (tokens / self.token_unit) ** -self.beta

    def loss(self, sizes: Floats, tokens: Floats) -> Floats:
        return self.E + self.A * (sizes / self.size_unit) ** -self.alpha + self.token_term(tokens)

    def unscaled(self) -> dict[str, float]:
        """The five parameters for N in weights and D in tokens."""
        A, B = self.A * self.size_unit**self.alpha, self.B * self.token_unit**self.beta
        return {"E": self.E, "A": A, "alpha": self.alpha, "B": B, "beta": self.beta}


@dataclass(frozen=True)
class LawFit:
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
    num_sizes, num_tokens = len({n for n, _ in cells}), len({d for _, d in cells})
    repeated = sum(len({d for n, d in cells if n == size}) > 1 for size in {n for n, _ in cells})
    wants = []
    if num_sizes < 3:
        wants.append(f"{num_sizes} sizes where A/N^alpha beside E needs 3: add rungs")
    if repeated < 2:
        wants.append(
            f"{repeated} sizes with two token budgets or more where B/D^beta needs 2: add tokens_per_parameter"
        )
    if num_tokens < 3:
        wants.append(f"{num_tokens} token counts where B/D^beta beside E needs 3: add tokens_per_parameter")
    if len(cells) < 6:
        wants.append(f"{len(cells)} points of (size, tokens) where five parameters need 6: add rungs or budgets")
    if not wants and len(sizes) < 7:
        wants.append(f"{len(sizes)} runs where five parameters and their noise need 7: add seeds or budgets")
    return "; ".join(wants) or None


class Cells:
    """Runs grouped by (size, tokens): the law sees only the cells' means, weighted by their number of runs."""

    def __init__(self, sizes: Floats, tokens: Floats) -> None:
        cells, self.index = np.unique(np.stack([sizes, tokens]), axis=1, return_inverse=True)
        self.sizes, self.tokens = cells
        self.counts = np.bincount(self.index).astype(np.float64)
        self.size_unit, self.token_unit = (math.exp(np.log(of).mean()) for of in cells)

    def means(self, losses: Floats) -> Floats:
        return np.bincount(self.index, losses) / self.counts

    def fit(self, losses: Floats, starts: list[tuple[float, float]]) -> Law:
        """The law of least squares for one loss a run; the best of the given starts of (alpha, beta)."""
        weights = np.sqrt(self.counts)
        log_size, log_tokens = np.log(self.sizes / self.size_unit), np.log(self.tokens / self.token_unit)
        columns, target = np.repeat(weights[:, None], 3, axis=1), weights * self.means(losses)

        def solve(exponents: Floats) -> tuple[Floats, float]:
            columns[:, 1] = weights * np.exp(-exponents[0] * log_size)
            columns[:, 2] = weights * np.exp(-exponents[1] * log_tokens)
            return nnls(columns, target)

        low, high = EXPONENTS

        def misses(free: Floats) -> Floats:
            linear, _ = solve(low + (high - low) * expit(free))
            return columns @ linear - target

        # The logistic keeps the exponents in their bounds: MINPACK's search is several times as fast as bounded ones.
        inside = np.clip((np.array(starts) - low) / (high - low), 0.005, 0.995)
        found = [least_squares(misses, logit(start), method="lm", xtol=1e-6, ftol=1e-6) for start in inside]
        alpha, beta = low + (high - low) * expit(min(found, key=lambda result: result.cost).x)
        E, A, B = solve(np.array([alpha, beta]))[0]
        return Law(float(E), float(A), float(alpha), float(B), float(beta), self.size_unit, self.token_unit)

    def misfit(self, losses: Floats, law: Law) -> tuple[float | None, float]:
        """(p of the F test of lack of fit, mean square of the cells' means about the law)."""
        means = self.means(losses)
        spare, replicates = len(means) - len(PARAMETERS), len(losses) - len(means)
        if spare < 1 or replicates < 1:
            return None, 0.0
        lack = float(self.counts @ (means - law.loss(self.sizes, self.tokens)) ** 2) / spare
        pure = float(((losses - means[self.index]) ** 2).sum()) / replicates
        return (float(f_distribution.sf(lack / pure, spare, replicates)) if pure > 0 else None), lack


def fit_law(sizes: Floats, tokens: Floats, losses: Floats) -> LawFit:
    """Fit one law to runs [n] of size N, tokens D, loss in nats. ValueError where `reason_not_fitted` gives one."""
    reason = reason_not_fitted(sizes, tokens)
    if reason:
        raise ValueError(f"the law cannot be fitted: {reason}")
    cells = Cells(sizes, tokens)
    law = cells.fit(losses, [(alpha, beta) for alpha in STARTS for beta in STARTS])
    residuals = losses - law.loss(sizes, tokens)
    dof = len(losses) - len(PARAMETERS)
    square = float(residuals @ residuals) / dof
    scale = math.sqrt(len(losses) / dof)
    misfit_p, lack = cells.misfit(losses, law)
    if misfit_p is not None and misfit_p < MISFIT_LEVEL:
        # As a particle-data average is widened when its measurements disagree: the misfit of a cell is the same for
        # all its seeds, so seeds do not average it away, and only the cells to spare show how large it is.
        scale, dof = scale * math.sqrt(max(lack / square, 1.0)), len(cells.counts) - len(PARAMETERS)
    return LawFit(law, residuals * scale, dof, math.sqrt(square), misfit_p)
