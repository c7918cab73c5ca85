"""What a study's report is made of: plan.json, results.json, fit.json and the runs' records, read and held against
each other. A fit of other results than those in the folder is refused: its figures would stand beside points that it
never saw."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megatron_depthattn.train.line_files import read_records

METRICS = "metrics.jsonl"


class Depth(NamedTuple):
    """Mean depth weights of one moment: ``layers[layer]`` is (sources, weights), its last weight that on itself."""

    tokens: int
    layers: dict[int, tuple[list[int], list[float]]]


class Record(NamedTuple):
    """What figures need of a run's metrics.jsonl: (tokens so far, nats per token), null values left out."""

    train_loss: list[tuple[int, float]]
    eval_loss: list[tuple[int, float]]
    depth: list[Depth]


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
        reason = self.result.get("refused") or self.result.get("reason") or self.point.get("refused")
        step, steps = self.result.get("step") or 0, self.point["steps"]
        status = f"unfinished: step {step} of {steps}" if step else "not started"
        return f"{status} ({reason})" if reason else status


@dataclass(frozen=True, kw_only=True)
class Study:
    """All inputs of a report. `methods`: the baseline first, the others in the plan's order."""

    plan: dict[str, Any]
    results: dict[str, Any]
    fit: dict[str, Any]
    runs: list[Run]
    methods: list[str]

    @property
    def baseline(self) -> str:
        return str(self.plan["baseline"])

    @property
    def rungs(self) -> list[str]:
        return [rung["rung"] for rung in self.plan["rungs"]]

    def of(self, *, rung: str | None = None, method: str | None = None) -> list[Run]:
        """The runs of a rung, a method or both."""
        return [run for run in self.runs if rung in (None, run.point["rung"]) and method in (None, run.point["method"])]


def read_study(output: Path) -> Study:
    """Reads the study's folder.

    Raises:
        ValueError: a file is missing or cannot be read, or two do not belong together; says what to run.
    """
    plan = _read(output, "plan.json", "plan")
    results = _read(output, "results.json", "run")
    fit = _read(output, "fit.json", "fit")
    try:
        return _study(output, plan, results, fit)
    except KeyError as missing:
        raise ValueError(
            f"plan.json, results.json or fit.json lacks {missing}: run the verbs of the study again"
        ) from None


def _study(output: Path, plan: dict[str, Any], results: dict[str, Any], fit: dict[str, Any]) -> Study:
    by_id = {result["id"]: result for result in results["results"]}
    unknown = sorted(by_id.keys() - {point["id"] for point in plan["points"]})
    if unknown:
        raise ValueError(f"results.json has {unknown[0]}, which plan.json does not: run `plan`, then `run`, again")
    if fit["baseline"] != plan["baseline"]:
        raise ValueError(
            f"fit.json compares with {fit['baseline']}, plan.json with {plan['baseline']}: run `fit` again"
        )
    runs = [_run(output, point, by_id.get(point["id"], {})) for point in plan["points"]]
    methods = dict.fromkeys([plan["baseline"], *(point["method"] for point in plan["points"])])
    study = Study(plan=plan, results=results, fit=fit, runs=runs, methods=list(methods))
    _check_fit(study)
    return study


def _read(output: Path, name: str, verb: str) -> dict[str, Any]:
    try:
        content = json.loads((output / name).read_text())
    except FileNotFoundError:
        raise ValueError(f"the study's folder has no {name}: run `{verb}` first") from None
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}): run `{verb}` again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds no object: run `{verb}` again")
    return content


def _run(output: Path, point: dict[str, Any], result: dict[str, Any]) -> Run:
    for key in ("config", "run_dir"):
        if PurePosixPath(point[key]).is_absolute():
            raise ValueError(f"{point['id']}: {key} has to be relative to the study's folder: run `plan` again")
    run = Run(point, result, read_record(output / point["run_dir"] / METRICS))
    if run.measured and not run.record.train_loss:
        raise ValueError(
            f"{point['id']} is finished, but {point['run_dir']}/{METRICS} is missing: copy the run directories too"
        )
    return run


def read_record(path: Path) -> Record:
    """The losses and depth weights of one metrics.jsonl; empty without the file."""
    record = Record([], [], [])
    for step in read_records(path):
        tokens = step["tokens"]
        if step.get("loss") is not None:
            record.train_loss.append((tokens, step["loss"]))
        if step.get("eval_loss") is not None:
            record.eval_loss.append((tokens, step["eval_loss"]))
        if step.get("depth"):
            layers = step["depth"]["layers"].items()
            moment = {int(layer): (entry["sources"], entry["weights"]) for layer, entry in layers}
            record.depth.append(Depth(tokens, dict(sorted(moment.items()))))
    return record


def _check_fit(study: Study) -> None:
    """Every pair of the fit is a pair of results, with the same losses, and the other way round."""
    losses = {
        (p["rung"], p["tokens"], p["seed"], p["method"]): run.result["loss"]
        for run in study.runs
        if run.measured
        for p in [run.point]
    }
    pairs = {
        (d["rung"], d["tokens"], pair["seed"], d["method"]): (pair["baseline"], pair["loss"])
        for d in study.fit["differences"]
        for pair in d["pairs"]
    }
    for key, loss in losses.items():
        baseline = losses.get((*key[:3], study.baseline))
        if key[3] != study.baseline and baseline is not None and pairs.pop(key, None) != (baseline, loss):
            raise ValueError(f"fit.json has no pair or another loss for {_name(key)}: run `fit` again")
    if pairs:
        raise ValueError(f"fit.json has a pair for {_name(next(iter(pairs)))}, which is unfinished: run `fit` again")


def _name(key: tuple[str, float, int, str]) -> str:
    return f"{key[3]} at {key[0]}, {key[1]:.0f} tokens, seed {key[2]}"
