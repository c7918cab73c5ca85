"""The figures of a study's report. Each function gives the panels of one section; methods keep their colours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from megatron_depthattn.study.picture import INK, Picture, colours, picture
from megatron_depthattn.study.report_inputs import Run, Study
from megatron_depthattn.study.report_tables import power, quantity

Series = tuple[np.ndarray, np.ndarray]
Curves = dict[tuple[str, int, int], Series]
"""(tokens, loss) by (method, planned tokens, seed)."""
CURVE_POINTS = 80
"""Most points of a curve, each a mean of what lies between: a panel is about 400 dots wide."""
ROUND = [1, 2, 5, 10]


def curve_figures(study: Study) -> list[list[Picture]]:
    """Loss against tokens, a panel a rung; then the same for the longest runs as differences from the baseline's."""
    losses, differences = [], []
    for rung in study.rungs:
        curves, kind = _curves(study.of(rung=rung))
        if not curves:
            continue
        alt = f"{kind} against tokens at rung {rung}, one line a method, thin lines for its seeds"
        paint = partial(_paint_curves, study=study, curves=curves, kind=kind)
        losses.append(picture(f"curves-{rung}", f"{rung}: {kind}", alt, paint))
        gaps = _gaps(study, curves)
        if gaps:
            title = f"{rung}: {kind}, less {study.baseline}'s"
            alt = f"{kind} less that of {study.baseline} with the same seed, against tokens at rung {rung}"
            paint = partial(_paint_gaps, study=study, gaps=gaps)
            differences.append(picture(f"gaps-{rung}", title, alt, paint))
    return [losses, differences]


def _curves(runs: list[Run]) -> tuple[Curves, str]:
    """The curves of a rung and what they show: held-out loss if every run has three values or more."""
    started = [run for run in runs if run.record.train_loss]
    held_out = all(len(run.record.eval_loss) >= 3 for run in started)
    curves = {}
    for run in started:
        point = run.point
        values = np.array(run.record.eval_loss if held_out else run.record.train_loss, dtype=float).T
        count = values.shape[1]
        parts = np.array_split(values, min(CURVE_POINTS, count if held_out else count // 4 + 1), axis=1)
        means = np.array([part.mean(axis=1) for part in parts]).T
        curves[point["method"], point["tokens"], point["seed"]] = (means[0], means[1])
    return curves, "held-out loss" if held_out else "training loss, smoothed"


def _gaps(study: Study, curves: Curves) -> Curves:
    gaps = {}
    for (method, budget, seed), (tokens, loss) in curves.items():
        other = curves.get((study.baseline, budget, seed))
        if method != study.baseline and other is not None:
            shared = tokens <= other[0][-1]
            difference = loss[shared] - np.interp(tokens[shared], *other)
            gaps[method, budget, seed] = (tokens[shared], difference)
    return gaps


def _means(curves: Curves) -> dict[tuple[str, int], Series]:
    """Over the seeds that have come furthest: one that was cut off would bend the mean where it ends."""
    groups = defaultdict(list)
    for (method, budget, _), curve in curves.items():
        groups[method, budget].append(curve)
    means = {}
    for key, group in groups.items():
        end = max(curve[0][-1] for curve in group)
        group = [curve for curve in group if curve[0][-1] >= 0.98 * end]
        tokens = min((curve[0] for curve in group), key=len)
        means[key] = (tokens, np.mean([np.interp(tokens, *curve) for curve in group], axis=0))
    return means


def _plot_seeds_and_means(axes: Any, study: Study, curves: Curves) -> None:
    style = colours(study.methods)
    for (method, _, _), curve in curves.items():
        axes.plot(*curve, color=style[method][0], linewidth=0.5, alpha=0.45)
    named = set()
    for (method, _), curve in _means(curves).items():
        label = None if method in named else method
        named.add(method)
        axes.plot(*curve, color=style[method][0], linewidth=1.5, label=label)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(quantity))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND))


def _paint_curves(axes: Any, study: Study, curves: Curves, kind: str) -> None:
    _plot_seeds_and_means(axes, study, curves)
    late = [loss[tokens >= 0.2 * tokens[-1]] for tokens, loss in curves.values()]
    low, high = min(map(np.min, late)), max(map(np.max, late))  # the first fifth would flatten all the rest
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_ylabel("nats per token")


def _paint_gaps(axes: Any, study: Study, gaps: Curves) -> None:
    largest = max(budget for _, budget, _ in gaps)
    gaps = {key: curve for key, curve in gaps.items() if key[1] == largest and len(curve[0])}
    _plot_seeds_and_means(axes, study, gaps)
    axes.axhline(0.0, color=INK, linewidth=0.8)
    late = np.concatenate([loss[tokens >= 0.2 * tokens[-1]] for tokens, loss in gaps.values()] + [np.zeros(1)])
    margin = 0.08 * float(np.ptp(late)) or 0.01
    axes.set_ylim(late.min() - margin, late.max() + margin)
    axes.set_ylabel("nats per token, below 0: better")


def fit_figures(study: Study) -> list[list[Picture]]:
    """Measured losses, fits and their bands: against tokens, a panel a rung; against FLOPs, a panel a method."""
    tokens, compute = [], []
    for rung in study.rungs:
        runs = [run for run in study.of(rung=rung) if run.measured]
        if runs:
            alt = f"Held-out loss of finished runs against tokens at rung {rung}, with the fits and their bands"
            paint = partial(_paint_fit, study=study, runs=runs, rungs=[rung], compute=False)
            tokens.append(picture(f"fit-{rung}", f"{rung}: loss against tokens", alt, paint))
    for method in study.methods[1:] or study.methods:
        both = (method, study.baseline)
        runs = [run for run in study.runs if run.measured and run.point["method"] in both]
        if any(run.point["method"] == method for run in runs):
            alt = f"Held-out loss of {method} and {study.baseline} against training FLOPs at every rung, with the fits"
            paint = partial(_paint_fit, study=study, runs=runs, rungs=study.rungs, compute=True)
            compute.append(picture(f"compute-{method}", f"{method}: loss against compute", alt, paint))
    return [tokens, compute]


def _paint_fit(axes: Any, study: Study, runs: list[Run], rungs: list[str], compute: bool) -> None:
    style = colours(study.methods)
    methods = dict.fromkeys(run.point["method"] for run in runs)
    for band in study.fit.get("bands", []):
        same = study.of(rung=band["rung"], method=band["method"])
        if band["rung"] in rungs and band["method"] in methods and same:
            scale = same[0].point["flops"] / same[0].point["tokens"] if compute else 1.0
            x, colour = np.array(band["tokens"]) * scale, style[band["method"]][0]
            value, low, high = (np.array(band[key], dtype=float) for key in ("value", "low", "high"))  # None is NaN
            axes.plot(x, value, color=colour, linewidth=1.0)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    for method in methods:
        points = [run for run in runs if run.point["method"] == method]
        x = np.array([run.point["flops" if compute else "tokens"] for run in points])
        colour, marker = style[method]
        loss = [run.result["loss"] for run in points]
        axes.plot(x, loss, marker, color=colour, markersize=4, markeredgewidth=0, alpha=0.8, label=method)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7) if not compute else LogLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(power if compute else quantity))
    axes.set_xlabel("FLOPs of the whole training" if compute else "tokens")
    axes.set_ylabel("held-out loss, nats per token")


def held_out_figures(study: Study) -> list[Picture]:
    """Predicted with its interval and measured, a row for each method and token budget of the rung held out."""
    held_out = study.fit["held_out"]
    rows = [(method, entry) for method, entries in held_out.get("methods", {}).items() for entry in entries]
    if not rows:
        return []

    def paint(axes: Any) -> None:
        style = colours(study.methods)
        for row, (method, entry) in enumerate(rows):
            _bar(axes, row, entry["predicted"], *style[method])
            label = "measured" if row == 0 else None
            axes.plot(entry["measured"], row, "x", color=INK, markersize=6, linestyle="none", label=label)
        _rows(axes, [f"{method}, {quantity(entry['tokens'])}" for method, entry in rows])
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
        axes.set_xlabel("held-out loss, nats per token")

    title = f"{held_out['rung']}: predicted (with interval) and measured"
    alt = f"Loss of the rung held out, {held_out['rung']}: predicted with intervals, and measured"
    return [picture("held-out", title, alt, paint, height=1.4 + 0.22 * len(rows))]


def _bar(axes: Any, row: float, entry: dict[str, Any], colour: str, marker: str, size: float = 5) -> None:
    """A value on its row, with its interval; an open end runs out of the panel."""
    low, high = entry.get("low"), entry.get("high")
    if low is not None or high is not None:
        ends = [entry["value"] / 1e3 if low is None else low, entry["value"] * 1e3 if high is None else high]
        axes.plot(ends, [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
    axes.plot(entry["value"], row, marker, color=colour, markersize=size)


def _rows(axes: Any, labels: Iterable[str]) -> None:
    labels = list(labels)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def multiplier_figures(study: Study) -> list[Picture]:
    """A forest plot at equal tokens and one at equal wall time: a row for all of a method, each rung, each budget."""
    pictures = []
    for kind, words, less in (
        ("equal_tokens", "equal tokens", "fewer tokens"),
        ("equal_time", "equal wall time", "less time"),
    ):
        rows: list[tuple[str, str, dict[str, Any]]] = []
        for method in study.methods[1:]:
            entry = study.fit["multipliers"].get(method, {})
            budgets = {f"{budget} tokens per weight": at for budget, at in entry.get("budgets", {}).items()}
            levels = {"all": entry, **entry.get("rungs", {}), **budgets}
            rows += [(method, level, at[kind]) for level, at in levels.items() if (at.get(kind) or {}).get("value")]
        if rows:
            alt = f"Effective compute multipliers over {study.baseline} at {words} by method, rung and budget"
            paint = partial(_paint_forest, study=study, rows=rows, less=less)
            title = f"Effective compute multiplier, {words}"
            pictures.append(picture(f"multipliers-{words}", title, alt, paint, height=1.3 + 0.21 * len(rows)))
    return pictures


def _paint_forest(axes: Any, study: Study, rows: list[tuple[str, str, dict[str, Any]]], less: str) -> None:
    style = colours(study.methods)
    for row, (method, level, entry) in enumerate(rows):
        _bar(axes, row, entry, *style[method], size=7 if level == "all" else 4)
        if row and level == "all":
            axes.axhline(row - 0.5, color=INK, linewidth=0.3)
    _rows(axes, [f"{method}: all" if level == "all" else level for method, level, _ in rows])
    axes.axvline(1.0, color=INK, linewidth=0.9)
    values = [1.0, *(entry["value"] for *_, entry in rows)]
    ends = [entry[end] for *_, entry in rows for end in ("low", "high") if entry.get(end)]
    # A bar without a bound would press all others together: what lies four times further out is cut, not its number.
    low, high = max(min(values + ends), min(values) / 4), min(max(values + ends), max(values) * 4)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.02, high * 1.02)
    locator = LogLocator(subs=(1.0, 2.0, 5.0)) if high / low > 4 else MaxNLocator(6, steps=ROUND)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"above 1: {less} for the same loss")


def difference_figures(study: Study) -> list[Picture]:
    """A dot for each seed, and the mean with its interval, a panel a rung."""
    pictures = []
    for rung in study.rungs:
        entries = [entry for entry in study.fit["differences"] if entry["rung"] == rung and entry["pairs"]]
        if entries:
            alt = f"Paired differences in held-out loss from {study.baseline} at rung {rung}: seeds, mean and interval"
            paint = partial(_paint_differences, study=study, entries=entries)
            height = 1.35 + 0.27 * len(entries)
            title = f"{rung}: loss less {study.baseline}'s, same seed"
            pictures.append(picture(f"differences-{rung}", title, alt, paint, height))
    return pictures


def _paint_differences(axes: Any, study: Study, entries: list[dict[str, Any]]) -> None:
    style = colours(study.methods)
    for row, entry in enumerate(entries):
        colour = style[entry["method"]][0]
        seeds = [pair["difference"] for pair in entry["pairs"]]
        axes.plot(seeds, [row + 0.22] * len(seeds), "o", color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0)
        if entry.get("mean") is not None:
            _bar(axes, row - 0.08, {**entry, "value": entry["mean"]}, colour, "|", size=9)
    _rows(axes, [f"{entry['method']}, {quantity(entry['tokens'])}" for entry in entries])
    axes.axvline(0.0, color=INK, linewidth=0.9)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.set_xlabel("nats per token, below 0: better")
