"""Depth weights of a study's runs: where each layer's attention over depth ended, and how it came there."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_depthattn.study.picture import Picture, picture
from megatron_depthattn.study.report_inputs import Run, Study
from megatron_depthattn.study.report_tables import quantity


def depth_figures(study: Study) -> list[list[Picture]]:
    """Mean depth weights at the end of training, layers by sources, and each layer's weight on itself over training."""
    maps, courses = [], []
    for rung in study.rungs:
        for method in study.methods:
            runs = [run for run in study.of(rung=rung, method=method) if run.record.depth]
            if not runs:
                continue
            budget = max(run.point["tokens"] for run in runs)
            runs = [run for run in runs if run.point["tokens"] == budget]
            seeds = f"mean of {len(runs)} seed{'s' if len(runs) > 1 else ''}"
            where = f"{rung}, {method}, {seeds}"
            layers = len(runs[0].record.depth[-1].layers)
            alt = f"Mean weight of each layer on its sources and on itself at the end of training: {where}"
            paint = partial(_paint_weights, runs=runs)
            maps.append(picture(f"depth-{rung}-{method}", where, alt, paint, height=1.5 + 0.26 * layers))
            alt = f"Weight of each layer on itself against tokens: {where}"
            paint = partial(_paint_self_weights, runs=runs)
            courses.append(picture(f"self-{rung}-{method}", f"{where}: self weight", alt, paint))
    return [maps, courses]


def _paint_weights(axes: Any, runs: list[Run]) -> None:
    last = [run.record.depth[-1].layers for run in runs]
    layers = list(last[0])
    sources = sorted({source for at in last for seen, _ in at.values() for source in seen})
    grid = np.full((len(layers), len(sources) + 1), np.nan)
    for row, layer in enumerate(layers):
        names, _ = last[0][layer]
        columns = [*(sources.index(source) for source in names), len(sources)]
        grid[row, columns] = np.mean([at[layer][1] for at in last], axis=0)
    # Rectangles of a mesh, not an image: no pixels in the page. Many sources share 1: small weights need the colours.
    mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap="cividis", norm=PowerNorm(0.5, 0.0, 1.0), linewidth=0)
    if grid.size <= 150:
        for (row, column), weight in np.ndenumerate(grid):
            if not np.isnan(weight):
                colour = "black" if weight > 0.25 else "white"
                axes.text(column + 0.5, row + 0.5, f"{weight:.2f}", ha="center", va="center", color=colour, fontsize=7)
    axes.figure.colorbar(mesh, ax=axes, label="weight", fraction=0.05)
    axes.set_xticks(np.arange(len(sources) + 1) + 0.5, [*map(str, sources), "self"])
    axes.set_yticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers])
    axes.set_ylim(len(layers), 0)
    if len(sources) > 10:
        axes.tick_params(axis="x", labelsize=7)
    axes.grid(visible=False)
    axes.set_xlabel("source layer")
    axes.set_ylabel("layer")


def _paint_self_weights(axes: Any, runs: list[Run]) -> None:
    layers = list(runs[0].record.depth[-1].layers)
    shades = colormaps["viridis"](np.linspace(0.2, 0.85, len(layers)))
    every = math.ceil(len(layers) / 9)
    for index, (layer, shade) in enumerate(zip(layers, shades, strict=True)):
        curves = [
            np.array([(at.tokens, at.layers[layer][1][-1]) for at in run.record.depth], dtype=float).T for run in runs
        ]
        tokens = min((curve[0] for curve in curves), key=len)
        weight = np.mean([np.interp(tokens, *curve) for curve in curves], axis=0)
        axes.plot(tokens, weight, color=tuple(shade), linewidth=1.4, label=None if index % every else f"layer {layer}")
    axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(quantity))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_ylabel("mean weight on itself")
