"""Submit a run to Slurm.

Checks the config for the nodes and processes that are asked for, freezes config and code in <run.dir>/job, writes the
job script there and submits it. What is wrong is reported in one line (exit code 1) before anything is queued.

    launch/submit configs/3b.yaml run.dir=runs/3b data.path=/data/corpus --nodes 4 --gpus-per-node 8 --time 24:00:00
    launch/submit configs/360m.yaml run.dir=runs/seeds data.path=/data/corpus --nodes 1 --gpus-per-node 8 \\
        --array run.seed=1,2,3
    launch/submit ... --chain 3          three jobs, each resumes where the one before it ended
    launch/submit ... --container image.sqsh --container-runtime pyxis --container-mounts /data
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import megatron_depthattn
from megatron_depthattn.cli.common import find_config
from megatron_depthattn.config import RunConfig, load_config, validate
from megatron_depthattn.config.resolve import CPU, GPU, resolve
from megatron_depthattn.estimate.fits import check_data, check_fit
from megatron_depthattn.launch import scripts
from megatron_depthattn.launch.freeze import freeze
from megatron_depthattn.terminal import printable

MARK = "# ---- settings of launch/submit\n"
PASSED_ON = {
    "partition": ("NAME", "queue to submit to"),
    "account": ("NAME", "account to charge"),
    "qos": ("NAME", "quality of service"),
    "time": ("LIMIT", "as sbatch takes it: minutes, H:M:S or D-H, such as 30, 8:00:00, 2-12"),
    "constraint": ("FEATURES", "that nodes must have"),
    "cpus-per-task": ("N", "CPUs of a node's processes together (there is one task a node)"),
    "mem": ("SIZE", "memory of a node, such as 200G"),
    "job-name": ("NAME", "default: the last part of run.dir"),
    "mail-user": ("ADDRESS", "who gets Slurm's mails"),
    "mail-type": ("EVENTS", "that are mailed, such as END,FAIL"),
}
"""Options of sbatch that are taken as they are."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on stderr."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        return submit(options)
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1


def submit(options: argparse.Namespace) -> int:
    """What the command does.

    Raises:
        ValueError: the config cannot run in this world, or the options do not fit together, or sbatch refuses.
    """
    processes = options.gpus_per_node or options.processes_per_node
    configs = _configs(options)
    nodes_have = GPU if options.gpus_per_node else CPU  # not what this login node has
    choices: dict[str, None] = {}
    for name, config in configs.items():
        try:
            validate(config, options.nodes * processes)
            resolved = resolve(config, nodes_have)
            validate(resolved.config, options.nodes * processes)
            choices |= dict.fromkeys(resolved.lines)
            for problem in check_data(config):
                raise ValueError(problem)
            if options.gpus_per_node:
                choices |= dict.fromkeys([_fit(resolved.config, options)])
        except ValueError as error:
            place = f"{name}, " if len(configs) > 1 else ""
            raise ValueError(f"not submitted: {place}{options.nodes} nodes x {processes} processes: {error}") from error
    run_dir = Path(_load(options).run.dir).resolve()
    _check(options)
    _check_text(options, run_dir)
    job = run_dir / "job"
    root = Path(megatron_depthattn.__file__).parents[1]
    for line in choices:
        print(printable(f"expected on the nodes: {line}"))
    print(printable(freeze(job, configs, root, replace=options.refreeze)))
    script = job / "job.sbatch"
    template = (job / "code" / scripts().relative_to(root) / "slurm.sbatch").read_text(encoding="utf-8")
    script.write_text(render(template, options, run_dir, len(configs), processes), encoding="utf-8")
    print(f"job script: {script}")
    if options.dry_run:
        print(f"nothing submitted (--dry-run); to do so: {shlex.join(['sbatch', str(script)])}")
        return 0
    ids: list[str] = []
    for _ in range(options.chain):
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        ids.append(_sbatch([*after, str(script)]))
    log = job / ("slurm-<job>_<task>.out" if options.array else f"slurm-{ids[0]}.out")
    print(f"submitted {', '.join(ids)}")
    print(f"log: {log}; of the ranks: {run_dir}/{'task_*/' if options.array else ''}logs/<start>/")
    follow = shlex.join(["tail", "-F", str(log)])
    print(f"follow: {follow}; queue: squeue -j {','.join(ids)}; cancel: scancel {' '.join(ids)}")
    return 0


def _load(options: argparse.Namespace, settings: Sequence[str] = ()) -> RunConfig:
    """The config that was asked for, by file or by the name of a shipped one."""
    return load_config(find_config(options.config), [*map(find_config, options.overrides), *settings])


def _fit(config: RunConfig, options: argparse.Namespace) -> str:
    """Ranks, memory and hours against --time, for the log.

    Raises:
        ValueError: a rank does not fit the GPU.
    """
    fit, problem = check_fit(config, options.nodes * options.gpus_per_node, options.gpu)
    if problem:
        raise ValueError(problem)
    limit = seconds_of(options.time)
    jobs = f"; --time {options.time}: {fit.run_hours * 3600 / limit:,.1f} jobs of that length" if limit else ""
    return fit.line + jobs


def render(template: str, options: argparse.Namespace, run_dir: Path, num_configs: int, processes: int) -> str:
    """The job script: `slurm.sbatch` with the choices as #SBATCH lines and settings."""
    job = run_dir / "job"
    flags = {"job-name": run_dir.name, "nodes": str(options.nodes)}
    flags |= {name: value for name in PASSED_ON if (value := getattr(options, name.replace("-", "_")))}
    if options.gpus_per_node:
        flags["gpus-per-node"] = str(options.gpus_per_node)
    flags["signal"] = f"B:USR1@{options.signal_lead}"
    flags["output"] = str(job).replace("%", "%%") + ("/slurm-%A_%a.out" if options.array else "/slurm-%j.out")
    if options.array:
        flags["array"] = f"0-{num_configs - 1}" + (f"%{options.array_limit}" if options.array_limit else "")
    if dependency := options.dependency or (options.after and f"afterok:{options.after}"):
        flags["dependency"] = dependency
    lines = [f"--{name}={value}" for name, value in flags.items()]
    lines += ["--exclusive"] * options.exclusive + ["--no-requeue"] * (options.max_requeues == 0) + options.sbatch
    config, own_dir = shlex.quote(f"{job}/config.yaml"), shlex.quote(str(run_dir))
    if options.array:  # only the number is the shell's to fill in
        config = shlex.quote(f"{job}/config_") + '"$SLURM_ARRAY_TASK_ID".yaml'
        own_dir = shlex.quote(f"{run_dir}/task_") + '"$SLURM_ARRAY_TASK_ID"'
    settings = [
        f"CODE={shlex.quote(str(job / 'code'))}",
        f"PYTHON={shlex.quote(options.python)}",
        f"ARGUMENTS=({config})",
        f"RUN_DIR={own_dir}",
        f"MAX_REQUEUES={options.max_requeues}",
        f"export NPROC_PER_NODE={processes}",
        *_container(options, run_dir),
    ]
    replaced = {line.partition("=")[0] for line in lines} - {"--no-requeue"}
    head, body = template.split(MARK)
    kept = [line for line in head.splitlines() if _flag_of(line) not in replaced]
    if options.max_requeues == 0:
        kept.remove("#SBATCH --requeue")
    first = next(number for number, line in enumerate(kept) if line.startswith("#SBATCH"))
    kept[first:first] = [f"#SBATCH {_quoted_for_sbatch(line)}" for line in lines]
    return "\n".join([*kept, MARK.rstrip(), *settings]) + "\n" + body


def _quoted_for_sbatch(option: str) -> str:
    """One option for a line of #SBATCH, of which Slurm makes words as a shell does, but for `$` and backquotes."""
    if not re.search(r"[^\w@%+=:,./-]", option):
        return option
    escaped = re.sub(r'["\\]', r"\\\g<0>", option)
    return f'"{escaped}"'


def _flag_of(line: str) -> str:
    return line.removeprefix("#SBATCH ").partition("=")[0] if line.startswith("#SBATCH ") else ""


def _container(options: argparse.Namespace, run_dir: Path) -> list[str]:
    """Settings that run each node's task in a container; what the job itself needs is mounted at its own place."""
    if not options.container:
        return []
    mounts = [str(run_dir), str(Path.cwd())] + [mount for mount in options.container_mounts.split(",") if mount]
    if options.container_runtime == "pyxis":
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in dict.fromkeys(mounts))
        flags = [f"--container-image={options.container}", f"--container-mounts={pairs}"]
        flags += [f"--container-workdir={Path.cwd()}", "--no-container-mount-home"]
        return [f"SRUN=({shlex.join(flags)})"]
    binds = [f"--bind={mount}" for mount in dict.fromkeys(mounts)]
    nvidia = ["--nv"] if options.gpus_per_node else []
    return [f"WRAP=({shlex.join(['apptainer', 'exec', *nvidia, *binds, f'--pwd={Path.cwd()}', options.container])})"]


def _configs(options: argparse.Namespace) -> dict[str, RunConfig]:
    """The config of each task, by file name; tasks of an array have folders of their own in run.dir, and in
    checkpoint.dir where several of them share it."""
    config = _load(options)
    if not options.array:
        return {"config.yaml": config}
    if not config.run.dir:
        raise ValueError("run.dir is not set: the tasks of an array have their folders in it; set run.dir=runs/sweep")
    tasks = [_load(options, settings) for settings in sweep(options.array)]
    uses = collections.Counter(task.checkpoint.dir for task in tasks)
    found = {}
    for number, task in enumerate(tasks):
        run, checkpoint = task.run, task.checkpoint
        run = dataclasses.replace(run, dir=str(Path(config.run.dir) / f"task_{number}"))
        if checkpoint.dir and uses[checkpoint.dir] > 1:
            checkpoint = dataclasses.replace(checkpoint, dir=str(Path(checkpoint.dir) / f"task_{number}"))
        found[f"config_{number}.yaml"] = dataclasses.replace(task, run=run, checkpoint=checkpoint)
    return found


def sweep(text: str) -> list[list[str]]:
    """Overrides of each task: ``a.b=1,2,3`` is a task for each value; else a file, a task for each line of ``a.b=c``.

    Raises:
        ValueError: neither, or there is no task in it.
    """
    key, equals, values = text.partition("=")
    if equals and re.fullmatch(r"[\w.]+", key):
        tasks = [[f"{key}={value}"] for value in values.split(",") if value]
    elif Path(text).is_file():
        lines = Path(text).read_text(encoding="utf-8").splitlines()
        tasks = [shlex.split(line, comments=True) for line in lines]
        tasks = [task for task in tasks if task]
    else:
        raise ValueError(f"--array {text}: neither a.b=1,2,3 nor a file with a line of a.b=c settings for each task")
    if not tasks:
        raise ValueError(f"--array {text} has no task in it; give at least one value")
    return tasks


def _check(options: argparse.Namespace) -> None:
    if options.signal_lead < 1:
        raise ValueError(f"--signal-lead {options.signal_lead}: set the seconds that saving takes at most, 1 or more")
    limit = seconds_of(options.time)
    if limit is not None and 2 * options.signal_lead > limit:
        raise ValueError(
            f"--signal-lead {options.signal_lead} with --time {options.time} ({limit} s): Slurm warns up to a minute "
            "early, so most of the job would be over before it began and it would be queued again and again; set "
            f"--signal-lead to {limit // 2} or less, or a longer --time"
        )
    if options.chain < 1 or (options.chain > 1 and options.array):
        raise ValueError(f"--chain {options.chain}: set 1 or more jobs, and no --array with more than one")
    if options.after and options.dependency:
        raise ValueError("--after and --dependency say the same: give one of them")
    if options.container_mounts and not options.container:
        raise ValueError("--container-mounts without --container: give the image as well")
    for option in options.sbatch:
        if not option.startswith("-"):
            raise ValueError(f"--sbatch={option!r} is no option; give it with its dashes, as --sbatch=--nice=100")
        name, _, value = option.partition("=")
        if re.search(r"\s", name) or re.search(r"\s--?[a-zA-Z]", value) or re.fullmatch(r"(['\"]).*\1", value):
            raise ValueError(
                f"--sbatch={option!r}: it is one option, whose value is taken as it is; write --sbatch=--qos=high, "
                "--sbatch=... again for another option, and no quotes around the value"
            )


def _check_text(options: argparse.Namespace, run_dir: Path) -> None:
    """What the job script is made of: Slurm and bash read it, and no quoting helps against a newline in an option."""
    names = [*PASSED_ON, "dependency", "after", "python", "container", "container-mounts"]
    texts = [("run.dir", str(run_dir)), ("the current folder", str(Path.cwd()))]
    texts += [(f"--{name}", getattr(options, name.replace("-", "_")) or "") for name in names]
    texts += [("--sbatch", option) for option in options.sbatch]
    for name, text in texts:
        if not text.isprintable():
            raise ValueError(f"{name} is {text!r}: a job script takes no control characters; set another")
    if "\\" in str(run_dir):
        raise ValueError(f"run.dir is {run_dir}: Slurm reads a backslash in the path of a log otherwise; set another")
    if options.container:
        for name, folder in texts[:2]:
            if set(",:") & set(folder):
                raise ValueError(f"{name} is {folder}: a container's mounts are split at , and : ; use another folder")


def seconds_of(limit: str | None) -> int | None:
    """A time limit as sbatch takes it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None without one."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit or "")
    if match is None:
        return None
    days, *parts = (int(part) if part else None for part in match.groups())
    first, second, third = parts
    if days is not None:  # hours first
        return days * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return (first or 0) * 3600 + (second or 0) * 60 + third
    return (first or 0) * 60 + (second or 0)


def _sbatch(arguments: list[str]) -> str:
    """Submit; returns the job's id."""
    try:
        done = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True, timeout=300)
    except FileNotFoundError as error:
        raise ValueError("there is no sbatch here: submit from a node that has Slurm's commands") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            "no answer of sbatch for 300 s: see scontrol ping; squeue shows whether it is queued"
        ) from error
    if done.returncode:
        raise ValueError(f"sbatch rejected it: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="depthattn submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
