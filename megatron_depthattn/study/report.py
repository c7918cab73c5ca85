"""A scale study's report: one HTML page that holds all it shows, and a Markdown file for the repository.

Both are made of the same sections (sentences, tables, figures), read from plan.json, results.json, fit.json and the
run directories. The same inputs give the same bytes. The page fetches nothing: no script, no font, no link.
"""

from __future__ import annotations

import importlib.util
import re
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_depthattn.study import report_tables as tables
from megatron_depthattn.study.report_inputs import Study, read_study
from megatron_depthattn.study.report_tables import Table

if TYPE_CHECKING:
    from megatron_depthattn.study.picture import Picture

MAIN_FIGURES = ("fits", "held-out", "multipliers", "differences", "depth")
"""Sections whose figures are written as files when asked for."""


class Section(NamedTuple):
    """A part of the report. `figures`: in rows. `brief`: the Markdown has it too."""

    name: str
    title: str
    texts: list[str]
    tables: list[Table]
    figures: list[list[Picture]]
    brief: bool = False


class Answer(NamedTuple):
    """What the study found of one method."""

    method: str
    verdict: str
    sentence: str
    colour: str


def write_report(output: Path, figures_dir: Path | None = None) -> tuple[Path, Path]:
    """Writes report.html and report.md into the study's folder.

    Args:
        output: the study's folder, with plan.json, results.json, fit.json and the run directories.
        figures_dir: where the main figures are written too, one SVG file each; the Markdown shows them if it is
            below `output`.

    Returns:
        The paths of the page and of the Markdown.

    Raises:
        ValueError: a library or an input is missing, or inputs do not belong together; says what to run.
    """
    for library in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"the report needs {library}: pip install 'megatron-depthattn[study]'")
    study = read_study(output)
    sections = _sections(study)
    files = _write_figures(sections, output, figures_dir) if figures_dir else []
    values = {
        "title": study.plan.get("title") or study.plan["study"],
        "question": study.plan.get("question") or _question(study),
        "answers": _answers(study),
        "progress": _progress(study),
        "sections": sections,
        "files": files,
        "machines": tables.machines(study),
    }
    page, markdown = output / "report.html", output / "report.md"
    page.write_text(_render("report.html.j2", values))
    markdown.write_text(_render("report.md.j2", values))
    return page, markdown


def _write_figures(sections: list[Section], output: Path, folder: Path) -> list[tuple[str, Picture, str]]:
    """Writes the main figures; (section, figure, path from `output`) of those that the Markdown can show."""
    folder.mkdir(parents=True, exist_ok=True)
    below = folder.resolve().is_relative_to(output.resolve())
    shown = []
    for section in sections:
        for figure in chain.from_iterable(section.figures if section.name in MAIN_FIGURES else []):
            path = folder / f"{figure.name}.svg"
            path.write_text(figure.svg)
            if below:
                shown.append((section.name, figure, path.resolve().relative_to(output.resolve()).as_posix()))
    return shown


def _render(template: str, values: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    # A study's own words, which may come from elsewhere: no HTML, link or picture of theirs in the Markdown.
    environment.filters["plain"] = lambda text: re.sub(r"[<>\[\]`\\]", r"\\\g<0>", " ".join(text.split()))
    environment.tests["number"] = lambda text: text[:1].isdigit() or text[:2].strip("+-")[:1].isdigit()
    return environment.get_template(template).render(values)


def _question(study: Study) -> str:
    others = ", ".join(study.methods[1:])
    sizes = [tables.quantity(rung["size"]) for rung in study.plan["rungs"]]
    return (
        f"With the same data, tokens and seeds, does {others} reach a lower held-out loss than {study.baseline}, what "
        f"is that worth in compute, and does it last over {len(sizes)} sizes ({', '.join(sizes)} parameters)?"
    )


def _answers(study: Study) -> list[Answer]:
    from megatron_depthattn.study.picture import colours

    style = colours(study.methods)
    answers = []
    for method in study.methods[1:]:
        entry = study.fit["multipliers"].get(method, {"refused": "fit.json has no multiplier for it"})
        if "verdict" in entry:
            answers.append(Answer(method, entry["verdict"], entry["sentence"], style[method][0]))
        else:
            answers.append(Answer(method, "no verdict", f"{entry['refused']}.", style[method][0]))
    return answers


def _progress(study: Study) -> str:
    finished = sum(run.measured for run in study.runs)
    if finished == len(study.runs):
        return f"All {finished} planned runs are finished."
    rest = len(study.runs) - finished
    return (
        f"{finished} of {len(study.runs)} planned runs are finished; the other {rest} are in the last table, with why."
    )


def _sections(study: Study) -> list[Section]:
    from megatron_depthattn.study import depth_figures, figures

    fit, baseline = study.fit, study.baseline
    percent = f"{100 * fit['confidence']:g}%"
    resampled = f"Intervals are {percent} intervals" + (
        f" of {fit['resamples']} bootstrap resamples." if fit.get("resamples") else "."
    )
    held_out = fit["held_out"]
    missing = [f"Not computed: {held_out['refused']}."] if held_out.get("refused") else []
    depth = depth_figures.depth_figures(study)
    return [
        Section("rungs", "The ladder", [], [tables.rung_table(study)], []),
        Section(
            "curves",
            "Training",
            [
                f"Thick: mean over seeds; thin: each seed. Below: the longest runs, less those of {baseline} "
                f"with the same seed."
            ],
            [],
            figures.curve_figures(study),
        ),
        Section(
            "fits",
            "Fits over parameters and tokens",
            [
                f"{fit['form'].rstrip('.')}. {fit['num_observations']} observations. {resampled}",
                *(f"{method}: {law['note']}." for method, law in fit["laws"].items() if law.get("note")),
            ],
            [tables.law_table(study)],
            figures.fit_figures(study),
        ),
        Section(
            "held-out",
            "The rung held out",
            missing or [f"Missed by: measured less predicted, nats per token. {resampled}"],
            [] if missing else [tables.held_out_table(study)],
            [figures.held_out_figures(study)],
            brief=True,
        ),
        Section(
            "multipliers",
            "Effective compute multipliers",
            [
                f"How many times the method's tokens {baseline} needs for the same loss; at a fixed size compute goes "
                f"with tokens. At equal wall time, what a step takes over the baseline's is taken off. {resampled}"
            ],
            [tables.multiplier_table(study)],
            [figures.multiplier_figures(study)],
            brief=True,
        ),
        Section(
            "differences",
            "Paired differences",
            [f"Each seed of a method against the same seed of {baseline}; below 0: lower loss. Intervals: {percent}."],
            [tables.difference_table(study)],
            [figures.difference_figures(study)],
            brief=True,
        ),
        Section(
            "cost",
            "Cost",
            ["Device-hours: seconds in steps times devices, unfinished runs included."],
            [tables.cost_table(study)],
            [],
            brief=True,
        ),
        Section(
            "depth",
            "Depth weights",
            ["Mean weight of a layer on each source and on itself, from the last record of each of the longest runs."]
            if any(depth)
            else ["No run has recorded depth weights."],
            [],
            depth,
        ),
        Section("points", "Every point", [], [tables.point_table(study)], [], brief=True),
    ]
