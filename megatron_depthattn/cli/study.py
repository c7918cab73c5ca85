"""Is a method worth it, at which size, at what cost: a ladder of runs, from its plan to its report.

    plan STUDY     write every run's config; print the points, their cost and the commands of a dry run
    run STUDY      train what is not finished, here or (--slurm) as an array; then time the methods
    fit STUDY      laws, paired differences and compute multipliers, with intervals, to fit.json
    report STUDY   one HTML page and a Markdown table

STUDY is a YAML file or the name of a shipped one (below). Each verb resumes where the last one stopped; all of them
write below --output (default: runs/studies/<name>).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median_high
from typing import TYPE_CHECKING, Any

from megatron_depthattn.cli import prepare
from megatron_depthattn.cli.common import check, find_config, new_parser, print_table, shipped_folder
from megatron_depthattn.cli.common import run as run_verb
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable

if TYPE_CHECKING:
    from megatron_depthattn.study.plan import Point
    from megatron_depthattn.study.study import Study

DEPTHATTN = (sys.executable, "-m", "megatron_depthattn.cli")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 75 when a signal stopped it; 1 with one line on stderr for what cannot be done."""
    shipped = ", ".join(sorted(file.stem for file in (shipped_folder("configs") / "studies").glob("*.yaml")))
    parser = new_parser("study", f"{__doc__}\nshipped studies: {shipped}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for function in (plan, run, fit, report):
        verb = verbs.add_parser(function.__name__, help=(function.__doc__ or "").splitlines()[0])
        verb.add_argument("study", metavar="STUDY", help="YAML file of a study, or the name of a shipped one")
        verb.add_argument("--output", type=user_path, metavar="DIR", help="default: runs/studies/<name of the study>")
        settings = "keys of the study, such as world.devices=8"
        verb.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help=settings)
        verb.set_defaults(function=function)
        if function is run:
            slurm = "submit an array to Slurm instead; what follows are options of depthattn submit"
            verb.add_argument("--jobs", type=int, default=1, metavar="N", help="points at a time (default 1)")
            verb.add_argument("--only", default="", metavar="TEXT", help="points with TEXT in their id, such as d4/")
            verb.add_argument("--no-timing", action="store_true", help="do not time the methods afterwards")
            verb.add_argument("--time-again", action="store_true", help="time all rungs, even those that have been")
            verb.add_argument("--slurm", nargs=argparse.REMAINDER, metavar="OPTION", help=slurm)
        if function is report:
            verb.add_argument("--figures", type=user_path, metavar="DIR", help="write the main figures there as well")
    return run_verb(_run, parser.parse_args(arguments))


def _run(given: argparse.Namespace) -> Any:
    from megatron_depthattn.study.study import load_study

    shipped = find_config(f"studies/{given.study}")
    given.study = Path(shipped) if Path(shipped).is_file() else user_path(find_config(given.study))
    study = load_study(given.study, given.set)
    return given.function(given, study, given.output or Path("runs/studies", given.study.stem)) or 0


def plan(given: argparse.Namespace, study: Study, output: Path) -> None:
    """Write the plan and print what it costs."""
    from megatron_depthattn.study.plan import make_plan, read_points, with_trunks
    from megatron_depthattn.study.run import progress_of, training_command

    made = make_plan(study, given.study.parent, output)
    points = with_trunks(read_points(output), output)
    print(printable(made["title"]))
    columns = [key for key in made["rungs"][0] if key != "rung"]
    print_table(["rung", *columns], [[rung["rung"], *(f"{rung[key]:,}" for key in columns)] for rung in made["rungs"]])
    _show_cost(points, output)
    for point in points:
        state, step = progress_of(point, output)
        layout = " ".join(f"{key}={value}" for key, value in point.layout.items())
        print(f"{point.id}: {state}, step {step} of {point.steps}; {layout or 'layout of the config'}")
    options = [*(["--output", str(output)] if given.output else []), *(["--set", *given.set] if given.set else [])]
    again = shlex.join(["depthattn", "study", "run", str(given.study), *options])
    example = f"such as\n  {shlex.join(['python', *training_command(output / points[0].config, points[0].world)[1:]])}"
    if study.world.nodes > 1:
        again += f" --slurm {_slurm_options(study)} --time ..."
        example = f"of {study.world.nodes} nodes each; with --dry-run at the end, job files only"
    print(f"dry run: {len(points)} runs {example}\nnothing was started; to do so: {again}")


def run(given: argparse.Namespace, study: Study, output: Path) -> int:
    """Train what is not finished, then time the methods where that has not been done."""
    from megatron_depthattn.study.plan import make_plan, read_points, with_trunks
    from megatron_depthattn.study.results import collect_results
    from megatron_depthattn.study.run import run_points

    check((given.jobs < 1, f"--jobs is {given.jobs}: set 1 or more"))
    if given.slurm is None and study.world.nodes > 1:
        raise ValueError(
            f"a run of {given.study} needs {study.world.devices} devices, {study.world.devices_per_node} a node: give "
            f"--slurm {_slurm_options(study)} and its other options at the end, or set world.devices"
        )
    make_plan(study, given.study.parent, output)
    points = read_points(output)
    _prepare(study, output / points[0].config)
    wanted = with_trunks([point for point in points if given.only in point.id], output)
    if given.slurm is not None:
        return _submit(given, wanted, output)
    failed, is_stopped = run_points(wanted, output, given.jobs)
    if not is_stopped and not failed and study.timing_rounds and not given.no_timing:
        _time(study, points, output, again=given.time_again)
    collect_results(points, output, baseline=study.baseline, own_steps=not study.timing_rounds)
    if is_stopped:
        print("stopped: the same command resumes")
        return 75
    for point in failed:
        print(f"error: {point.id} failed, see {output}/logs/{point.id}.log; the same command retries", file=sys.stderr)
    return int(bool(failed))


def fit(given: argparse.Namespace, study: Study, output: Path) -> None:
    """Fit what is finished."""
    from megatron_depthattn.study.fit import Observation, fit_study
    from megatron_depthattn.study.plan import read_points
    from megatron_depthattn.study.results import collect_results

    points = read_points(output)
    results = collect_results(points, output, baseline=study.baseline, own_steps=not study.timing_rounds)
    observations = [
        Observation._make([*(getattr(point, key) for key in Observation._fields[:-1]), result["loss"]])
        for point, result in zip(points, results["results"], strict=True)
        if result["loss"] is not None
    ]
    if not observations:
        raise ValueError(f"no point below {output} is finished; train first: depthattn study run {given.study}")
    ratios = {(rung, method): of["ratio"] for rung, each in results["timing"].items() for method, of in each.items()}
    options: dict[str, Any] = {key: getattr(study, key) for key in ("baseline", "confidence", "resamples")}
    fitted = fit_study(observations, time_ratios=ratios, **options)
    (output / "fit.json").write_text(json.dumps(fitted, indent=1) + "\n", encoding="utf-8")
    for method, figures in fitted["multipliers"].items():
        print(f"{method}: {figures['sentence']}")
    print(f"{len(observations)} of {len(points)} points are finished; written: {output / 'fit.json'}")


def report(given: argparse.Namespace, study: Study, output: Path) -> None:
    """Write the page and the tables."""
    from megatron_depthattn.study.report import write_report

    for path in write_report(output, given.figures):
        print(f"written: {path}")


def _slurm_options(study: Study) -> str:
    return f"--nodes {study.world.nodes} --gpus-per-node {study.world.devices_per_node}"


def _prepare(study: Study, config: Path) -> None:
    """The corpus, where the study names a text and it is not there yet; and that it suffices."""
    from megatron_depthattn.config import load_config

    data = load_config(config).data
    if study.corpus is not None:
        words = ["--input", os.path.expanduser(study.corpus.input), "--output", data.path]
        words += ["--tokenizer", os.path.expanduser(study.corpus.tokenizer), "--sequence-length"]
        words += [str(data.sequence_length), "--validation-fraction", str(study.corpus.validation_fraction)]
        if prepare.main(words):
            raise ValueError(f"the corpus of the study could not be prepared in {data.path}, see above")
    index = Path(data.path) / "val" / "index.json"
    if index.is_file():  # a URL is not looked into
        check_held_out(study, index)


def check_held_out(study: Study, index: Path) -> None:
    """That every size can be evaluated over all of `eval_sequences`."""
    from megatron_depthattn.data.shard_index import parse_index

    sequences = sum(shard.samples for shard in parse_index(index.read_bytes(), str(index)).shards)
    if sequences < study.eval_sequences:
        raise ValueError(
            f"{index.parent} holds {sequences} sequences and eval_sequences is {study.eval_sequences}: sizes with "
            f"other batches would be evaluated on other text; set it to at most {sequences}, or hold out more"
        )


def _submit(given: argparse.Namespace, points: list[Point], output: Path) -> int:
    """The unfinished points as a Slurm array, through depthattn submit, which checks and freezes them.

    Trunks are an array of their own, after which that of the branches begins.
    """
    from megatron_depthattn.study.run import left_to_run, write_array

    trunks = {point.trunk for point in points} - {None}
    check((bool(trunks) and "--dependency" in given.slurm, "branches wait for their trunks: give --after JOB instead"))
    left, after = left_to_run(points, output), list[str]()
    for group in ([run for run in left if run.id in trunks], [run for run in left if run.id not in trunks]):
        if not group:
            continue
        tasks, job = write_array(group, output)
        command = [*DEPTHATTN, "submit", str(output / group[0].config), f"run.dir={job}"]
        command += ["--array", str(tasks.resolve()), *given.slurm, *after]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            return done.returncode
        if number := re.search(r"^submitted (\w+)", done.stdout, re.MULTILINE):
            after = ["--after", number[1]]  # branches, when all trunks have ended well
    if not left:
        print("every point is finished: nothing to submit")
    return 0


def _time(study: Study, points: list[Point], output: Path, *, again: bool) -> None:
    """Interleaved steps of all methods of every rung that has not been timed yet, or ``again``, into timing.json."""
    from megatron_depthattn.config import load_config, validate
    from megatron_depthattn.study.results import TIMING, read_timing

    known = {} if again else read_timing(output)["timing"]
    for rung in dict.fromkeys(point.rung for point in points):
        models = {point.method: str(output / point.config) for point in points if point.rung == rung}
        if models.keys() <= known.get(rung, {}).keys() or study.baseline not in models:
            continue
        named = [f"{name}={models[name]}" for name in sorted(models, key=lambda name: name != study.baseline)]
        print(f"{rung}: timing {', '.join(models)}", flush=True)
        with tempfile.TemporaryDirectory() as work:
            command = [*DEPTHATTN, "benchmark", "--json", f"{work}/figures.json", "step"]
            command += ["--models", *named, "--rounds", str(study.timing_rounds)]
            if subprocess.run(command, check=False, capture_output=True).returncode:
                raise ValueError(f"timing failed; see it fail: {shlex.join(command[1:])}")
            measured = json.loads(Path(work, "figures.json").read_text(encoding="utf-8"))["figures"]
        known[rung] = {}
        for name, of in measured.items():
            if "seconds" in of:
                passes = validate(load_config(models[name]), study.world.devices, needs_data=False).num_microbatches
                figures = {"seconds_per_step": median_high(of["seconds"]) * passes, "ratio": of["ratio"]}
                known[rung][name] = figures | dict(zip(("low", "high"), of["interval"], strict=True))
        source = f"{study.timing_rounds} interleaved steps of one micro-batch on one device (median), times a rank's"
        source += " micro-batches; parallel ranks and messages between them are not in it"
        (output / TIMING).write_text(json.dumps({"timing": known, "timing_source": source}, indent=1) + "\n", "utf-8")


def _show_cost(points: list[Point], output: Path) -> None:
    """Points of a rung and method in one row; device-hours where a step has been predicted or timed."""
    from megatron_depthattn.study.results import read_timing

    timing = read_timing(output)["timing"]
    timed = {(rung, of): at["seconds_per_step"] for rung, each in timing.items() for of, at in each.items()}
    rows = []
    for rung, method in (*dict.fromkeys((point.rung, point.method) for point in points), ("all", "")):
        of = [point for point in points if not method or (point.rung, point.method) == (rung, method)]
        shares = [(point, point.own_share) for point in of]
        seconds = [point.predicted_step_seconds or timed.get((point.rung, point.method), math.nan) for point in of]
        tokens = sum(point.tokens * share for point, share in shares) / 1e6
        flops = sum(point.flops * share for point, share in shares) / 1e15
        hours = sum(point.steps * point.world * step for point, step in zip(of, seconds, strict=True)) / 3600
        figures = (f"{tokens:,.2f}", f"{flops:,.4g}", f"{seconds[0]:.3g}" if method else "", f"{hours:,.2f}")
        rows.append([rung, method, f"{len(of)}", *(text.replace("nan", "not timed yet") for text in figures)])
    print_table(("rung", "method", "runs", "tokens, M", "PFLOPs", "s a step", "device-hours"), rows, title="Cost")
    if trunks := {point.trunk for point in points} - {None}:
        separate = sum(point.flops for point in points if point.id not in trunks) / 1e15
        print(f"{len(trunks)} of the runs are trunks that budgets share; each budget by a run: {separate:,.4g} PFLOPs")
