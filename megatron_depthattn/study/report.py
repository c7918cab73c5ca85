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

from megatron_depthattn.study.report_data import ReportData, quantity, read_report_data
from megatron_depthattn.study.verdict import bounds


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
    for plot in [plot for group in figures.values() for plot in group] if figures_dir else []:
        assert figures_dir is not None
        figures_dir.mkdir(parents=True, exist_ok=True)
        (figures_dir / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
        if figures_dir.resolve().is_relative_to(output.resolve()):
            shown.append(f"![{plot.alt}]({Path(os.path.relpath(figures_dir, output), plot.name).as_posix()}.svg)")
    values = {
        "title": study.plan.get("title") or study.plan["study"],
        "question": study.plan.get("question") or _question(study),
        "answers": [(method, *_answer(study.fit["multipliers"].get(method))) for method in study.methods[1:]],
        "finished": sum(run.measured for run in study.runs),
        "study": study,
        "figures": figures,
        "differences": _differences(study),
        "machines": _machines(study),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"quantity": quantity, "interval": _interval, "bounds": bounds}
    page, markdown = output / "report.html", output / "report.md"
    page.write_text(environment.get_template("report.html.j2").render(values), encoding="utf-8")
    markdown.write_text(_markdown(values, shown), encoding="utf-8")
    return page, markdown


def _markdown(values: dict[str, Any], shown: list[str]) -> str:
    # A study's own words may come from elsewhere: no HTML, link or image of theirs.
    title, question = (
        re.sub(r"[<>\[\]`\\]", r"\\\g<0>", " ".join(values[key].split())) for key in ("title", "question")
    )
    study = values["study"]
    columns = ["rung", "method", "tokens (per weight)", "difference", f"seed: {study.baseline} to method"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * 5, *values["differences"]))
    answers = "\n".join(f"- **{method}: {verdict}.** {said}" for method, verdict, said in values["answers"])
    progress = f"{values['finished']} of {len(study.runs)} planned runs are finished."
    caption = f"Held-out loss less that of {study.baseline} with the same seed and tokens, nats:"
    rest = "The page beside this file, `report.html`, holds the rest: open it in a browser."
    return "\n\n".join([f"# {title}", question, answers, progress, caption, table, *shown, rest]) + "\n"


def _answer(found: dict[str, Any] | None) -> tuple[str, str]:
    """The verdict, and the rest of its sentence."""
    if found is None:
        return "no finished run", ""
    return found["verdict"], found["sentence"].removeprefix(f"{found['verdict']}. ")


def _question(study: ReportData) -> str:
    sizes = ", ".join(quantity(rung["size"]) for rung in study.plan["rungs"])
    return (
        f"With the same data, tokens and seeds, does {', '.join(study.methods[1:])} reach a lower held-out loss than "
        f"{study.baseline}, what is that worth in compute, and does it last over sizes ({sizes} parameters)?"
    )


def _interval(entry: dict[str, Any] | None, form: str = ".3g") -> str:
    """'1.06 [1.01, 1.12]' with what is known of it, or the reason why nothing is."""
    if not entry or entry.get("value") is None:
        return f"none: {entry['refused']}" if entry and entry.get("refused") else "none"
    return f"{format(entry['value'], form)}{bounds(entry, form)}"


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


def _machines(study: ReportData) -> list[str]:
    """One line for each different machine, set of versions and date that the results were made with."""
    lines: Counter[str] = Counter()
    for run in study.runs:
        versions = ", ".join(
            f"{name} {version}" for name, version in sorted((run.result.get("versions") or {}).items())
        )
        lines["; ".join(part for part in (run.result.get("machine"), versions, run.result.get("date")) if part)] += 1
    return [f"{count} run{'s' if count > 1 else ''}: {line}" for line, count in lines.items() if line]
