"""Tables of a study's report, as text: one source for the page and for the Markdown."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from megatron_depthattn.study.report_inputs import Study

Interval = dict[str, Any]


class Table(NamedTuple):
    """Rows of text below a caption; the first cell of a row names it."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


def quantity(value: float, _: object = None) -> str:
    """12_300_000 as '12.3M'. The second argument is a tick's position, which matplotlib gives."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def power(value: float, _: object = None) -> str:
    """1.1e13 as '1.1e13': no sign or leading zero in the exponent."""
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.3g}")


def interval(entry: Interval | None, form: str = ".3g") -> str:
    """'1.06 [1.01, 1.12]' with what is known of it, or the reason why nothing is."""
    if not entry or entry.get("value") is None:
        return f"none: {entry['refused']}" if entry and entry.get("refused") else "none"
    return f"{format(entry['value'], form)}{bounds(entry, form)}"


def bounds(entry: Interval, form: str) -> str:
    """' [low, high]'; empty where there is no interval, 'open' for an end that is."""
    low, high = (entry.get(end) for end in ("low", "high"))
    if low is None and high is None:
        return ""
    return " [{}, {}]".format(*("open" if end is None else format(end, form) for end in (low, high)))


def rung_table(study: Study) -> Table:
    rows = []
    for rung in study.plan["rungs"]:
        tokens = sorted({run.point["tokens"] for run in study.of(rung=rung["rung"])})
        rows.append(
            [
                rung["rung"],
                quantity(rung["size"]),
                quantity(rung["parameters"]),
                str(rung["num_layers"]),
                str(rung["hidden_size"]),
                str(rung["global_batch_size"]),
                f"{rung['learning_rate']:g}",
                ", ".join(map(quantity, tokens)),
            ]
        )
    columns = ["rung", "size N", "parameters", "layers", "width", "batch", "learning rate", "tokens"]
    return Table("Size N: the baseline's weights without the embedding table, as in the fits", columns, rows)


def law_table(study: Study) -> Table:
    rows = []
    for method in study.methods:
        law = study.fit["laws"].get(method, {"refused": "no finished run"})
        if law.get("refused"):
            rows.append([method, f"not fitted: {law['refused']}", "", "", "", "", ""])
        else:
            terms = [interval(law.get(name)) for name in ("E", "A", "alpha", "B", "beta")]
            rows.append([method, *terms, f"{law['rmse']:.2g}" if law.get("rmse") is not None else ""])
    return Table("The laws", ["method", "E", "A", "alpha", "B", "beta", "rmse, nats"], rows)


def held_out_table(study: Study) -> Table:
    held_out = study.fit["held_out"]
    rows = []
    for method, entries in held_out.get("methods", {}).items():
        for entry in entries:
            predicted = entry["predicted"]
            inside = _inside(predicted, entry["measured"])
            measured, missed = f"{entry['measured']:.4f}", f"{entry['missed_by']:+.4f}"
            rows.append([method, quantity(entry["tokens"]), interval(predicted, ".4f"), measured, missed, inside])
    rows += [[method, "", f"none: {reason}", "", "", ""] for method, reason in held_out.get("left_out", {}).items()]
    columns = ["method", "tokens", "predicted", "measured", "missed by", "inside the interval"]
    return Table(f"Rung {held_out.get('rung', 'held out')}: left out of the fit, then predicted by it", columns, rows)


def _inside(predicted: Interval, measured: float) -> str:
    low, high = predicted.get("low"), predicted.get("high")
    if low is None or high is None:
        return ""
    return "yes" if low <= measured <= high else "no"


def multiplier_table(study: Study) -> Table:
    rows = []
    for method in study.methods[1:]:
        entry = study.fit["multipliers"].get(method, {})
        if "equal_tokens" not in entry:
            rows.append([method, "all", f"none: {entry.get('refused', 'the fit has none')}", "", ""])
            continue
        both = [interval(entry.get(kind), ".3f") for kind in ("equal_tokens", "equal_time")]
        rows.append([method, "all", *both, entry.get("verdict", "none")])
        parts = dict(entry.get("rungs", {}))
        parts |= {f"{budget} tokens per weight": at for budget, at in entry.get("budgets", {}).items()}
        for part, at in parts.items():
            rows.append([method, part, *(interval(at.get(kind), ".3f") for kind in ("equal_tokens", "equal_time")), ""])
    columns = ["method", "runs", "at equal tokens", "at equal wall time", "verdict"]
    return Table(f"Tokens, and time, that {study.baseline} needs for the same loss, over the method's", columns, rows)


def difference_table(study: Study) -> Table:
    rows = []
    for entry in sorted(
        study.fit["differences"],
        key=lambda of: (study.rungs.index(of["rung"]), study.methods.index(of["method"]), of["tokens"]),
    ):
        each = "; ".join(
            f"{pair['seed']}: {pair['baseline']:.4f} to {pair['loss']:.4f} ({pair['difference']:+.4f})"
            for pair in entry["pairs"]
        )
        mean = "none" if entry.get("mean") is None else f"{entry['mean']:+.4f}{bounds(entry, '+.4f')}"
        rows.append([entry["rung"], entry["method"], quantity(entry["tokens"]), mean, str(len(entry["pairs"])), each])
    columns = ["rung", "method", "tokens", "mean difference", "pairs", f"seed: {study.baseline} to method"]
    return Table(f"Held-out loss less that of {study.baseline} with the same seed and tokens, nats", columns, rows)


def cost_table(study: Study) -> Table:
    rows = []
    timing = study.results.get("timing") or {}
    for rung in study.rungs:
        for method in study.methods:
            runs = study.of(rung=rung, method=method)
            if not runs:
                continue
            finished = [run for run in runs if run.measured]
            spent = [(run.result.get("seconds") or 0.0) * run.point.get("world", 1) for run in runs]
            step = timing.get(rung, {}).get(method, {})
            seconds, ratio = step.get("seconds_per_step"), step.get("ratio")
            rows.append(
                [
                    rung,
                    method,
                    f"{len(finished)} of {len(runs)}",
                    power(runs[0].point["flops"] / runs[0].point["tokens"]),
                    power(sum(run.point["flops"] for run in finished)),
                    f"{sum(spent) / 3600:.3g}",
                    "not timed" if seconds is None else f"{seconds:.4g}",
                    "not timed" if ratio is None else f"{ratio:.3f}{bounds(step, '.3f')}",
                ]
            )
    columns = [
        "rung",
        "method",
        "finished",
        "FLOPs a token",
        "FLOPs of finished runs",
        "device-hours",
        "seconds a step",
    ]
    caption = f"Seconds a step: {study.results.get('timing_source') or 'not timed'}"
    return Table(caption, [*columns, "step time over the baseline's"], rows)


def point_table(study: Study) -> Table:
    rows = []
    for run in study.runs:
        point, result = run.point, run.result
        loss, seconds = result.get("loss"), result.get("seconds")
        rows.append(
            [
                point["id"],
                "none" if loss is None else f"{loss:.4f}",
                run.status,
                f"{point['tokens']:,}",
                f"{point['parameters']:,}",
                power(point["flops"]),
                "none" if seconds is None else f"{seconds:.1f}",
                str(result.get("commit") or ""),
                str(result.get("code") or ""),
                point["config"],
                point["run_dir"],
            ]
        )
    columns = ["point", "loss", "status", "tokens", "parameters", "FLOPs", "seconds", "commit", "code", "config"]
    return Table("Every planned point; paths are relative to the study's folder", [*columns, "run directory"], rows)


def machines(study: Study) -> list[str]:
    """One line for each different machine, set of versions and date that the results were made with."""
    lines: dict[str, int] = {}
    for run in study.runs:
        result = run.result
        versions = ", ".join(f"{name} {version}" for name, version in sorted((result.get("versions") or {}).items()))
        parts = [part for part in (result.get("machine"), versions, result.get("date")) if part]
        if parts:
            line = "; ".join(parts)
            lines[line] = lines.get(line, 0) + 1
    return [f"{count} run{'s' if count > 1 else ''}: {line}" for line, count in lines.items()]
