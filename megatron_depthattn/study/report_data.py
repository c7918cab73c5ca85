"""What a study's report is made of: plan.json, results.json, fit.json and the runs' records, compared with each other.

A fit of other results than those in the folder is an error: its figures would stand beside points that it never saw.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megatron_depthattn.study.verdict import per_weight
from megatron_depthattn.train.line_files import read_records

METRICS = "metrics.jsonl"


Layers = dict[int, tuple[list[int], list[float]]]
"""Mean depth weights of one moment: by layer (sources, weights), the last weight that on itself."""


class Record(NamedTuple):
    """What figures need of a run's metrics.jsonl: (tokens so far, nats per token), null values left out."""

    train_loss: list[tuple[int, float]]
    eval_loss: list[tuple[int, float]]
    depth: Layers
    """As last recorded."""


class Run(NamedTuple):
    """A planned point, with its result and record as far as there are any."""

    point: dict[str, Any]
    result: dict[str, Any]
    record: Record

    @property
    def measured(self) -> bool:
        """Finished, with a loss."""
        return bool(self.result.get("finished")) and self.result.get("loss") is not None

    @property
    def status(self) -> str:
        """'finished', or in words how far it came and, where the files say so, why no further."""
        if self.result.get("finished"):
            return "finished" if self.measured else "finished without a finite held-out loss"
        reason, step = self.result.get("reason"), self.result.get("step") or 0
        status = f"unfinished: step {step} of {self.point['steps']}" if step else "not started"
        return f"{status} ({reason})" if reason else status


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All inputs of a report. `methods`: the baseline first, the others in the plan's order."""

    plan: dict[str, Any]
    results: dict[str, Any]
    fit: dict[str, Any]
    runs: list[Run]
    methods: list[str]

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return str(self.plan["baseline"])

    @property
    def rungs(self) -> list[str]:
        """Names, in the plan's order."""
        return [rung["rung"] for rung in self.plan["rungs"]]

    def of(self, *, rung: str | None = None, method: str | None = None) -> list[Run]:
        """The runs of a rung, a method or both."""
        return [run for run in self.runs if rung in (None, run.point["rung"]) and method in (None, run.point["method"])]

    def finished(self, rung: str, method: str) -> str:
        """'2 of 3': how many of these runs have a loss."""
        runs = self.of(rung=rung, method=method)
        return f"{sum(run.measured for run in runs)} of {len(runs)}"

    def device_hours(self, rung: str, method: str) -> float:
        """Seconds in steps times devices of these runs, unfinished ones included."""
        runs = self.of(rung=rung, method=method)
        return sum((run.result.get("seconds") or 0.0) * run.point.get("world", 1) for run in runs) / 3600

    def multiplier_levels(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(method, which of its runs, the multipliers of these) of every method that has one."""
        for method in self.methods[1:]:
            entry = self.fit["multipliers"].get(method, {})
            budgets = {per_weight(budget): at for budget, at in entry.get("budgets", {}).items()}
            levels = {"all runs": entry, **entry.get("rungs", {}), **budgets} if "equal_tokens" in entry else {}
            yield from ((method, level, at) for level, at in levels.items())


def quantity(value: float, _: object = None) -> str:
    """12_300_000 as '12.3M'. The second argument is a tick's position, which matplotlib gives."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def read_report_data(output: Path) -> ReportData:
    """Read the study's folder.

    Raises:
        ValueError: a file is missing or cannot be read, or two do not belong together; says what to run.
    """
    plan, results, fit = (
        _read(output, name, verb) for name, verb in (("plan", "plan"), ("results", "run"), ("fit",) * 2)
    )
    try:
        by_id = {result["id"]: result for result in results["results"]}
        unknown = sorted(by_id.keys() - {point["id"] for point in plan["points"]})
        if unknown:
            raise ValueError(f"results.json has {unknown[0]}, which plan.json does not: run `plan`, then `run`, again")
        if fit["baseline"] != plan["baseline"]:
            raise ValueError(
                f"fit.json compares with {fit['baseline']}, plan.json with {plan['baseline']}: run `fit` again"
            )
        runs = [_run(output, point, by_id.get(point["id"], {})) for point in plan["points"]]
        methods = list(dict.fromkeys([plan["baseline"], *(point["method"] for point in plan["points"])]))
        study = ReportData(plan=plan, results=results, fit=fit, runs=runs, methods=methods)
        _check_fit(study)
    except KeyError as missing:
        raise ValueError(
            f"plan.json, results.json or fit.json lacks {missing}: run the verbs of the study again"
        ) from None
    return study


def _read(output: Path, name: str, verb: str) -> dict[str, Any]:
    try:
        content = json.loads((output / f"{name}.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"the study's folder has no {name}.json: run `{verb}` first") from None
    except ValueError as error:
        raise ValueError(f"{name}.json is not JSON ({error}): run `{verb}` again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name}.json holds no object: run `{verb}` again")
    return content


def _run(output: Path, point: dict[str, Any], result: dict[str, Any]) -> Run:
    for key in ("config", "run_dir"):
        if PurePosixPath(point[key]).is_absolute():
            raise ValueError(f"{point['id']}: {key} has to be relative to the study's folder: run `plan` again")
    return Run(point, result, read_record(output / point["run_dir"] / METRICS))


def read_record(path: Path) -> Record:
    """The losses and depth weights of one metrics.jsonl; empty without the file."""
    train_loss, eval_loss, depth = [], [], {}
    for step in read_records(path):
        if step.get("loss") is not None:
            train_loss.append((step["tokens"], step["loss"]))
        if step.get("eval_loss") is not None:
            eval_loss.append((step["tokens"], step["eval_loss"]))
        if step.get("depth"):
            depth = {int(layer): (of["sources"], of["weights"]) for layer, of in step["depth"]["layers"].items()}
    return Record(train_loss, eval_loss, dict(sorted(depth.items())))


def _check_fit(study: ReportData) -> None:
    """Every pair of the fit is a pair of results, with the same losses, and the other way round."""
    losses = {
        (run.point["rung"], run.point["tokens"], run.point["seed"], run.point["method"]): run.result["loss"]
        for run in study.runs
        if run.measured
    }
    measured = {
        (*key, losses[*key[:3], study.baseline], loss)
        for key, loss in losses.items()
        if key[3] != study.baseline and (*key[:3], study.baseline) in losses
    }
    fitted = {
        (of["rung"], of["tokens"], pair["seed"], of["method"], pair["baseline"], pair["loss"])
        for of in study.fit["differences"]
        for pair in of["pairs"]
    }
    for rung, tokens, seed, method, *_ in sorted(measured ^ fitted):
        raise ValueError(
            f"fit.json does not have the loss in results.json of {method} at {rung}, {tokens:.0f} tokens, seed {seed}: "
            "run `fit` again"
        )
