"""The bootstrap of a scale study: noise drawn again and again, together where it moves together.

The runs of one rung, token budget and seed (a cluster) share data order and initial weights, so all methods share their
noise. A resample gives each cluster the residuals of another, all methods' at once, with a random sign; it takes only
from clusters in which all its methods ran. Laws are resampled so. The budgets of one rung and seed share the weights
and the beginning of the data too, which differences of methods show: they are resampled by block (rung, seed), all
budgets at once, for what replicates a difference is its seeds. (Measured: by cluster, multipliers cover too rarely if
budgets share noise; by block, laws do, with five parameters to a dozen blocks.)

Small samples: with few residuals their scale is itself uncertain, and plain percentile intervals cover too rarely.
Each resample therefore also draws the scale, as sqrt(dof / chi2): of a mean this makes exactly Student's t interval.
"""

from typing import Any

import numpy as np
from scipy.stats import chi2

from megatron_depthattn.study.differences import Clusters
from megatron_depthattn.study.law import Floats


class Noise:
    """`resamples` draws for the clusters of a study.

    whole_seeds: the budgets of one rung and seed take from one donor; else each cluster takes from any.
    """

    def __init__(
        self, clusters: Clusters, resamples: int, rng: np.random.Generator, *, whole_seeds: bool = False
    ) -> None:
        shape = (resamples, len(clusters.seed))
        self.donor, self.sign = np.empty(shape, np.int64), np.empty(shape)
        present = [frozenset(m for m, of in clusters.losses.items() if np.isfinite(of[i])) for i in range(shape[1])]
        blocks: dict[tuple[Any, ...], dict[float, int]] = {}
        for i, (rung, budget, seed) in enumerate(zip(clusters.rung, clusters.budget, clusters.seed, strict=True)):
            key, member = ((rung, seed), budget) if whole_seeds else ((rung, budget, seed), 0.0)
            blocks.setdefault(key, {})[member] = i
        for block in blocks.values():
            donors = [
                other
                for other in blocks.values()
                if all(budget in other and present[i] <= present[other[budget]] for budget, i in block.items())
            ]
            chosen, sign = rng.integers(len(donors), size=resamples), rng.choice([-1.0, 1.0], resamples)
            for budget, i in block.items():
                self.donor[:, i] = np.array([donor[budget] for donor in donors])[chosen]
                self.sign[:, i] = sign
        self.level = rng.uniform(size=resamples)
        self.run = rng.normal(size=shape)  # of new runs, for prediction intervals

    def scale(self, dof: int) -> Floats:
        """[resamples]; one level for all, as the noise of methods in a cluster has one source."""
        return np.sqrt(dof / chi2.ppf(self.level, dof))

    def draw(self, residuals: Floats, dof: int) -> Floats:
        """[resamples, clusters] of noise, from residuals [clusters] (NaN where a method did not run)."""
        return residuals[self.donor] * self.sign * self.scale(dof)[:, None]


def estimate(value: float, samples: Floats | None, confidence: float) -> dict[str, float | None]:
    """The value with the percentile interval of samples [resamples]; an end that is not finite is None: open.

    Whole ranks at (resamples + 1) p, rounded outwards: never narrower than stated, and no infinities averaged. Both
    ends are None without samples.
    """
    if samples is None:
        return {"value": value, "low": None, "high": None}
    ordered = np.sort(samples)
    rank = int((len(ordered) + 1) * (1 - confidence) / 2 + 1e-9)
    assert rank > 0, f"{len(ordered)} resamples for an interval of {confidence}"
    low, high = (float(end) if np.isfinite(end) else None for end in (ordered[rank - 1], ordered[-rank]))
    return {"value": float(value), "low": low, "high": high}
