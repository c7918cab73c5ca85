"""What the runs of a study have brought so far, read from their records."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megatron_depthattn.study.plan import Point, read_points
from megatron_depthattn.study.run import progress_of
from megatron_depthattn.terminal import printable
from megatron_depthattn.train.history import HISTORY, METRICS
from megatron_depthattn.train.line_files import read_records

RESULTS, TIMING = "results.json", "timing.json"


def collect_results(points: Sequence[Point], output: Path, *, baseline: str, own_steps: bool = False) -> dict[str, Any]:
    """Write ``results.json`` below ``output`` and return what it holds: every point, finished or not, and timing.

    Args:
        own_steps: without a ``timing.json`` the runs' own steps count; runs that may have shared their machine do not
            show how long a step takes.
    """
    timing = read_timing(output)
    if own_steps and not timing["timing"]:
        source = "the runs' own steps (median of each run; from the fastest to the slowest run)"
        timing = {"timing": _own_steps(points, output, baseline), "timing_source": source}
    results = {"results": [_result(point, output) for point in points]} | timing
    if trunks := read_points(output, "trunks"):
        results["trunks"] = [_result(trunk, output) for trunk in trunks]
        finished = [point for point, of in zip(points, results["results"], strict=True) if of["finished"]]
        done = [*zip((*points, *trunks), (*results["results"], *results["trunks"]), strict=True)]
        spent = 0.0
        for run, of in done:  # a branch that is finished shows how far its trunk came, where the record of that is gone
            step = max([of["step"], *(point.trunk_steps for point in finished if point.trunk == run.id)])
            spent += run.flops * run.own_share * min(1.0, step / run.steps)
            if step > of["step"]:
                lacks = (
                    "its FLOPs are counted, its device-hours and the beginning of its branches' curves are not there"
                )
                print(printable(f"warning: {run.id} has no record of {step} steps that were trained: {lacks}"))
        results["flops"] = {"spent": spent, "in_separate_runs": sum(point.flops for point in finished)}
    (output / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def read_timing(output: Path) -> dict[str, Any]:
    """``timing.json`` below ``output``: seconds of a step of every method at every rung, and where they are from."""
    file = output / TIMING
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found or {"timing": {}, "timing_source": "not timed yet"}


def _result(point: Point, output: Path) -> dict[str, Any]:
    progress = progress_of(point, output)
    records = list(read_records(output / point.run_dir / METRICS, step=int))
    history = list(read_records(output / point.run_dir / HISTORY, event=str))
    starts = [record for record in history if record["event"] == "start"]
    losses = [record["eval_loss"] for record in records if record.get("eval_loss") is not None]
    is_finished = progress.state == "finished"
    loss = losses[-1] if is_finished and losses and math.isfinite(losses[-1]) else None
    reason = "finished without a finite held-out loss" if loss is None else None
    if not is_finished:
        end = history[-1] if history else {}
        how = f"stopped by {end['signal']}" if "signal" in end else end.get("outcome", "running, or killed")
        reason = f"step {progress.step} of {point.steps}, {how}" if history else "not started"
    found = {"id": point.id, "finished": is_finished, "reason": reason, "step": progress.step, "loss": loss}
    found |= {"seconds": sum(record["step_seconds"] for record in records), "starts": len(starts)}
    if starts:
        last = starts[-1]
        found |= {"commit": last.get("commit"), "code": last["version"].rpartition("-")[2]}
        found |= {"machine": last.get("machine"), "date": time.strftime("%Y-%m-%d", time.gmtime(last["time"]))}
    return found


def _own_steps(points: Sequence[Point], output: Path, baseline: str) -> dict[str, Any]:
    medians: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        steps = [of["step_seconds"] for of in read_records(output / point.run_dir / METRICS, step_seconds=float)]
        if steps:
            medians[point.rung][point.method].append(median(steps))
    timing: dict[str, Any] = defaultdict(dict)
    for rung, methods in medians.items():
        for method, seconds in methods.items() if baseline in methods else ():
            low, middle, high = (of(seconds) / median(methods[baseline]) for of in (min, median, max))
            timing[rung][method] = {"seconds_per_step": median(seconds), "ratio": middle, "low": low, "high": high}
    return timing
