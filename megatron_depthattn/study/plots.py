"""The figures of a study's report, each one panel of SVG text; a method keeps its colour and marker in all of them."""

# ruff: noqa: B023 (a panel is drawn before the next pass of its loop)

from __future__ import annotations

import base64
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from megatron_depthattn.study.report_data import Layers, ReportData, Run, quantity

Series = tuple[np.ndarray, np.ndarray]
Curves = dict[tuple[str, int, int], Series]
"""(tokens, loss) by (method, planned tokens, seed)."""
CURVE_POINTS = 80  # at most, each a mean of what lies between: a panel is about 400 dots wide
INK = "#1b1b1c"
# Okabe and Ito's palette, which the colour-blind can tell apart, each with a marker of its own.
FIXED = {"vanilla": ("#7f7f7f", "o"), "depth_attention": ("#0072b2", "s"), "denseformer": ("#e69f00", "^")}
FIXED |= {"attnres": ("#009e73", "D"), "mhc": ("#cc79a7", "v")}
SPARE = [("#d55e00", "P"), ("#56b4e9", "X"), ("#8a63d2", "<"), ("#a6761d", ">")]
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
    """(colour, marker) of each method, the same in every figure; labels that we do not know take the spare ones."""
    spare = [method for method in methods if method not in FIXED]
    return {**FIXED, **{method: SPARE[index % len(SPARE)] for index, method in enumerate(spare)}}


def plot(name: str, title: str, draw: Callable[[Any], None], *, height: float = 3.3, alt: str = "") -> Plot:
    """One panel of 4.7 inches by ``height``; nothing depends on the time or on the machine's settings."""
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    buffer = io.StringIO()
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(4.7, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left")
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Plot(name, alt or title, buffer.getvalue())


def curve_plots(study: ReportData) -> list[Plot]:
    """Loss against tokens, a panel a rung; then the same for the longest runs as differences from the baseline's."""
    losses, differences = [], []
    for rung in study.rungs:
        curves, kind = _curves(study.of(rung=rung))
        if not curves:
            continue

        def draw(axes: Any) -> None:
            low, high = _late_limits(_draw_curves(axes, study, curves))
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
            axes.set_ylabel("nats per token")

        def draw_gaps(axes: Any) -> None:
            low, high = _late_limits(_draw_curves(axes, study, gaps))
            margin = 0.08 * (max(high, 0.0) - min(low, 0.0)) or 0.01
            axes.axhline(0.0, color=INK, linewidth=0.8)
            axes.set_ylim(min(low, 0.0) - margin, max(high, 0.0) + margin)
            axes.set_ylabel("nats per token, below 0: better")

        losses.append(plot(f"curves-{rung}", f"{rung}: {kind} against tokens", draw))
        if gaps := _gaps(study, curves):
            differences.append(plot(f"gaps-{rung}", f"{rung}: {kind}, less {study.baseline}'s, same seed", draw_gaps))
    return losses + differences


def _curves(runs: list[Run]) -> tuple[Curves, str]:
    """The curves of a rung and what they show: held-out loss if every run has three values or more."""
    started = [run for run in runs if run.record.train_loss]
    held_out = all(len(run.record.eval_loss) >= 3 for run in started)
    curves = {}
    for run in started:
        values = np.array(run.record.eval_loss if held_out else run.record.train_loss, dtype=float).T
        count = values.shape[1]
        parts = np.array_split(values, min(CURVE_POINTS, count if held_out else count // 4 + 1), axis=1)
        means = np.array([part.mean(axis=1) for part in parts]).T
        curves[run.point["method"], run.point["tokens"], run.point["seed"]] = (means[0], means[1])
    return curves, "held-out loss" if held_out else "training loss, smoothed"


def _gaps(study: ReportData, curves: Curves) -> Curves:
    gaps = {}
    for (method, budget, seed), (tokens, loss) in curves.items():
        other = curves.get((study.baseline, budget, seed))
        if method != study.baseline and other is not None:
            shared = tokens <= other[0][-1]
            if shared.any():
                gaps[method, budget, seed] = (tokens[shared], loss[shared] - np.interp(tokens[shared], *other))
    largest = max((budget for _, budget, _ in gaps), default=0)
    return {key: curve for key, curve in gaps.items() if key[1] == largest}


def _late_limits(curves: Curves) -> tuple[float, float]:
    """Of all but the first fifth of each curve, which would flatten the rest."""
    late = np.concatenate([loss[tokens >= 0.2 * tokens[-1]] for tokens, loss in curves.values()])
    return float(late.min()), float(late.max())


def _draw_curves(axes: Any, study: ReportData, curves: Curves) -> Curves:
    """Seeds thin; their mean thick, over those that have come furthest: one that was cut off would bend it."""
    style, groups, named = colours(study.methods), defaultdict(list), set()
    for (method, budget, _), curve in curves.items():
        axes.plot(*curve, color=style[method][0], linewidth=0.5, alpha=0.45)
        groups[method, budget].append(curve)
    for (method, _), group in groups.items():
        end = max(curve[0][-1] for curve in group)
        label = None if method in named else method
        named.add(method)
        axes.plot(*_mean([c for c in group if c[0][-1] >= 0.98 * end]), color=style[method][0], lw=1.5, label=label)
    _token_axis(axes)
    return curves


def _mean(curves: list[Series]) -> Series:
    tokens = min((curve[0] for curve in curves), key=len)
    return tokens, np.mean([np.interp(tokens, *curve) for curve in curves], axis=0)


def _token_axis(axes: Any) -> None:
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(quantity))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def law_plots(study: ReportData) -> list[Plot]:
    """Measured losses, laws and their bands against tokens, a panel a rung."""
    style, plots = colours(study.methods), []
    for rung in study.rungs:
        runs = [run for run in study.of(rung=rung) if run.measured]

        def draw(axes: Any) -> None:
            for band in study.fit.get("bands", []):
                if band["rung"] == rung:
                    colour = style[band["method"]][0]
                    value, low, high = (np.array(band[key], dtype=float) for key in ("value", "low", "high"))
                    axes.plot(band["tokens"], value, color=colour, linewidth=1.0)
                    axes.fill_between(band["tokens"], low, high, color=colour, alpha=0.18, linewidth=0)
            for method in dict.fromkeys(run.point["method"] for run in runs):
                points = [run for run in runs if run.point["method"] == method]
                x, y = [run.point["tokens"] for run in points], [run.result["loss"] for run in points]
                axes.plot(x, y, style[method][1], color=style[method][0], markersize=4, alpha=0.8, label=method)
            axes.set_xscale("log")
            axes.margins(x=0.08)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(quantity))
            axes.set_xlabel("tokens")
            axes.set_ylabel("held-out loss, nats per token")

        if runs:
            plots.append(plot(f"fit-{rung}", f"{rung}: held-out loss against tokens, with the laws' bands", draw))
    return plots


def _draw_rows(axes: Any, rows: Iterable[tuple[str, dict[str, Any], tuple[str, str], float]]) -> None:
    """A value with its interval on each row: (label, entry, (colour, marker), size); an open end leaves the panel."""
    labels = []
    for row, (label, entry, (colour, marker), size) in enumerate(rows):
        labels.append(label)
        low, high = entry.get("low"), entry.get("high")
        if low is not None or high is not None:
            ends = [entry["value"] / 1e3 if low is None else low, entry["value"] * 1e3 if high is None else high]
            axes.plot(ends, [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(entry["value"], row, marker, color=colour, markersize=size)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def difference_plots(study: ReportData) -> list[Plot]:
    """A dot for each seed, and the mean with its interval, a panel a rung."""
    style, plots = colours(study.methods), []
    for rung in study.rungs:
        entries = [entry for entry in study.fit["differences"] if entry["rung"] == rung and entry["pairs"]]

        def draw(axes: Any) -> None:
            rows = []
            for row, entry in enumerate(entries):
                colour, seeds = style[entry["method"]][0], [pair["difference"] for pair in entry["pairs"]]
                axes.plot(seeds, [row + 0.25] * len(seeds), "o", color=colour, markersize=3.5, alpha=0.6)
                label = f"{entry['method']}, {quantity(entry['tokens'])}"
                rows.append((label, {**entry, "value": entry["mean"]}, (colour, "|"), 9.0))
            _draw_rows(axes, rows)
            axes.axvline(0.0, color=INK, linewidth=0.9)
            axes.set_xlabel("nats per token, below 0: better")

        if entries:
            title = f"{rung}: held-out loss less {study.baseline}'s, same seed"
            alt = f"{title}: each seed, and the mean with its interval"
            plots.append(plot(f"differences-{rung}", title, draw, height=1.35 + 0.27 * len(entries), alt=alt))
    return plots


def multiplier_plots(study: ReportData) -> list[Plot]:
    """At equal tokens: a row for all of a method, each rung, each budget."""
    style, rows, ends = colours(study.methods), [], [1.0]
    for method, level, at in study.multiplier_levels():
        label, size = (f"{method}: all runs", 7.0) if level == "all runs" else (level, 4.0)
        rows.append((label, at["equal_tokens"], style[method], size))
        # An interval without a bound would press all others together: four times further out it is cut.
        value = at["equal_tokens"]["value"]
        ends += [min(max(at["equal_tokens"][end] or value, value / 4), value * 4) for end in ("low", "high")]

    def draw(axes: Any) -> None:
        _draw_rows(axes, rows)
        axes.axvline(1.0, color=INK, linewidth=0.9)
        axes.set_xlim(min(ends) / 1.02, max(ends) * 1.02)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.set_xlabel("above 1: fewer tokens for the same loss")

    return [plot("multipliers", "Effective compute multiplier", draw, height=1.3 + 0.21 * len(rows))] if rows else []


def depth_plots(study: ReportData) -> list[Plot]:
    """Mean depth weights at the end of training, layers by sources, of the longest runs of a rung and method."""
    plots = []
    for rung in study.rungs:
        for method in study.methods:
            runs = [run for run in study.of(rung=rung, method=method) if run.record.depth]
            longest = max((run.point["tokens"] for run in runs), default=0)
            last = [run.record.depth for run in runs if run.point["tokens"] == longest]
            if last:
                title = f"{rung}, {method}, mean of {len(last)} seed{'s' if len(last) > 1 else ''}"
                plots.append(plot(f"depth-{rung}-{method}", title, _weights(last), height=1.5 + 0.26 * len(last[0])))
    return plots


def _weights(last: list[Layers]) -> Callable[[Any], None]:
    layers = list(last[0])
    sources = sorted({source for at in last for seen, _ in at.values() for source in seen})
    grid = np.full((len(layers), len(sources) + 1), np.nan)
    for row, layer in enumerate(layers):
        columns = [*(sources.index(source) for source in last[0][layer][0]), len(sources)]
        grid[row, columns] = np.mean([at[layer][1] for at in last], axis=0)

    def draw(axes: Any) -> None:
        # A mesh of rectangles, no pixels. Many sources share 1: small weights need the colours.
        mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap="cividis", norm=PowerNorm(0.5, 0.0, 1.0), linewidth=0)
        if grid.size <= 150:
            for (row, column), weight in np.ndenumerate(grid):
                if not np.isnan(weight):
                    place = {"ha": "center", "va": "center", "color": "black" if weight > 0.25 else "white"}
                    axes.text(column + 0.5, row + 0.5, f"{weight:.2f}", fontsize=7, **place)
        axes.figure.colorbar(mesh, ax=axes, label="weight", fraction=0.05)
        axes.set_xticks(np.arange(len(sources) + 1) + 0.5, [*map(str, sources), "self"])
        axes.set_yticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers])
        axes.set_ylim(len(layers), 0)
        axes.grid(visible=False)
        axes.set_xlabel("source layer")
        axes.set_ylabel("layer")

    return draw
