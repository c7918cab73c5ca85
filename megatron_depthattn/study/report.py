"""A scale study's report: one HTML page that holds all it shows, and a Markdown file with the paired differences.

Both are made from plan.json, results.json, fit.json and the run directories. The same inputs give the same bytes. The
page fetches nothing: no script, no font, no link.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_depthattn.study.report_data import ReportData, quantity, read_report_data
from megatron_depthattn.study.verdict import bounds

if TYPE_CHECKING:
    from megatron_depthattn.study.plots import Plot

Interval = dict[str, Any]


class Table(NamedTuple):
    """Rows of text; the first cell of a row names it."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


class Section(NamedTuple):
    """A part of the page."""

    title: str
    texts: list[str]
    tables: list[Table]
    plots: list[Plot]


def write_report(output: Path, figures_dir: Path | None = None) -> tuple[Path, Path]:
    """Write report.html and report.md into the study's folder and return their paths.

    Args:
        output: the study's folder, with plan.json, results.json, fit.json and the run directories.
        figures_dir: where the figures are written too, one SVG file each; the Markdown shows them if it is
            below `output`.

    Raises:
        ValueError: a library or an input is missing, or inputs do not belong together; says what to run.
    """
    for library in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"the report needs {library}: pip install 'megatron-depthattn[study]'")
    import jinja2

    study = read_report_data(output)
    sections = _sections(study)
    values = {
        "title": study.plan.get("title") or study.plan["study"],
        "question": study.plan.get("question") or _question(study),
        "answers": _answers(study),
        "progress": _progress(study),
        "sections": sections,
    }
    shown = []
    for plot in [plot for section in sections if figures_dir for plot in section.plots]:
        assert figures_dir is not None
        figures_dir.mkdir(parents=True, exist_ok=True)
        (figures_dir / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
        if figures_dir.resolve().is_relative_to(output.resolve()):
            shown.append(f"![{plot.alt}]({Path(os.path.relpath(figures_dir, output), plot.name).as_posix()}.svg)")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    page, markdown = output / "report.html", output / "report.md"
    page.write_text(environment.get_template("report.html.j2").render(values), encoding="utf-8")
    markdown.write_text(_markdown(values, difference_table(study), shown), encoding="utf-8")
    return page, markdown


def _markdown(values: dict[str, Any], table: Table, shown: list[str]) -> str:
    # A study's own words may come from elsewhere: no HTML, link or image of theirs.
    title, question = (
        re.sub(r"[<>\[\]`\\]", r"\\\g<0>", " ".join(values[key].split())) for key in ("title", "question")
    )
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = [
        f"# {title}",
        question,
        "\n".join(f"- **{method}: {verdict}.** {said}" for method, verdict, said in values["answers"]),
    ]
    lines += [values["progress"], f"{table.caption}:"]
    lines += ["\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)]
    lines += [*shown, "The page beside this file, `report.html`, holds the rest: open it in a browser."]
    return "\n\n".join(lines) + "\n"


def _answers(study: ReportData) -> list[tuple[str, str, str]]:
    """(method, verdict, the rest of its sentence)."""
    found = {method: study.fit["multipliers"].get(method) for method in study.methods[1:]}
    return [
        (m, of["verdict"], of["sentence"].removeprefix(f"{of['verdict']}. ")) if of else (m, "no finished run", "")
        for m, of in found.items()
    ]


def _question(study: ReportData) -> str:
    sizes = ", ".join(quantity(rung["size"]) for rung in study.plan["rungs"])
    return (
        f"With the same data, tokens and seeds, does {', '.join(study.methods[1:])} reach a lower held-out loss than "
        f"{study.baseline}, what is that worth in compute, and does it last over sizes ({sizes} parameters)?"
    )


def _progress(study: ReportData) -> str:
    finished = sum(run.measured for run in study.runs)
    if finished == len(study.runs):
        return f"All {finished} planned runs are finished."
    return f"{finished} of {len(study.runs)} planned runs are finished; the last table says how far the others are."


def _sections(study: ReportData) -> list[Section]:
    from megatron_depthattn.study import plots

    fit, baseline, held_out = study.fit, study.baseline, study.fit["held_out"]
    percent = f"{100 * fit['confidence']:g} %"
    curves, depth = plots.curve_plots(study), plots.depth_plots(study)
    return [
        Section(
            "Paired differences",
            [
                f"Each seed of a method against the same seed of {baseline}; below 0: lower loss. Every interval is at "
                f"{percent} by itself; the verdicts above are corrected for the number of methods."
            ],
            [difference_table(study)],
            plots.difference_plots(study),
        ),
        Section(
            "Training",
            [f"Thick: mean over seeds; thin: each seed. Then the longest runs, less {baseline}'s of the same seed."]
            if curves
            else ["The runs' records are not in this folder."],
            [],
            curves,
        ),
        Section(
            "Effective compute multipliers",
            [
                f"How many times the method's tokens {baseline} needs for the same loss, by its law; at equal wall "
                "time divided by the time of a token over the baseline's."
            ],
            [_multiplier_table(study), _p_table(study)],
            plots.multiplier_plots(study),
        ),
        Section(
            "The law",
            [
                f"{fit['form'].rstrip('.')}. {fit['num_observations']} observations, {fit.get('resamples', 0)} "
                "bootstrap resamples.",
                *(f"{method}: {law['note']}." for method, law in fit["laws"].items() if law.get("note")),
                *([f"No rung held out: {held_out['refused']}."] if held_out.get("refused") else []),
            ],
            [_law_table(study), *([] if held_out.get("refused") else [_held_out_table(study)])],
            plots.law_plots(study),
        ),
        Section("Depth weights", [] if depth else ["No run has recorded depth weights."], [], depth),
        Section(
            "Cost",
            ["Device-hours: seconds in steps times devices, unfinished runs included."],
            [_rung_table(study), _cost_table(study)],
            [],
        ),
        Section("Every point", _machines(study), [_point_table(study)], []),
    ]


def _interval(entry: Interval | None, form: str = ".3g") -> str:
    """'1.06 [1.01, 1.12]' with what is known of it, or the reason why nothing is."""
    if not entry or entry.get("value") is None:
        return f"none: {entry['refused']}" if entry and entry.get("refused") else "none"
    return f"{format(entry['value'], form)}{bounds(entry, form)}"


def difference_table(study: ReportData) -> Table:
    """Every paired difference, with each of its pairs."""
    rows = []
    for entry in sorted(
        study.fit["differences"],
        key=lambda of: (study.rungs.index(of["rung"]), study.methods.index(of["method"]), of["tokens"]),
    ):
        mean = f"{entry['mean']:+.4f}{bounds(entry, '+.4f')}"
        each = "; ".join(
            f"{pair['seed']}: {pair['baseline']:.4f} to {pair['loss']:.4f} ({pair['difference']:+.4f})"
            for pair in entry["pairs"]
        )
        budget = f"{quantity(entry['tokens'])} ({entry['tokens_per_parameter']:.3g})"
        rows.append([entry["rung"], entry["method"], budget, mean, each])
    columns = ["rung", "method", "tokens (per weight)", "difference", f"seed: {study.baseline} to method"]
    return Table(f"Held-out loss less that of {study.baseline} with the same seed and tokens, nats", columns, rows)


def _multiplier_table(study: ReportData) -> Table:
    rows = [
        [method, level, *(_interval(at.get(kind), ".3f") for kind in ("equal_tokens", "equal_time"))]
        for method, level, at in study.multiplier_levels()
    ]
    refused = {m: study.fit["multipliers"].get(m, {}).get("refused") for m in study.methods[1:]}
    rows += [[method, "all runs", f"none: {reason}", ""] for method, reason in refused.items() if reason]
    columns = ["method", "runs", "at equal tokens", "at equal wall time"]
    return Table(f"Tokens, and time, that {study.baseline} needs for the same loss, over the method's", columns, rows)


def _p_table(study: ReportData) -> Table:
    """Of what the multipliers assume."""
    law = study.fit["laws"].get(study.baseline, {})
    tests = [(f"the law of {study.baseline} meets its points' means", law.get("p_misfit"))]
    for method, entry in study.fit["multipliers"].items():
        tests += [
            (f"one multiplier of {method} holds for all {of}", entry.get(f"p_{of}")) for of in ("rungs", "budgets")
        ]
    rows = [[assumed, f"{p:.2g}"] for assumed, p in tests if p is not None]
    return Table("F tests of what one multiplier assumes; below 0.05 it does not hold", ["assumed", "p"], rows)


def _law_table(study: ReportData) -> Table:
    rows = []
    for method in study.methods:
        law = study.fit["laws"].get(method, {"refused": "no finished run"})
        if law.get("refused"):
            rows.append([method, f"not fitted: {law['refused']}", *[""] * 5])
        else:
            rows.append(
                [method, *(_interval(law.get(name)) for name in ("E", "A", "alpha", "B", "beta")), f"{law['rmse']:.2g}"]
            )
    return Table("Laws, with intervals", ["method", "E", "A", "alpha", "B", "beta", "rmse, nats"], rows)


def _held_out_table(study: ReportData) -> Table:
    held_out = study.fit["held_out"]
    rows = []
    for method, entries in held_out["methods"].items():
        for entry in entries:
            measured, missed = f"{entry['measured']:.4f}", f"{entry['missed_by']:+.4f}"
            rows.append([method, quantity(entry["tokens"]), _interval(entry["predicted"], ".4f"), measured, missed])
    rows += [[method, "", f"none: {reason}", "", ""] for method, reason in held_out.get("left_out", {}).items()]
    columns = ["method", "tokens", "predicted", "measured", "measured less predicted"]
    return Table(f"Rung {held_out['rung']}: left out of the fit, then predicted by it", columns, rows)


def _rung_table(study: ReportData) -> Table:
    rows = []
    for rung in study.plan["rungs"]:
        tokens = sorted({run.point["tokens"] for run in study.of(rung=rung["rung"])})
        sizes = [
            quantity(rung["size"]),
            quantity(rung["parameters"]),
            str(rung["num_layers"]),
            str(rung["hidden_size"]),
        ]
        recipe = [str(rung["global_batch_size"]), f"{rung['learning_rate']:g}", ", ".join(map(quantity, tokens))]
        rows.append([rung["rung"], *sizes, *recipe])
    columns = ["rung", "size N", "parameters", "layers", "width", "batch", "learning rate", "tokens"]
    return Table(
        "The ladder. Size N: the baseline's weights without the embedding table, as in the fits", columns, rows
    )


def _cost_table(study: ReportData) -> Table:
    rows = []
    timing = study.results.get("timing") or {}
    for rung in study.rungs:
        for method in study.methods:
            runs = study.of(rung=rung, method=method)
            if runs:
                hours = sum((run.result.get("seconds") or 0.0) * run.point.get("world", 1) for run in runs) / 3600
                step = timing.get(rung, {}).get(method)
                row = [rung, method, f"{sum(run.measured for run in runs)} of {len(runs)}"]
                row += [f"{sum(run.point['flops'] for run in runs):.3g}", f"{hours:.3g}"]
                row += (
                    [f"{step['seconds_per_step']:.4g}", f"{step['ratio']:.3f}{bounds(step, '.3f')}"]
                    if step
                    else ["not timed", ""]
                )
                rows.append(row)
    columns = ["rung", "method", "finished", "FLOPs", "device-hours", "seconds a step", "over the baseline's"]
    return Table(f"Seconds a step: {study.results.get('timing_source') or 'not timed'}", columns, rows)


def _point_table(study: ReportData) -> Table:
    rows = []
    for run in study.runs:
        point, result = run.point, run.result
        loss, seconds = result.get("loss"), result.get("seconds")
        figures = [
            "none" if loss is None else f"{loss:.4f}",
            run.status,
            f"{point['tokens']:,}",
            f"{point['parameters']:,}",
        ]
        figures += [f"{point['flops']:.3g}", "none" if seconds is None else f"{seconds:.1f}"]
        made = [str(result.get(key) or "") for key in ("commit", "code")]
        rows.append([point["id"], *figures, *made, point["config"], point["run_dir"]])
    columns = ["point", "loss", "status", "tokens", "parameters", "FLOPs", "seconds", "commit", "code", "config"]
    return Table("Every planned point; paths are relative to the study's folder", [*columns, "run directory"], rows)


def _machines(study: ReportData) -> list[str]:
    """One line for each different machine, set of versions and date that the results were made with."""
    lines: Counter[str] = Counter()
    for run in study.runs:
        versions = ", ".join(
            f"{name} {version}" for name, version in sorted((run.result.get("versions") or {}).items())
        )
        lines["; ".join(part for part in (run.result.get("machine"), versions, run.result.get("date")) if part)] += 1
    return [f"{count} run{'s' if count > 1 else ''}: {line}" for line, count in lines.items() if line]
