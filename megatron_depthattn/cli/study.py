"""Is a method worth it, at which size, at what cost: a ladder of runs, from its plan to its report.

    plan STUDY     write every run's config; print the points, their cost and the commands of a dry run
    run STUDY      train what is not finished, here or (--slurm) as an array; then time the methods
    fit STUDY      laws, paired differences and compute multipliers, with intervals, to fit.json
    report STUDY   one HTML page and a Markdown table

STUDY is a YAML file or the name of a shipped one: smoke, own, cpu, paper. Each verb resumes where the last one stopped;
all of them write below --output (default: runs/studies/<name>).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_depthattn.cli import prepare
from megatron_depthattn.cli.common import find_config, new_parser, print_table
from megatron_depthattn.cli.common import run as run_verb
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable

if TYPE_CHECKING:
    from megatron_depthattn.study.study import Study

DEPTHATTN = (sys.executable, "-m", "megatron_depthattn.cli")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 75 when a signal stopped it; 1 with one line on stderr for what cannot be done."""
    parser = new_parser("study", __doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for function in (plan, run, fit, report):
        verb = verbs.add_parser(function.__name__, help=(function.__doc__ or "").splitlines()[0])
        verb.add_argument("study", metavar="STUDY", help="YAML file of a study, or the name of a shipped one")
        default = "default: runs/studies/<name of the study's file>"
        verb.add_argument("--output", type=user_path, metavar="DIR", help=default)
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


def _run(given: argparse.Namespace) -> int:
    from megatron_depthattn.study.study import load_study

    shipped = find_config(f"studies/{given.study}")
    given.study = Path(shipped) if Path(shipped).is_file() else user_path(find_config(given.study))
    code: int = given.function(given, load_study(given.study), given.output or Path("runs/studies") / given.study.stem)
    return code


def plan(given: argparse.Namespace, study: Study, output: Path) -> int:
    """Write the plan and print what it costs."""
    from megatron_depthattn.study.plan import make_plan, read_points
    from megatron_depthattn.study.run import progress_of, training_command

    made = make_plan(study, given.study.parent, output)
    points = read_points(output)
    _show_rungs(made)
    _show_cost(made, output)
    for point in points:
        progress = progress_of(point, output)
        layout = " ".join(f"{key}={value}" for key, value in point.layout.items())
        print(
            f"{point.id}: {progress.state}, step {progress.step} of {point.steps}; {layout or 'layout of the config'}"
        )
    again = f"depthattn study run {shlex.quote(str(given.study))}"
    if study.world.nodes > 1:
        again += f" --slurm {_slurm_options(study)} --time ..."
        print(
            f"dry run: {len(points)} runs of {study.world.nodes} nodes each; with --dry-run at the end, job files only"
        )
    else:
        example = training_command(output / points[0].config, points[0].world)
        print(f"dry run: {len(points)} runs such as\n  {shlex.join(['python', *example[1:]])}")
    print(f"nothing was started; to do so: {again}")
    return 0


def run(given: argparse.Namespace, study: Study, output: Path) -> int:
    """Train what is not finished, then time the methods where that has not been done."""
    from megatron_depthattn.study.plan import make_plan, read_points
    from megatron_depthattn.study.results import collect_results
    from megatron_depthattn.study.run import run_points

    if given.slurm is None and study.world.nodes > 1:
        raise ValueError(
            f"a run of {given.study} needs {study.world.devices} devices, {study.world.devices_per_node} a node: give "
            f"--slurm {_slurm_options(study)} and its other options at the end, or set world.devices"
        )
    make_plan(study, given.study.parent, output)
    points = [point for point in read_points(output) if given.only in point.id]
    _prepare(study, output)
    if given.slurm is not None:
        return _submit(given, points, output)
    failed, is_stopped = run_points(
        points, output, jobs=given.jobs, log=lambda line: print(printable(line), flush=True)
    )
    if not is_stopped and not failed and study.timing_rounds and not given.no_timing:
        _time(study, output, again=given.time_again)
    collect_results(read_points(output), output, baseline=study.baseline, own_steps=not study.timing_rounds)
    if is_stopped:
        print("stopped: the same command resumes")
        return 75
    for point in failed:
        print(
            f"error: {point.id} failed, see {output}/logs/{point.id}.log; the same command tries again", file=sys.stderr
        )
    return int(bool(failed))


def fit(given: argparse.Namespace, study: Study, output: Path) -> int:
    """Fit what is finished."""
    from megatron_depthattn.study.fit import Observation, fit_study
    from megatron_depthattn.study.plan import read_points
    from megatron_depthattn.study.results import collect_results

    points = read_points(output)
    results = collect_results(points, output, baseline=study.baseline, own_steps=not study.timing_rounds)
    losses = {result["id"]: result["loss"] for result in results["results"]}
    observations = [
        Observation(
            rung=point.rung,
            method=point.method,
            seed=point.seed,
            size=point.size,
            tokens=point.tokens,
            loss=losses[point.id],
            tokens_per_parameter=point.tokens_per_parameter,
        )
        for point in points
        if losses[point.id] is not None
    ]
    if not observations:
        raise ValueError(f"no point below {output} is finished; train first: depthattn study run {given.study}")
    ratios = {
        (rung, method): figures["ratio"]
        for rung, methods in results["timing"].items()
        for method, figures in methods.items()
    }
    fitted = fit_study(
        observations,
        baseline=study.baseline,
        time_ratios=ratios,
        confidence=study.confidence,
        resamples=study.resamples,
    )
    (output / "fit.json").write_text(json.dumps(fitted, indent=1) + "\n", encoding="utf-8")
    print(f"{len(observations)} of {len(points)} points are finished")
    for method, figures in fitted["multipliers"].items():
        print(f"{method}: {figures.get('sentence') or figures['refused']}")
    print(f"written: {output / 'fit.json'}")
    return 0


def report(given: argparse.Namespace, study: Study, output: Path) -> int:
    """Write the page and the tables."""
    from megatron_depthattn.study.report import write_report

    for path in write_report(output, **({"figures_dir": given.figures} if given.figures else {})):
        print(f"written: {path}")
    return 0


def _slurm_options(study: Study) -> str:
    return f"--nodes {study.world.nodes} --gpus-per-node {study.world.devices_per_node}"


def _prepare(study: Study, output: Path) -> None:
    """The corpus, where the study names a text and it is not there yet; and that it suffices."""
    from megatron_depthattn.config import load_config
    from megatron_depthattn.study.plan import read_points

    data = load_config(output / read_points(output)[0].config).data
    if study.corpus is not None:
        words = ["--input", os.path.expanduser(study.corpus.input), "--output", data.path]
        words += ["--tokenizer", os.path.expanduser(study.corpus.tokenizer)]
        words += ["--sequence-length", str(data.sequence_length)]
        words += ["--validation-fraction", str(study.corpus.validation_fraction)]
        if prepare.main(words):
            raise ValueError(f"the corpus of the study could not be prepared in {data.path}, see above")
    check_held_out(study, Path(data.path) / "val" / "index.json")


def check_held_out(study: Study, index: Path) -> None:
    """That every size can be evaluated over all of `eval_sequences`; a URL is not looked into."""
    if not index.is_file():
        return
    from megatron_depthattn.data.shard_index import parse_index

    sequences = sum(shard.samples for shard in parse_index(index.read_bytes(), str(index)).shards)
    if sequences < study.eval_sequences:
        raise ValueError(
            f"{index.parent} holds {sequences} sequences and eval_sequences is {study.eval_sequences}: sizes with "
            f"other batches would be evaluated on other text; set it to at most {sequences}, or hold out more"
        )


def _submit(given: argparse.Namespace, points: list[Any], output: Path) -> int:
    """The unfinished points as one Slurm array, through depthattn submit, which checks and freezes them."""
    from megatron_depthattn.study.slurm import write_array

    tasks, job = write_array(points, output)
    if tasks is None:
        print("every point is finished: nothing to submit")
        return 0
    base = output / points[0].config
    command = [*DEPTHATTN, "submit", str(base), f"run.dir={job}", "--array", str(tasks.resolve()), *given.slurm]
    return subprocess.run(command, check=False).returncode


def _time(study: Study, output: Path, *, again: bool) -> None:
    """Interleaved steps of all methods of every rung that has not been timed yet."""
    from megatron_depthattn.config import load_config, validate
    from megatron_depthattn.study.plan import read_points
    from megatron_depthattn.study.results import TIMING

    def micro_batches(config: str) -> int:
        return validate(load_config(config), study.world.devices, needs_data=False).num_microbatches

    file = output / TIMING
    known = json.loads(file.read_text(encoding="utf-8"))["timing"] if file.is_file() and not again else {}
    configs: dict[str, dict[str, str]] = defaultdict(dict)
    for point in read_points(output):
        configs[point.rung].setdefault(point.method, str(output / point.config))
    for rung, models in configs.items():
        if set(models) <= set(known.get(rung, {})) or study.baseline not in models:
            continue
        named = [f"{name}={models[name]}" for name in sorted(models, key=lambda name: name != study.baseline)]
        with tempfile.TemporaryDirectory() as work:
            figures = Path(work) / "figures.json"
            command = [*DEPTHATTN, "benchmark", "--json", str(figures), "step"]
            command += ["--models", *named, "--rounds", str(study.timing_rounds)]
            print(f"{rung}: timing {', '.join(models)}", flush=True)
            if subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
                raise ValueError(f"timing failed; see it fail: {shlex.join(command[1:])}")
            measured = json.loads(figures.read_text(encoding="utf-8"))["figures"]
        known[rung] = {
            name: _timed(measured[name], micro_batches(models[name])) for name in models if "seconds" in measured[name]
        }
        source = (
            f"interleaved steps of one micro-batch on one device, median of {study.timing_rounds} rounds, times the "
            "micro-batches of a rank; parallel ranks and messages between them are not in it"
        )
        file.write_text(json.dumps({"timing": known, "timing_source": source}, indent=1) + "\n", encoding="utf-8")


def _timed(figures: dict[str, Any], micro_batches: int) -> dict[str, float]:
    low, high = figures["interval"]
    middle = sorted(figures["seconds"])[len(figures["seconds"]) // 2]
    return {"seconds_per_step": middle * micro_batches, "ratio": figures["ratio"], "low": low, "high": high}


def _show_rungs(made: dict[str, Any]) -> None:
    columns = ("rung", "layers", "hidden", "N", "parameters", "batch", "tokens a sequence", "lr")
    rows = [
        (
            *(rung["rung"], str(rung["num_layers"]), str(rung["hidden_size"])),
            *(f"{rung['size']:,}", f"{rung['parameters']:,}", str(rung["global_batch_size"])),
            *(str(rung["sequence_length"]), f"{rung['learning_rate']:.3g}"),
        )
        for rung in made["rungs"]
    ]
    print(printable(made["title"]))
    print_table(columns, rows)


def _show_cost(made: dict[str, Any], output: Path) -> None:
    """Points of a rung and method in one row; device-hours where a step has been predicted or timed."""
    from megatron_depthattn.study.results import TIMING

    timed = output / TIMING
    timing = json.loads(timed.read_text(encoding="utf-8"))["timing"] if timed.is_file() else {}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for point in made["points"]:
        groups[point["rung"], point["method"]].append(point)
    rows, totals = [], [0.0, 0.0, 0.0]
    for (rung, method), points in groups.items():
        seconds = points[0]["predicted_step_seconds"] or timing.get(rung, {}).get(method, {}).get("seconds_per_step")
        tokens, flops = (sum(point[key] for point in points) for key in ("tokens", "flops"))
        hours = sum(point["steps"] * point["world"] for point in points) * (seconds or 0.0) / 3600
        totals = [total + more for total, more in zip(totals, (tokens, flops, hours), strict=True)]
        step = f"{seconds:.3g}" if seconds else "not timed yet"
        figures = (f"{tokens / 1e6:,.2f}", f"{flops / 1e15:,.4g}", step, f"{hours:,.2f}" if seconds else "")
        rows.append((rung, method, str(len(points)), *figures))
    tokens, flops, hours = totals
    rows.append(
        ("all", "", str(len(made["points"])), f"{tokens / 1e6:,.2f}", f"{flops / 1e15:,.4g}", "", f"{hours:,.2f}")
    )
    print_table(("rung", "method", "runs", "tokens, M", "PFLOPs", "s a step", "device-hours"), rows, title="Cost")
