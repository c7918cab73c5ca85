"""Submit a run to Slurm.

Checks the config for the nodes and processes that are asked for, freezes config and code in <run.dir>/job, writes the
job script there and submits it. What is wrong is reported in one line (exit code 1) before anything is queued.

    launch/submit configs/3b.yaml run.dir=runs/3b data.path=/data/corpus --nodes 4 --gpus-per-node 8 --time 24:00:00
    launch/submit configs/410m.yaml run.dir=runs/seeds data.path=/data/corpus --nodes 1 --gpus-per-node 8 \\
        --array run.seed=1,2,3
    launch/submit ... --chain 3          three jobs, each resumes where the one before it ended
    launch/submit ... --evaluate 'piqa sciq' --evaluate-every 1000      and a job that scores its checkpoints meanwhile
    launch/submit ... --container image.sqsh --container-runtime pyxis --container-mounts /data
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import megatron_depthattn
from megatron_depthattn.cli.common import check, find_config, new_parser, run
from megatron_depthattn.cli.evaluate import check_evaluate, new_evaluate_parser
from megatron_depthattn.config import RunConfig, load_config, validate
from megatron_depthattn.config.resolve import CPU, GPU, resolve
from megatron_depthattn.estimate.fits import check_data, check_fit
from megatron_depthattn.launch import scripts
from megatron_depthattn.launch.freeze import freeze
from megatron_depthattn.terminal import printable

MARKS = ("# ---- options of launch/submit\n", "# ---- settings of launch/submit\n")
"""Lines of the job script after which #SBATCH lines and variables are put, which win over what is before them."""
PASSED_ON = {
    "partition": ("NAME", "queue to submit to"),
    "account": ("NAME", "account to charge"),
    "qos": ("NAME", "quality of service"),
    "time": ("LIMIT", "as sbatch takes it: minutes, H:M:S or D-H, such as 30, 8:00:00, 2-12"),
    "constraint": ("FEATURES", "that nodes must have"),
    "mem": ("SIZE", "memory of a node, such as 200G"),
    "job-name": ("NAME", "default: the last part of run.dir"),
    "mail-user": ("ADDRESS", "who gets Slurm's mails"),
    "mail-type": ("EVENTS", "that are mailed, such as END,FAIL"),
    "cpus-per-task": ("N", "CPUs of a node's processes together (there is one task a node)"),
}
"""Options of sbatch that are taken as they are."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on stderr."""
    return run(submit, _parser().parse_intermixed_args(arguments))


def submit(options: argparse.Namespace) -> None:
    """What the command does.

    Raises:
        ValueError: the config cannot run in this world, the options do not fit together, or sbatch rejects the job.
    """
    processes = options.gpus_per_node or options.processes_per_node or 0
    check((processes < 1, "no processes on a node: set --gpus-per-node or --processes-per-node to 1 or more"))
    configs = _configs(options)
    expected: dict[str, None] = {}
    for name, config in configs.items():
        try:
            validate(config, options.nodes * processes)
            resolved = resolve(config, GPU if options.gpus_per_node else CPU)  # not what this login node has
            validate(resolved.config, options.nodes * processes)
            expected |= dict.fromkeys(resolved.lines)
            problems: list[str | None] = list(check_data(config))
            if options.gpus_per_node:
                fit, problem = check_fit(resolved.config, options.nodes * processes, options.gpu)
                limit = seconds_of(options.time)
                jobs = (
                    f"; --time {options.time}: {fit.run_hours * 3600 / limit:,.1f} jobs of that length" if limit else ""
                )
                expected[fit.line + jobs] = None
                problems.append(problem)
            check(*((bool(problem), str(problem)) for problem in problems))
        except ValueError as error:
            place = f"{name}, " if len(configs) > 1 else ""
            raise ValueError(f"not submitted: {place}{options.nodes} nodes x {processes} processes: {error}") from error
    run_dir = Path(_load(options).run.dir).resolve()
    check_options(options, run_dir)
    job, root = run_dir / "job", Path(megatron_depthattn.__file__).parents[1]
    for line in expected:
        print(printable(f"expected on the nodes: {line}"))
    print(printable(freeze(job, configs, root, replace=options.refreeze)))
    template = (job / "code" / scripts().relative_to(root) / "slurm.sbatch").read_text(encoding="utf-8")
    script, follower = job / "job.sbatch", job / "evaluate.sbatch"
    for path in (script, follower) if options.evaluate else (script,):
        text = render(template, options, run_dir, len(configs), processes, follows=path == follower)
        path.write_text(text, encoding="utf-8")
        print(f"job script: {path}")
    if options.dry_run:
        print(f"nothing submitted (--dry-run); to do so: {shlex.join(['sbatch', str(script)])}")
        if options.evaluate:
            for begins in _followers("JOB", options, len(configs)):
                print(f"and then: {shlex.join(['sbatch', *begins, str(follower), 'JOB'])}")
        return
    ids, followers = queue(options, script, follower, len(configs))
    log = job / ("slurm-<job>_<task>.out" if options.array else f"slurm-{ids[0]}.out")
    print(f"submitted {', '.join(ids)}")
    print(f"log: {log}; of the ranks: {run_dir}/{'task_*/' if options.array else ''}logs/<start>/")
    for each in followers:
        print(f"{each} scores the checkpoints; log: {job}/evaluate-{each}{'_<task>' * bool(options.array)}.out")
    ids += followers
    print(f"queue: squeue -j {','.join(ids)}; cancel: scancel {' '.join(ids)}")


def queue(options: argparse.Namespace, script: Path, follower: Path, num_configs: int) -> tuple[list[str], list[str]]:
    """Submit the jobs of the run, and those that score its checkpoints; returns their ids."""
    ids: list[str] = []
    for _ in range(options.chain):
        ids.append(_sbatch(*(f"--dependency=afterany:{last}" for last in ids[-1:]), str(script)))
    followers: list[str] = []
    for *place, begins in _followers(ids[0], options, num_configs) if options.evaluate else ():
        for _ in range(options.chain if options.max_requeues == 0 else 1):  # who is not requeued is a chain as well
            followers.append(_sbatch(*place, begins, str(follower), ",".join(ids)))
            begins = f"--dependency=afterany:{followers[-1]}"
    return ids, followers


def _followers(job: str, options: argparse.Namespace, num_configs: int) -> list[list[str]]:
    """How sbatch is given the job that scores; of an array one for each task, which begins when that task has begun:
    ``after`` a whole array is after the begin of its last task."""
    if not options.array:
        return [[f"--dependency=after:{job}"]]
    return [[f"--array={task}", f"--dependency=after:{job}_{task}"] for task in range(num_configs)]


def _load(options: argparse.Namespace, settings: Sequence[str] = ()) -> RunConfig:
    """The config that was asked for, by file or by the name of a shipped one."""
    resumed = ["checkpoint.load=latest"] if options.chain > 1 else []  # also after a job that ended by itself
    return load_config(find_config(options.config), [*resumed, *map(find_config, options.overrides), *settings])


def render(
    template: str,
    options: argparse.Namespace,
    run_dir: Path,
    num_configs: int,
    processes: int,
    *,
    follows: bool = False,
) -> str:
    """The job script: `slurm.sbatch` with the choices as further #SBATCH lines and settings, which win.

    Args:
        follows: of the job that scores the checkpoints; it is given the jobs that it follows.
    """
    job = run_dir / "job"
    flags = {"job-name": run_dir.name, "nodes": options.nodes, "gpus-per-node": options.gpus_per_node}
    flags |= {name: value for name in PASSED_ON if (value := getattr(options, name.replace("-", "_")))}
    flags["signal"] = f"B:USR1@{options.signal_lead}"
    if follows:
        gpus = bool(options.gpus_per_node) if options.evaluate_gpus is None else options.evaluate_gpus
        flags |= {"job-name": f"{flags['job-name']}-evaluate", "nodes": 1, "gpus-per-node": int(gpus), "mem": None}
        flags |= {"cpus-per-task": options.evaluate_cpus, "time": options.evaluate_time or options.time}
    log = ("/evaluate-" if follows else "/slurm-") + ("%A_%a.out" if options.array else "%j.out")
    flags["output"] = str(job).replace("%", "%%") + log
    if options.array:
        flags["array"] = f"0-{num_configs - 1}" + (f"%{options.array_limit}" if options.array_limit else "")
    if not follows:
        flags["dependency"] = options.dependency or (options.after and f"afterok:{options.after}")
    lines = [f"--{name}={value}" for name, value in flags.items() if value]
    lines += ["--exclusive"] * (options.exclusive and not follows) + ["--no-requeue"] * (options.max_requeues == 0)
    lines += options.evaluate_sbatch if follows else options.sbatch
    config, own_dir = shlex.quote(f"{job}/config.yaml"), shlex.quote(str(run_dir))
    if options.array:  # only the number is the shell's to fill in
        config = shlex.quote(f"{job}/config_") + '"$SLURM_ARRAY_TASK_ID".yaml'
        own_dir = shlex.quote(f"{run_dir}/task_") + '"$SLURM_ARRAY_TASK_ID"'
    settings = [
        f"CODE={shlex.quote(str(job / 'code'))}",
        f"PYTHON={shlex.quote(options.python)}",
        f"MAX_REQUEUES={options.max_requeues}",
        *_container(options, run_dir),
    ]
    if follows:
        jobs = '"${1:+${1}_$SLURM_ARRAY_TASK_ID}"' if options.array else '"${1:-}"'
        arguments = f"--follow {own_dir} {shlex.join(evaluate_words(options))}"
        settings += ["SCRIPT=evaluate.sh", f"FOLLOWED={jobs}", f"ARGUMENTS=({arguments})"]
    else:
        settings += [f"ARGUMENTS=({config})", f"RUN_DIR={own_dir}", f"export NPROC_PER_NODE={processes}"]
    # Of an #SBATCH line Slurm makes words as a shell does, but for `$` and backquotes.
    quoted = [re.sub(r'["\\]', r"\\\g<0>", line) for line in lines]
    for mark, more in zip(MARKS, ([f'#SBATCH "{line}"' for line in quoted], settings), strict=True):
        before, after = template.split(mark)
        template = before + mark + "".join(f"{line}\n" for line in more) + after
    return template


def evaluate_words(options: argparse.Namespace) -> list[str]:
    """The options of `depthattn evaluate` in --evaluate, where tasks may come without their option."""
    words = shlex.split(options.evaluate)
    words = words if words[:1] and words[0].startswith("-") else ["--tasks", *words]
    return [*words, "--every", str(options.evaluate_every)] if options.evaluate_every else words


def _container(options: argparse.Namespace, run_dir: Path) -> list[str]:
    """Settings that run each node's task in a container; what the job itself needs is mounted at its own place."""
    if not options.container:
        return []
    here = Path.cwd()
    mounts = dict.fromkeys([str(run_dir), str(here), *filter(None, options.container_mounts.split(","))])
    if options.container_runtime == "pyxis":
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        flags = [f"--container-image={options.container}", f"--container-mounts={pairs}"]
        return [f"SRUN=({shlex.join([*flags, f'--container-workdir={here}', '--no-container-mount-home'])})"]
    flags = ["--nv"] * bool(options.gpus_per_node) + [f"--bind={mount}" for mount in mounts]
    return [f"WRAP=({shlex.join(['apptainer', 'exec', *flags, f'--pwd={here}', options.container])})"]


def _configs(options: argparse.Namespace) -> dict[str, RunConfig]:
    """The config of each task, by file name; tasks of an array have folders of their own in run.dir, and in
    checkpoint.dir where several of them share it."""
    config = _load(options)
    if not options.array:
        return {"config.yaml": config}
    check((not config.run.dir, "run.dir is not set: the tasks of an array have folders in it; set run.dir=runs/sweep"))
    tasks = [_load(options, settings) for settings in sweep(options.array)]
    uses = collections.Counter(task.checkpoint.dir for task in tasks)
    found = {}
    for number, task in enumerate(tasks):
        run, checkpoint, wandb = task.run, task.checkpoint, task.log.wandb
        run = dataclasses.replace(run, dir=str(Path(config.run.dir) / f"task_{number}"))
        if checkpoint.dir and uses[checkpoint.dir] > 1:
            checkpoint = dataclasses.replace(checkpoint, dir=str(Path(checkpoint.dir) / f"task_{number}"))
        if wandb.project:
            wandb = dataclasses.replace(wandb, name=wandb.name or f"{Path(config.run.dir).name}/task_{number}")
        log = dataclasses.replace(task.log, wandb=wandb)
        found[f"config_{number}.yaml"] = dataclasses.replace(task, run=run, checkpoint=checkpoint, log=log)
    return found


def sweep(text: str) -> list[list[str]]:
    """Overrides of each task: ``a.b=1,2,3`` is a task for each value; else a file, a task for each line of ``a.b=c``.

    Raises:
        ValueError: neither, or there is no task in it.
    """
    key, _, values = text.partition("=")
    tasks: list[list[str]] = []
    if values and re.fullmatch(r"[\w.]+", key):
        tasks = [[f"{key}={value}"] for value in values.split(",") if value]
    elif Path(text).is_file():
        lines = Path(text).read_text(encoding="utf-8").splitlines()
        tasks = [words for line in lines if (words := shlex.split(line, comments=True))]
    check((not tasks, f"--array {text} has no task: give a.b=1,2,3, or a file with a line of a.b=c settings for each"))
    return tasks


def check_options(options: argparse.Namespace, run_dir: Path) -> None:
    """Raise ValueError for options that do not fit together, and for text that Slurm or bash would read otherwise:
    no quoting helps against a newline in an option."""
    lead, here = options.signal_lead, Path.cwd()
    limits = {"--time": options.time, "--evaluate-time": options.evaluate_time}
    of_evaluate = [
        f"--{name.replace('_', '-')}" for name, value in vars(options).items() if "evaluate_" in name and value
    ]
    if options.evaluate is not None:
        check_evaluate(new_evaluate_parser().parse_args(["--follow", str(run_dir), *evaluate_words(options)]))
    texts = {"run.dir": str(run_dir), "the current folder": str(here)}
    for name, value in vars(options).items():
        texts[f"--{name.replace('_', '-')}"] = " ".join(value) if isinstance(value, list) else str(value)
    # Of an option: its dashes and name, a value without quotes around it, no other option behind it.
    others = options.sbatch + options.evaluate_sbatch
    odd = [each for each in others if not re.fullmatch(r"--?[\w-]+(=(?!(['\"]).*\2$).*)?", each)]
    odd += [each for each in others if re.search(r"\s--?[a-zA-Z]", each)]
    check(
        *(
            (not text.isprintable(), f"{name} is {text!r}: a job script takes no control characters; set another")
            for name, text in texts.items()
        ),
        ("\\" in str(run_dir), f"run.dir is {run_dir}: Slurm reads a backslash in a log's path otherwise; set another"),
        (lead < 1, f"--signal-lead {lead}: set the seconds that saving takes at most, 1 or more"),
        *(
            (
                (limit := seconds_of(given)) is not None and 2 * lead > limit,
                f"--signal-lead {lead} with {name} {given} ({limit} s): most of the job would be over before it "
                f"began, as Slurm warns up to a minute early; set at most half of the limit, or a longer {name}",
            )
            for name, given in limits.items()
        ),
        ((options.evaluate_gpus or 0) < 0, f"--evaluate-gpus {options.evaluate_gpus}: set 0 or more"),
        (
            options.evaluate_cpus is not None and options.evaluate_cpus < 1,
            f"--evaluate-cpus {options.evaluate_cpus}: set 1 or more, or leave it out",
        ),
        (
            options.evaluate is None and bool(of_evaluate),
            f"{', '.join(of_evaluate)}: only with --evaluate, what to score",
        ),
        (options.chain < 1, f"--chain {options.chain}: set 1 or more jobs"),
        (options.chain > 1 and bool(options.array), "--chain and --array cannot be combined: give one of them"),
        (bool(options.after and options.dependency), "--after and --dependency say the same: give one of them"),
        (bool(options.container_mounts) and not options.container, "--container-mounts without --container: set both"),
        (
            bool(options.container) and bool(set(",:") & set(f"{run_dir}{here}")),
            f"run.dir is {run_dir}, the current folder {here}: a container's mounts are split at , and : ; use others",
        ),
        (
            bool(odd),
            f"--sbatch={''.join(odd[:1])!r} is not one option with a value that is taken as it is; write "
            "--sbatch=--qos=high, --sbatch=... again for another option, and no quotes around the value",
        ),
    )


def seconds_of(limit: str | None) -> int | None:
    """A time limit as sbatch takes it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None without one."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit or "")
    if match is None:
        return None
    days, *parts = match.groups()
    values = [int(part) for part in parts if part]
    units = (3600, 60, 1) if days or len(values) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(value * unit for value, unit in zip(values, units, strict=False))


def _sbatch(*arguments: str) -> str:
    """Submit; returns the job's id."""
    check((not shutil.which("sbatch"), "there is no sbatch here: submit from a node that has Slurm's commands"))
    command = ["sbatch", "--parsable", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            "no answer of sbatch for 300 s: see scontrol ping; squeue shows whether it is queued"
        ) from error
    check((done.returncode != 0, f"sbatch rejected it: {done.stderr}"))
    return done.stdout.strip().partition(";")[0]


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("submit", __doc__)
    add = parser.add_argument
    add("config", help="YAML file of the run")
    add("overrides", nargs="*", help="further YAML files and a.b=c settings, later ones win")
    add("--nodes", type=int, required=True, metavar="N", help="how many nodes")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs of each node, and as many processes")
    size.add_argument("--processes-per-node", type=int, metavar="N", help="processes of each node, without GPUs")
    add("--gpu", default="H100-80GB", metavar="NAME", help="GPU of the nodes, for the planner (default H100-80GB)")
    for name, (metavar, meaning) in PASSED_ON.items():
        add(f"--{name}", metavar=metavar, help=meaning)
    add("--exclusive", action="store_true", help="whole nodes, shared with nobody")
    add("--signal-lead", type=int, default=300, metavar="SECONDS", help="from the signal to the time limit (300)")
    add("--max-requeues", type=int, default=100, metavar="N", help="at the time limit; 0: end instead (100)")
    add("--array", metavar="SWEEP", help="a.b=1,2,3, a task a value; or a file, a task a line of settings")
    add("--array-limit", type=int, metavar="N", help="tasks of the array at a time, at most")
    add("--after", metavar="JOB", help="begin when that job has ended well")
    add("--dependency", metavar="SPEC", help="another dependency, as sbatch takes it")
    add("--chain", type=int, default=1, metavar="N", help="jobs, each begins when the one before it has ended")
    scores = "tasks, such as 'piqa sciq', or options of depthattn evaluate, such as '--suite paper --data data/pile'"
    add("--evaluate", metavar="TASKS", help=f"a second job scores the checkpoints meanwhile: {scores}")
    add("--evaluate-every", type=int, metavar="N", help="only steps divisible by N, and the last one")
    add("--evaluate-gpus", type=int, metavar="N", help="of that job (default 1 where the run has GPUs)")
    add("--evaluate-cpus", type=int, metavar="N", help="CPUs of that job")
    add("--evaluate-time", metavar="LIMIT", help="of that job, which requeues itself (default: --time)")
    add("--evaluate-sbatch", action="append", default=[], metavar="OPTION", help="as --sbatch, for that job")
    add("--container", metavar="IMAGE", help="run each node's task in this image")
    add("--container-runtime", choices=["pyxis", "apptainer"], default="pyxis", help="default: pyxis")
    add("--container-mounts", default="", metavar="MOUNTS", help="mounts besides run.dir and the current folder")
    add("--python", default=sys.executable, metavar="PATH", help="interpreter of the job (default: this one)")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="another option, as --sbatch=--nice=100")
    add("--refreeze", action="store_true", help="resume with another config or code than run.dir was frozen with")
    add("--dry-run", action="store_true", help="write everything, submit nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
