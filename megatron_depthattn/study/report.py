"""A scale study's report: one HTML page that holds all it shows, and a Markdown file with the paired differences.

Both are made from plan.json, results.json, fit.json and the run directories; the page's words and tables are in
report.html.j2. The same inputs give the same bytes. The page fetches nothing: no script, no font, no link.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_depthattn.study.conclusion import bounds
from megatron_depthattn.study.report_data import ReportData, quantity, read_report_data


def write_report(output: Path, figures_dir: Path | None = None) -> tuple[Path, Path]:
    """Write report.html and report.md into the study's folder and return their paths.

    Args:
        output: the study's folder, with plan.json, results.json, fit.json and the run directories.
        figures_dir: where the figures are written too, one SVG file each; the Markdown shows them if it is below
            `output`.

    Raises:
        ValueError: a library or an input is missing, or inputs do not belong together; says what to run.
    """
    for library in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"the report needs {library}: pip install 'megatron-depthattn[study]'")
    import jinja2

    from megatron_depthattn.study import plots

    study = read_report_data(output)
    figures = {
        "differences": plots.difference_plots(study),
        "curves": plots.curve_plots(study),
        "multipliers": plots.multiplier_plots(study),
        "laws": plots.law_plots(study),
        "depth": plots.depth_plots(study),
    }
    shown = []
    if figures_dir:
        figures_dir.mkdir(parents=True, exist_ok=True)
        for plot in (plot for group in figures.values() for plot in group):
            (figures_dir / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
            if figures_dir.resolve().is_relative_to(output.resolve()):
                shown.append(f"![{plot.alt}]({Path(os.path.relpath(figures_dir, output), plot.name).as_posix()}.svg)")
    machines = Counter("; ".join(filter(None, map(run.get, ("machine", "date")))) for run in study.runs)
    values = {
        "title": study.plan["title"],
        "question": study.plan["question"],
        "answers": [(method, *_answer(study.fit["multipliers"].get(method))) for method in study.methods[1:]],
        "progress": f"{_finished(study.runs)} planned runs are finished.{_compute(study)}",
        "study": study,
        "figures": figures,
        "differences": _differences(study),
        "costs": _costs(study),
        "machines": [f"{count} run{'s' if count > 1 else ''}: {line}" for line, count in machines.items() if line],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"quantity": quantity, "interval": _interval}
    page, markdown = output / "report.html", output / "report.md"
    page.write_text(environment.get_template("report.html.j2").render(values), encoding="utf-8")
    markdown.write_text(_markdown(values, shown), encoding="utf-8")
    return page, markdown


def _markdown(values: dict[str, Any], shown: list[str]) -> str:
    # A study's own words may come from elsewhere: no HTML, link or image of theirs.
    title, question = (
        re.sub(r"[<>\[\]`\\]", r"\\\g<0>", " ".join(values[key].split())) for key in ("title", "question")
    )
    baseline = values["study"].baseline
    columns = ["rung", "method", "tokens (per weight)", "difference", f"seed: {baseline} to method"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * 5, *values["differences"]))
    answers = "\n".join(f"- **{method}: {conclusion}.** {rest}" for method, conclusion, rest in values["answers"])
    caption = f"Held-out loss less that of {baseline} with the same seed and tokens, nats:"
    rest = "The page beside this file, `report.html`, holds the rest: open it in a browser."
    return "\n\n".join([f"# {title}", question, answers, values["progress"], caption, table, *shown, rest]) + "\n"


def _answer(found: dict[str, Any] | None) -> tuple[str, str]:
    """The conclusion, and the rest of its sentence."""
    if found is None:
        return "no finished run", ""
    return found["conclusion"], found["sentence"].removeprefix(f"{found['conclusion']}. ")


def _finished(runs: list[dict[str, Any]]) -> str:
    """'2 of 3': how many of these runs have a loss."""
    return f"{sum(run['loss'] is not None for run in runs)} of {len(runs)}"


def _interval(entry: dict[str, Any], form: str = ".3g") -> str:
    """'1.06 [1.01, 1.12]' with what is known of it, or the reason why nothing is."""
    return f"none: {entry['reason']}" if "reason" in entry else f"{format(entry['value'], form)}{bounds(entry, form)}"


def _differences(study: ReportData) -> list[list[str]]:
    """Every paired difference with each of its pairs, as a row of text."""
    rows = []
    for entry in sorted(
        study.fit["differences"],
        key=lambda of: (study.rungs.index(of["rung"]), study.methods.index(of["method"]), of["tokens"]),
    ):
        each = "; ".join(
            f"{pair['seed']}: {pair['baseline']:.4f} to {pair['loss']:.4f} ({pair['difference']:+.4f})"
            for pair in entry["pairs"]
        )
        budget = f"{quantity(entry['tokens'])} ({entry['tokens_per_parameter']:.3g})"
        rows.append([entry["rung"], entry["method"], budget, f"{entry['mean']:+.4f}{bounds(entry, '+.4f')}", each])
    return rows


def _compute(study: ReportData) -> str:
    """What trunks have spared; empty without them."""
    if not (flops := study.results.get("flops")):
        return ""
    spent, separate = flops["spent"], flops["in_separate_runs"]
    return (
        f" Spent: {spent:.3g} FLOPs, those of {len(study.trunks)} trunks that budgets share included; the finished "
        f"budgets as separate runs: {separate:.3g} ({separate / spent if spent else 0:.2f} times)."
    )


def _costs(study: ReportData) -> list[list[str]]:
    """A row of text for each rung and method: finished runs, device-hours of all its runs, time of a step."""
    rows = []
    for rung, method in ((rung, method) for rung in study.rungs for method in study.methods):
        if runs := study.of(rung=rung, method=method):
            trunks = [trunk for trunk in study.trunks if (trunk["rung"], trunk["method"]) == (rung, method)]
            hours = sum(run["seconds"] * run["world"] for run in (*runs, *trunks)) / 3600
            step = study.results["timing"].get(rung, {}).get(method)
            timed = [f"{step['seconds_per_step']:.4g}", f"{step['ratio']:.3f}{bounds(step, '.3f')}"] if step else []
            rows.append([rung, method, _finished(runs), f"{hours:.3g}", *(timed or ["not timed", ""])])
    return rows
