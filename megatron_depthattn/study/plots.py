"""The figures of a study's report, each one panel of SVG text; a method keeps its colour and marker in all of them."""

from __future__ import annotations

import base64
import io
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from megatron_depthattn.study.report_data import ReportData, Run, quantity

Series = tuple[np.ndarray, np.ndarray]
Curves = dict[tuple[str, int, int], Series]
"""(tokens, loss) by (method, planned tokens, seed)."""
CURVE_POINTS = 80  # at most, each a mean of what lies between: a panel is about 400 dots wide
INK = "#1b1b1c"
# Okabe and Ito's palette, which the colour-blind can tell apart, each with a marker of its own.
COLOURS = ("#7f7f7f", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a63d2", "#a6761d")
STYLE = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.titlesize": 9}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True}
STYLE |= {"grid.color": "#c9c9ca", "grid.linewidth": 0.5, "legend.frameon": False, "legend.fontsize": 8}


class Plot(NamedTuple):
    """A panel. `name`: of its file, and unique in a report; `alt`: what it shows, for those who cannot see it."""

    name: str
    alt: str
    svg: str

    @property
    def address(self) -> str:
        """A data URL of the panel."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


def colours(methods: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each method, the same in every figure of a report."""
    return {method: (COLOURS[i % len(COLOURS)], "os^DvPX<>"[i % len(COLOURS)]) for i, method in enumerate(methods)}


@contextmanager
def _panel(plots: list[Plot], name: str, title: str, *, height: float = 3.3, alt: str = "") -> Iterator[Any]:
    """The axes of a panel of 4.7 inches by ``height``, which is added to ``plots`` once it is drawn.

    Nothing depends on the time or on the machine's settings.
    """
    name, buffer = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), io.StringIO()
    with style.context({**STYLE, "svg.hashsalt": name}, after_reset=True):
        figure = Figure(figsize=(4.7, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left")
        yield axes
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plots.append(Plot(name, alt or title, buffer.getvalue()))


def curve_plots(study: ReportData) -> list[Plot]:
    """Loss against tokens, a panel a rung; then the same for the longest runs as differences from the baseline's."""
    losses: list[Plot] = []
    differences: list[Plot] = []
    for rung in study.rungs:
        curves, kind = _curves(study.of(rung=rung))
        if curves:
            with _panel(losses, f"curves-{rung}", f"{rung}: {kind} against tokens") as axes:
                _draw_curves(axes, study, curves)
        if gaps := _gaps(study, curves):
            title = f"{rung}: {kind}, less {study.baseline}'s, same seed"
            with _panel(differences, f"gaps-{rung}", title) as axes:
                _draw_curves(axes, study, gaps, zero=True)
    return losses + differences


def _curves(runs: list[Run]) -> tuple[Curves, str]:
    """The curves of a rung and what they show: held-out loss if every run has three values or more."""
    started = [run for run in runs if run["train_loss"]]
    held_out = all(len(run["eval_loss"]) >= 3 for run in started)
    curves = {}
    for run in started:
        values = np.array(run["eval_loss" if held_out else "train_loss"], dtype=float)
        parts = np.array_split(values, min(CURVE_POINTS, len(values) if held_out else len(values) // 4 + 1))
        tokens, loss = np.array([part.mean(axis=0) for part in parts]).T
        curves[run["method"], run["tokens"], run["seed"]] = (tokens, loss)
    return curves, "held-out loss" if held_out else "training loss, smoothed"


def _gaps(study: ReportData, curves: Curves) -> Curves:
    gaps = {}
    for (method, budget, seed), (tokens, loss) in curves.items():
        other = curves.get((study.baseline, budget, seed))
        if method != study.baseline and other is not None and (shared := tokens <= other[0][-1]).any():
            gaps[method, budget, seed] = (tokens[shared], loss[shared] - np.interp(tokens[shared], *other))
    largest = max((budget for _, budget, _ in gaps), default=0)
    return {key: curve for key, curve in gaps.items() if key[1] == largest}


def _draw_curves(axes: Any, study: ReportData, curves: Curves, *, zero: bool = False) -> None:
    """Seeds thin; their mean thick, over those that have come furthest: one that was cut off would bend it."""
    colour_of, groups = colours(study.methods), defaultdict(list)
    for (method, budget, _), curve in curves.items():
        axes.plot(*curve, color=colour_of[method][0], linewidth=0.5, alpha=0.45)
        groups[method, budget].append(curve)
    for (method, _), group in groups.items():
        end = max(tokens[-1] for tokens, _ in group)
        whole = [curve for curve in group if curve[0][-1] >= 0.98 * end]
        tokens = min((tokens for tokens, _ in whole), key=len)
        mean = np.mean([np.interp(tokens, *curve) for curve in whole], axis=0)
        label = None if method in axes.get_legend_handles_labels()[1] else method
        axes.plot(tokens, mean, color=colour_of[method][0], linewidth=1.5, label=label)
    # The first fifth of each curve would flatten the rest.
    late = np.concatenate([loss[tokens >= 0.2 * tokens[-1]] for tokens, loss in curves.values()])
    if zero:
        axes.axhline(0.0, color=INK, linewidth=0.8)
        late = np.append(late, 0.0)
    margin = 0.06 * np.ptp(late) or 0.01
    axes.set_ylim(late.min() - margin, late.max() + margin)
    axes.set_ylabel("nats per token, below 0: better" if zero else "nats per token")
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(quantity))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def law_plots(study: ReportData) -> list[Plot]:
    """Measured losses and laws against tokens, a panel a rung."""
    plots: list[Plot] = []
    for rung in study.rungs:
        measured = [run for run in study.of(rung=rung) if run["loss"] is not None]
        if measured:
            with _panel(plots, f"fit-{rung}", f"{rung}: held-out loss against tokens, with the laws") as axes:
                for method in dict.fromkeys(run["method"] for run in measured):
                    runs = [run for run in measured if run["method"] == method]
                    _draw_law(axes, runs, study.fit["laws"].get(method, {}), *colours(study.methods)[method])
                axes.set_xscale("log")
                axes.margins(x=0.08)
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.xaxis.set_major_formatter(FuncFormatter(quantity))
                axes.set_xlabel("tokens")
                axes.set_ylabel("held-out loss, nats per token")
    return plots


def _draw_law(axes: Any, runs: list[Run], law: dict[str, Any], colour: str, marker: str) -> None:
    tokens = np.array([run["tokens"] for run in runs], dtype=float)
    axes.plot(tokens, [run["loss"] for run in runs], marker, color=colour, ms=4, alpha=0.8, label=runs[0]["method"])
    if "E" in law:
        E, A, alpha, B, beta = (law[name]["value"] for name in ("E", "A", "alpha", "B", "beta"))
        line = np.geomspace(tokens.min() / 1.25, tokens.max() * 1.25, 20)
        axes.plot(line, E + A * runs[0]["size"] ** -alpha + B * line**-beta, color=colour, linewidth=1.0)


def _draw_rows(axes: Any, rows: list[tuple[str, dict[str, Any], tuple[str, str], float]]) -> None:
    """A value with its interval on each row: (label, entry, (colour, marker), size); an open end leaves the panel."""
    for row, (_, entry, (colour, marker), size) in enumerate(rows):
        low, high = entry["low"], entry["high"]
        if low is not None or high is not None:
            ends = [entry["value"] / 1e3 if low is None else low, entry["value"] * 1e3 if high is None else high]
            axes.plot(ends, [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(entry["value"], row, marker, color=colour, markersize=size)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def difference_plots(study: ReportData) -> list[Plot]:
    """A dot for each seed, and the mean with its interval, a panel a rung."""
    plots: list[Plot] = []
    for rung in study.rungs:
        title, rows = f"{rung}: held-out loss less {study.baseline}'s, same seed", []
        entries = [entry for entry in study.fit["differences"] if entry["rung"] == rung]
        alt = f"{title}: each seed, and the mean with its interval"
        for entry in entries:
            label, colour = (
                f"{entry['method']}, {quantity(entry['tokens'])}",
                colours(study.methods)[entry["method"]][0],
            )
            rows.append((label, entry | {"value": entry["mean"]}, (colour, "|"), 9.0))
        if rows:
            with _panel(plots, f"differences-{rung}", title, height=1.35 + 0.27 * len(rows), alt=alt) as axes:
                for row, (_, entry, (colour, _), _) in enumerate(rows):
                    seeds = [pair["difference"] for pair in entry["pairs"]]
                    axes.plot(seeds, [row + 0.25] * len(seeds), "o", color=colour, markersize=3.5, alpha=0.6)
                _draw_rows(axes, rows)
                axes.axvline(0.0, color=INK, linewidth=0.9)
                axes.set_xlabel("nats per token, below 0: better")
    return plots


def multiplier_plots(study: ReportData) -> list[Plot]:
    """At equal tokens: a row for all of a method, each rung, each budget."""
    plots: list[Plot] = []
    rows, ends = [], [1.0]
    for method, level, at in study.multiplier_levels():
        label, size = (f"{method}: all runs", 7.0) if level == "all runs" else (level, 4.0)
        rows.append((label, at["equal_tokens"], colours(study.methods)[method], size))
        # An interval without a bound would press all others together: four times further out it is cut.
        value = at["equal_tokens"]["value"]
        ends += [min(max(at["equal_tokens"][end] or value, value / 4), value * 4) for end in ("low", "high")]
    if rows:
        with _panel(plots, "multipliers", "Effective compute multiplier", height=1.3 + 0.21 * len(rows)) as axes:
            _draw_rows(axes, rows)
            axes.axvline(1.0, color=INK, linewidth=0.9)
            axes.set_xlim(min(ends) / 1.02, max(ends) * 1.02)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
            axes.set_xlabel("above 1: fewer tokens for the same loss")
    return plots


def depth_plots(study: ReportData) -> list[Plot]:
    """Mean depth weights at the end of training, layers by sources, of the longest runs of a rung and method."""
    plots: list[Plot] = []
    for rung, method in ((rung, method) for rung in study.rungs for method in study.methods):
        runs = [run for run in study.of(rung=rung, method=method) if run["depth"]]
        longest = max((run["tokens"] for run in runs), default=0)
        last = [run["depth"] for run in runs if run["tokens"] == longest]
        if last:
            title = f"{rung}, {method}, mean of {len(last)} seed{'s' if len(last) > 1 else ''}"
            with _panel(plots, f"depth-{rung}-{method}", title, height=1.5 + 0.26 * len(last[0])) as axes:
                draw_weights(axes, last)
    return plots


def draw_weights(axes: Any, last: list[dict[int, tuple[list[int], list[float]]]]) -> None:
    """Layer by layer (sources, weights) of each run, the last weight that on itself."""
    layers = list(last[0])
    sources = sorted({source for seen, _ in last[0].values() for source in seen})
    grid = np.full((len(layers), len(sources) + 1), np.nan)
    for row, layer in enumerate(layers):
        columns = [*(sources.index(source) for source in last[0][layer][0]), len(sources)]
        grid[row, columns] = np.mean([at[layer][1] for at in last], axis=0)
    # A mesh of rectangles, no pixels. Many sources share 1: small weights need the colours.
    mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap="cividis", norm=PowerNorm(0.5, 0.0, 1.0), linewidth=0)
    axes.figure.colorbar(mesh, ax=axes, label="weight", fraction=0.05)
    axes.set_xticks(np.arange(len(sources) + 1) + 0.5, [*map(str, sources), "self"])
    axes.set_yticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers])
    axes.set_ylim(len(layers), 0)
    axes.grid(visible=False)
    axes.set_xlabel("source layer")
    axes.set_ylabel("layer")
