"""Losses of runs at equal steps and at equal time, the config keys in which they differ, a figure.

The first run is what the others are compared with. Time is that of the steps alone: no evaluation, no checkpoints, no
start. The training loss is the mean since the row above. Between two evaluations the held-out loss at a time is read
off a straight line. Held-out splits by name (`data.held_out`) follow in a table of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_depthattn.cli.common import check, new_parser, print_table, run
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable


@dataclass(frozen=True)
class Curves:
    """A run's losses."""

    name: str
    settings: Mapping[str, Any]
    """Its config, by dotted key."""
    train: Mapping[int, float]
    """Step -> loss."""
    held_out: Mapping[int, float]
    """Step -> held-out loss."""
    splits: Mapping[int, Mapping[str, float]]
    """Step -> held-out loss by the name of its split, where there is any; the own val split has the name ''."""
    seconds: Mapping[int, float]
    """Step -> seconds of all steps up to it."""

    def held_out_at(self, seconds: float) -> float:
        """Held-out loss at a time between the first and the last evaluation."""
        import numpy as np

        return float(np.interp(seconds, [self.seconds[step] for step in self.held_out], list(self.held_out.values())))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 with one line on stderr."""
    parser = new_parser("compare", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=user_path, help="run folder, with its metrics.jsonl")
    split = "which split of data.held_out to compare by (default: the val split of the run's own data)"
    parser.add_argument("--held-out", default="", metavar="NAME", help=split)
    figure = "plot the losses against steps and seconds; .png, .svg, .pdf (needs matplotlib)"
    parser.add_argument("--figure", type=user_path, metavar="FILE", help=figure)
    return run(_compare, parser.parse_args(arguments))


def _compare(given: argparse.Namespace) -> None:
    check((len(given.runs) < 2, f"only {given.runs[0]} is given: name two runs or more"))
    curves = [read_curves(folder, given.runs, given.held_out) for folder in given.runs]
    names = [each.name for each in curves]
    settings = [(key, *(str(each.settings.get(key)) for each in curves)) for key in curves[0].settings]
    differing = [row for row in settings if row[0] != "run.dir" and len(set(row[1:])) > 1]
    print_table(("differs", *names), differing)
    steps = sorted(set.intersection(*(set(each.held_out) for each in curves)))
    check((len(steps) < 2, "fewer than two steps have a held-out loss in all runs: set train.eval_interval alike"))
    shown = [step for step in _spread(steps) if step > 0] or steps[-1:]
    rows = []
    for before, step in pairwise([0, *shown]):
        losses = [fmean(loss for at, loss in each.train.items() if before < at <= step) for each in curves]
        rows.append((f"{step:,}", *_cells([each.held_out[step] for each in curves]), *_cells(losses)))
    print_table(("step", *_columns("held-out", names), *_columns("train", names)), rows, title="at equal steps")
    shared = {step: set.intersection(*(set(each.splits.get(step, ())) for each in curves)) for step in steps}
    if found := sorted(shared[steps[-1]] - {""}):
        rows = [(name, *_cells([each.splits[steps[-1]][name] for each in curves])) for name in found]
        print_table(("split", *_columns("held-out", names)), rows, title=f"at step {steps[-1]:,}")
    first = max(each.seconds[min(each.held_out)] for each in curves)
    last = min(each.seconds[max(each.held_out)] for each in curves)
    times = [*(time for step in curves[0].held_out if first < (time := curves[0].seconds[step]) < last), last]
    rows = [(f"{time:,.1f}", *_cells([each.held_out_at(time) for each in curves])) for time in _spread(times)]
    print_table(("seconds", *_columns("held-out", names)), rows, title="at equal time of training steps")
    for each in curves:
        step = max(each.seconds)
        print(printable(f"{each.name}: {each.seconds[step] / step:.4g} s a step, {step:,} steps"))
    if given.figure:
        _plot(curves, given.figure)
        print(f"wrote {given.figure}")


def read_curves(folder: Path, others: Sequence[Path] = (), split: str = "") -> Curves:
    """The losses of one run; ``split``: see `Curves.splits`.

    Raises:
        ValueError: the folder is no run, or the run has not come to an evaluation.
    """
    from megatron_depthattn.config import to_dict
    from megatron_depthattn.config.load import flatten, load_record
    from megatron_depthattn.train.line_files import NUMBER, held_out_losses, read_records

    records = list(read_records(folder / "metrics.jsonl", step=int, loss=NUMBER, step_seconds=NUMBER))
    splits = {record["step"]: losses for record in records if (losses := held_out_losses(record))}
    held_out = {step: losses[split] for step, losses in splits.items() if split in losses}
    others_named = sorted({name for losses in splits.values() for name in losses} - {split, ""})
    way = f", or give --held-out with one of {', '.join(others_named)}" if others_named else ""
    check(
        (not records, f"{folder} has no metrics.jsonl with steps: give the folder of a run"),
        (
            len(held_out) < 2,
            f"{folder} has {len(held_out)} held-out losses{f' of {split}' if split else ''}: train on, with "
            f"train.eval_interval set{way}",
        ),
    )
    config = folder / "config.yaml"
    settings = flatten(to_dict(load_record(config))) if config.is_file() else {}
    steps = [record["step"] for record in records]
    seconds = dict(zip(steps, accumulate(record["step_seconds"] for record in records), strict=True))
    is_unique = [other.name for other in others].count(folder.name) < 2
    train = {record["step"]: record["loss"] for record in records}
    return Curves(folder.name if is_unique else str(folder), settings, train, held_out, splits, seconds)


def _columns(kind: str, names: Sequence[str]) -> list[str]:
    baseline, *others = names
    return [f"{kind} {baseline}", *chain(*((f"{kind} {name}", "difference") for name in others))]


def _cells(losses: Sequence[float]) -> list[str]:
    baseline, *others = losses
    pairs = ((f"{loss:.4f}", f"{round(loss - baseline, 4) + 0.0:+.4f}") for loss in others)
    return [f"{baseline:.4f}", *chain(*pairs)]


def _spread(values: Sequence[Any]) -> list[Any]:
    """At most ten, evenly spread, the last among them."""
    stride = -(-len(values) // 10)
    return list(values[::-1][::stride][::-1])


def _plot(curves: Sequence[Curves], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--figure needs matplotlib: pip install 'megatron-depthattn[plot]'") from error
    figure = Figure((10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, label in zip(axes, ("step", "seconds of training steps"), strict=True):
        for i, each in enumerate(curves):
            for losses, style in (
                (each.train, {"alpha": 0.3, "lw": 0.8}),
                (each.held_out, {"marker": "o", "ms": 3.5, "label": f"{each.name}, held-out"}),
            ):
                at = list(losses) if axis is axes[0] else [each.seconds[step] for step in losses]
                axis.plot(at, list(losses.values()), color=f"C{i}", **style)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("loss (thin: training)")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=150)
