"""What a study's report is made of: plan.json, results.json, fit.json and the runs' records, compared with each other.

A fit of other results than those in the folder is an error: its figures would stand beside points that it never saw.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_depthattn.study.conclusion import per_weight
from megatron_depthattn.train.line_files import read_records

Run = dict[str, Any]
"""A planned point with its result, as far as there is one, and of its metrics.jsonl what figures need: `train_loss` and
`eval_loss`, lists of (tokens so far, nats per token), and `depth`, the depth weights that were recorded last."""
UNKNOWN = {"finished": False, "loss": None, "reason": "not started", "seconds": 0.0, "commit": "", "code": ""}


@dataclass(frozen=True)
class ReportData:
    """All inputs of a report. `methods`: the baseline first, the others in the plan's order."""

    plan: dict[str, Any]
    results: dict[str, Any]
    fit: dict[str, Any]
    runs: list[Run]
    trunks: list[Run]
    rungs: list[str]
    methods: list[str]
    baseline: str

    def of(self, *, rung: str, method: str | None = None) -> list[Run]:
        """The runs of a rung, or of a rung and method."""
        return [run for run in self.runs if run["rung"] == rung and method in (None, run["method"])]

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
    plan, results, fit = (_read(output, name, verb) for name, verb in (("plan",) * 2, ("results", "run"), ("fit",) * 2))
    try:
        found = {result["id"]: result for result in results["results"]}
        runs = [point | UNKNOWN | found.get(point["id"], {}) | _whole_record(output, point) for point in plan["points"]]
        done = {result["id"]: result for result in results.get("trunks", [])}
        trunks = [trunk | UNKNOWN | done.get(trunk["id"], {}) for trunk in plan.get("trunks", [])]
        entries = [fit["held_out"], *fit["laws"].values(), *fit["multipliers"].values()]
        if any({"verdict", "refused"} & entry.keys() for entry in entries):
            raise ValueError("fit.json is of an earlier version: run `fit` again")
        losses = {
            (run["rung"], run["tokens"], run["seed"], run["method"]): run["loss"]
            for run in runs
            if run["loss"] is not None
        }
        paired = {
            (of["rung"], of["tokens"], pair["seed"], method): loss
            for of in fit["differences"]
            for pair in of["pairs"]
            for method, loss in ((of["method"], pair["loss"]), (fit["baseline"], pair["baseline"]))
        }
        other = [key for key, loss in paired.items() if losses.get(key) != loss]
        if fit["baseline"] != plan["baseline"] or fit["num_observations"] != len(losses) or other:
            raise ValueError("fit.json was made from other results than those in results.json: run `fit` again")
        methods = list(dict.fromkeys([plan["baseline"], *(point["method"] for point in plan["points"])]))
        rungs = [rung["rung"] for rung in plan["rungs"]]
    except KeyError as missing:
        raise ValueError(f"plan.json, results.json or fit.json lacks {missing}: run the study's verbs again") from None
    return ReportData(plan, results, fit, runs, trunks, rungs, methods, plan["baseline"])


def _read(output: Path, name: str, verb: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((output / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"the study's folder has no {name}.json: run `{verb}` first") from None
    except ValueError as error:
        raise ValueError(f"{name}.json is not JSON ({error}): run `{verb}` again") from None
    return content


def _whole_record(output: Path, point: dict[str, Any]) -> dict[str, Any]:
    """The record of a point; of one that branches off a trunk, behind that part of the trunk's."""
    own = read_record(output / "runs" / point["id"] / "metrics.jsonl")
    if not point.get("trunk"):
        return own
    before = point["tokens"] * point["trunk_steps"] // (point["trunk_steps"] + point["steps"])
    trunk = read_record(output / "runs" / point["trunk"] / "metrics.jsonl")
    curves = {
        kind: [each for each in trunk[kind] if each[0] <= before] + [(before + at, loss) for at, loss in own[kind]]
        for kind in ("train_loss", "eval_loss")
    }
    return curves | {"depth": own["depth"] or trunk["depth"]}


def read_record(path: Path) -> dict[str, Any]:
    """The losses and depth weights of one metrics.jsonl; empty without the file."""
    steps, depth = list(read_records(path)), {}
    losses = {
        f"{kind}_loss": [(step["tokens"], step[key]) for step in steps if step.get(key) is not None]
        for kind, key in (("train", "loss"), ("eval", "eval_loss"))
    }
    for step in steps:
        if step.get("depth"):
            depth = {int(layer): (of["sources"], of["weights"]) for layer, of in step["depth"]["layers"].items()}
    return losses | {"depth": dict(sorted(depth.items()))}
