"""The figure of the precision protocol: loss curves, and their relative gaps with the tolerance."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from tools.benchmarks.precision_compare import num_tail_windows, paired_gap, window_means

BASE_COLOR = "0.35"


def require_matplotlib() -> None:
    """Call before what takes long.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "--figure needs matplotlib, which is not installed: pip install 'megatron-depthattn[plot]', or write "
            "--json FILE now and draw later, anywhere, with --from-json FILE --figure FILE"
        )


def draw(figures: dict[str, Any], tolerance: float, path: Path) -> None:
    """Write the figure; its format is that of the ending. Settings of which a run failed are left out.

    Args:
        figures: as `tools/benchmark.py --json` wrote them.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    losses = {
        name: [run["losses"] for run in runs]
        for name, runs in figures["runs"].items()
        if not any(run["failure"] for run in runs)
    }
    base, *others = losses
    about = figures["about"]
    with mpl.rc_context(
        {"svg.hashsalt": "precision", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure, (curves, gaps) = pyplot.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
        colors = {name: f"C{number}" for number, name in enumerate(others)}
        ends = paired_gap(losses[base], losses[base]).steps

        means = {name: np.mean([window_means(run) for run in runs], axis=0) for name, runs in losses.items()}
        curves.plot(ends, means[base], color=BASE_COLOR, linewidth=5, alpha=0.5, label=f"{base} (base)")
        for number, name in enumerate(others):  # dashes in turn: curves that coincide are all seen
            dashes = (4 * number, (4, 4 * len(others) - 4)) if len(others) > 1 else "-"
            curves.plot(ends, means[name], color=colors[name], linewidth=1.5, linestyle=dashes)
        curves.set(xlabel="step", ylabel="training loss, nats per byte", title="Loss")

        gaps.axhspan(-tolerance, tolerance, color="0.95")
        for bound in (-tolerance, tolerance):
            gaps.axhline(bound, color="0.6", linewidth=1, linestyle="--")
        gaps.annotate(
            f"tolerance, ±{tolerance:.1%}", (ends[0], tolerance), (0, -4), textcoords="offset points", va="top"
        )
        gaps.axhline(0, color=BASE_COLOR, linewidth=1)
        for name in others:
            by_seed = np.asarray(paired_gap(losses[name], losses[base]).by_seed)
            gaps.fill_between(
                ends, by_seed.min(axis=0), by_seed.max(axis=0), color=colors[name], alpha=0.2, linewidth=0
            )
            gaps.plot(ends, by_seed.mean(axis=0), color=colors[name], linewidth=1.5, label=name)
        judged = ends[-num_tail_windows(about["steps"])] - (ends[-1] - ends[-2] if len(ends) > 1 else 0)
        gaps.axvline(judged, color="0.5", linewidth=1, linestyle=":")
        gaps.annotate("judged", (judged, -tolerance), (4, 4), textcoords="offset points")
        gaps.yaxis.set_major_formatter(PercentFormatter(1.0))
        gaps.set(
            xlabel="step", ylabel=f"(loss − {base}'s) / {base}'s", title="Relative gap: mean and range of the seeds"
        )
        for axes in (curves, gaps):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.margins(x=0.01)
        figure.legend(frameon=False, loc="outside lower center", ncols=min(6, len(losses)))
        figure.suptitle(
            f"{about['model']}; {about['steps']} steps of {about['batch']} bytes, {about['seeds']}", fontsize=10
        )
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)
