"""What the runs of a study have brought so far, read from their records."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_depthattn.study.plan import Point
from megatron_depthattn.study.run import progress_of
from megatron_depthattn.train.history import HISTORY, METRICS
from megatron_depthattn.train.line_files import read_records

RESULTS, TIMING = "results.json", "timing.json"


def collect_results(points: Sequence[Point], output: Path, *, baseline: str, own_steps: bool = False) -> dict[str, Any]:
    """Write ``results.json`` below ``output`` and return what it holds: every point, finished or not, and timing."""
    timing, source = _timing(points, output, baseline, own_steps=own_steps)
    results = {
        "results": [_result(point, output) for point in points],
        "timing": timing,
        "timing_source": source,
    }
    (output / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _result(point: Point, output: Path) -> dict[str, Any]:
    run_dir = output / point.run_dir
    progress = progress_of(point, output)
    records = list(read_records(run_dir / METRICS, step=int))
    history = list(read_records(run_dir / HISTORY, event=str))
    starts = [record for record in history if record["event"] == "start"]
    losses = [record["eval_loss"] for record in records if record.get("eval_loss") is not None]
    is_finished = progress.state == "finished"
    return {
        "id": point.id,
        "finished": is_finished,
        "reason": None if is_finished else _reason_unfinished(history),
        "step": progress.step,
        "loss": losses[-1] if is_finished and losses and math.isfinite(losses[-1]) else None,
        "seconds": sum(record["step_seconds"] for record in records),
        "starts": len(starts),
        "commit": starts[-1].get("commit") if starts else None,
        "code": starts[-1]["version"].rpartition("-")[2] if starts else None,
        "machine": starts[-1].get("machine") if starts else None,
        "date": time.strftime("%Y-%m-%d", time.gmtime(starts[-1]["time"])) if starts else None,
    }


def _reason_unfinished(history: Sequence[dict[str, Any]]) -> str:
    if not history:
        return "not started"
    last = history[-1]
    if last["event"] == "start":
        return "running, or killed"
    return f"stopped by {last['signal']}" if "signal" in last else f"ended: {last['outcome']}"


def _timing(points: Sequence[Point], output: Path, baseline: str, *, own_steps: bool) -> tuple[dict[str, Any], str]:
    """Seconds of a step of every method at every rung, and where they are from."""
    file = output / TIMING
    if file.is_file():
        measured = json.loads(file.read_text(encoding="utf-8"))
        return measured["timing"], measured["timing_source"]
    if not own_steps:  # runs that may have shared their machine do not show how long a step takes
        return {}, "not timed yet"
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for point in points:
        steps = [
            record["step_seconds"] for record in read_records(output / point.run_dir / METRICS, step_seconds=float)
        ]
        if steps:
            seconds[point.rung, point.method].append(statistics.median(steps))
    timing: dict[str, Any] = defaultdict(dict)
    for (rung, method), medians in seconds.items():
        if (rung, baseline) in seconds:
            own, other = statistics.median(medians), statistics.median(seconds[rung, baseline])
            ratios = sorted(median / other for median in medians)
            timing[rung][method] = {
                "seconds_per_step": own,
                "ratio": own / other,
                "low": ratios[0],
                "high": ratios[-1],
            }
    return timing, "the runs' own steps (median of each run; from the fastest to the slowest run)"
