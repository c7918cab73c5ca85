"""Jobs under a real Slurm of three nodes: they train, resume after the time limit, end when cancelled.

All nodes are this machine, with hostnames of their own.
"""

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tests.e2e.commands import wait_until
from tests.launch.jobs import FULL, environment, history, hostile_run_dir, must_reach, records, run, trajectory

pytestmark = [pytest.mark.usefixtures("slurm"), pytest.mark.timeout(2400)]
TWO_NODES = ("--nodes", "2", "--processes-per-node", "1")


def submit(*arguments: str | Path, **variables: str) -> str:
    """The id of the (last) job that trains."""
    done = run("launch/submit", *arguments, seconds=120, **variables)
    assert done.returncode == 0, done.stderr
    ids = re.search(r"^submitted (.*)$", done.stdout, flags=re.M)
    assert ids, done.stdout
    return ids[1].split(", ")[-1]


def slurm_says(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def states(job: str) -> list[str]:
    """Of the job, or of each task of an array."""
    return re.findall(r"JobState=(\w+)", slurm_says("scontrol", "show", "job", job))


def begin(shown: str) -> str:
    """When the job that scontrol shows has begun."""
    return re.findall(r"StartTime=(\S+)", shown)[0]


def must_end(job: str, log: Path, *, seconds: float = 400) -> list[str]:
    """Wait until no task of the job waits or runs; returns the states."""
    live = {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"}
    assert wait_until(lambda: not live & set(states(job)), seconds, poll=0.5), [*states(job), log.read_text()[-3000:]]
    return states(job)


def test_a_job_that_is_warned_saves_requeues_and_resumes(config: Path, undisturbed: Path, tmp_path: Path):
    """Two nodes; the warning is sent as Slurm sends it before the time limit (`make launch-full` waits for that).

    The run's folder has a name that a shell would obey: it, and every other value, reaches the job as it is. Another
    job scores the checkpoints meanwhile, and ends with the run.
    """
    run_dir, overlay = hostile_run_dir(tmp_path)
    comment = f"$(touch {tmp_path}/obeyed) #2"
    scores = ("--evaluate", scored(config), "--evaluate-every", "40", "checkpoint.keep=null", "--evaluate-time", "9")
    more = ("--time", "10", "--signal-lead", "60", f"--sbatch=--comment={comment}")
    job = submit(config, overlay, *TWO_NODES, *more, *scores)
    follower = str(int(job) + 1)
    assert f"Dependency=after:{job}" in slurm_says("scontrol", "show", "job", follower)
    shown = slurm_says("scontrol", "show", "job", job)
    assert f"JobName={run_dir.name}\n" in shown and f"Comment={comment} \n" in shown
    log = run_dir / f"job/slurm-{job}.out"
    must_reach(run_dir, 10, log)
    slurm_says("scancel", "--batch", "--signal=USR1", job)
    assert must_end(job, log) == ["COMPLETED"], log.read_text()[-3000:]
    assert trajectory(run_dir) == trajectory(undisturbed)
    text = log.read_text()
    assert "saved; requeueing" in text and "2 nodes (node1 node2), head node1:" in text
    assert "requeued 1 times" in text and "stopped by SIGUSR1" in text
    begins = [record for record in history(run_dir) if record["event"] == "start"]
    assert len(begins) == 2 and begins[1]["step"] >= 10
    assert len({record["run_id"] for record in begins}) == 1, "loggers see one run"
    assert not (tmp_path / "obeyed").exists(), "a value ran as a command"
    log = run_dir / f"job/evaluate-{follower}.out"
    assert must_end(follower, log) == ["COMPLETED"], log.read_text()
    assert [line["step"] for line in records(run_dir, "evaluations.jsonl")] == [40, 80, 120]
    assert len(list(run_dir.glob("logs/*_node2"))) == 2, "each start has a folder of logs on each host"
    assert (run_dir / "job/code/megatron_depthattn/train/loop.py").exists()


@FULL
def test_a_job_at_its_real_time_limit(config: Path, tmp_path: Path):
    """One minute, of which Slurm takes up to the half for its warning; the run needs more than that."""
    more = ("train.steps=1500", "checkpoint.interval=100")
    run_dir = tmp_path / "run"
    job = submit(config, f"run.dir={run_dir}", *more, *TWO_NODES, "--time", "1", "--signal-lead", "5")
    log = run_dir / f"job/slurm-{job}.out"
    assert must_end(job, log, seconds=1500) == ["COMPLETED"], log.read_text()[-3000:]
    ends = [record["outcome"] for record in history(run_dir) if record["event"] == "end"]
    assert ends[-1] == "finished" and ends[:-1] == ["signal"] * (len(ends) - 1) and len(ends) > 1, ends
    print(log.read_text())
    whole = run("launch/local.sh", config, f"run.dir={tmp_path}/whole", *more, seconds=800, NPROC_PER_NODE="2")
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert trajectory(run_dir) == trajectory(tmp_path / "whole")


@FULL
def test_an_array_of_three(config: Path, tmp_path: Path):
    run_dir, overlay = hostile_run_dir(tmp_path)
    settings = ("train.steps=6", "checkpoint.interval=6", "--nodes", "1", "--processes-per-node", "1")
    settings = (*settings, f"checkpoint.dir={tmp_path}/saved", "--evaluate", scored(config), "--evaluate-time", "12")
    job = submit(config, overlay, *settings, "--array", "run.seed=1,2,1", "--array-limit", "1")
    assert must_end(job, run_dir / "job") == ["COMPLETED"] * 3
    followers = [str(int(job) + task) for task in (1, 2, 3)]
    for task, follower in enumerate(followers):
        log = run_dir / f"job/evaluate-{follower}_{task}.out"
        assert must_end(follower, log) == ["COMPLETED"], log.read_text()
        assert [line["step"] for line in records(run_dir / f"task_{task}", "evaluations.jsonl")] == [6]
    first, last = (slurm_says("scontrol", "show", "job", each) for each in (followers[0], f"{job}_2"))
    assert begin(first) < begin(last), "it begins with its own task, not with the last one"
    losses = [[record["loss"] for record in records(run_dir / f"task_{task}")] for task in range(3)]
    assert [len(run) for run in losses] == [6, 6, 6]
    assert losses[0] == losses[2] != losses[1], "each task has its own seed, and nothing else"
    assert len(list((tmp_path / "saved").glob("task_[012]/step_00000006"))) == 3 and not (tmp_path / "obeyed").exists()
    assert sorted(path.name for path in (run_dir / "job").glob("slurm-*.out")) == [
        f"slurm-{job}_{task}.out" for task in range(3)
    ]


@FULL
def test_the_second_job_of_a_chain_continues_the_first(config: Path, undisturbed: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    chain = ("--chain", "2", "--max-requeues", "0", "--time", "20")
    second = submit(config, f"run.dir={run_dir}", "train.stop_after=60", *TWO_NODES, *chain)
    first = str(int(second) - 1)
    assert f"Dependency=afterany:{first}" in slurm_says("scontrol", "show", "job", second)
    log = run_dir / f"job/slurm-{second}.out"
    assert must_end(second, log, seconds=400) == states(first) == ["COMPLETED"], log.read_text()[-3000:]
    assert "Requeue=0" in slurm_says("scontrol", "show", "job", second)
    assert [record["step"] for record in history(run_dir) if record["event"] == "start"] == [0, 60]
    assert trajectory(run_dir) == trajectory(undisturbed)


@FULL
def test_an_absent_node_is_named_by_all_that_wait(config: Path, tmp_path: Path):
    """Three nodes of which one starts nothing; the job fails in JOIN_TIMEOUT seconds."""
    python, run_dir = tmp_path / "python", tmp_path / "run"
    python.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = node3 ] && exit 0\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    size = ("--nodes", "3", "--processes-per-node", "1", "train.global_batch_size=12", "--python", python)
    job = submit(config, f"run.dir={run_dir}", *size, JOIN_TIMEOUT="25")
    log = run_dir / f"job/slurm-{job}.out"
    assert must_end(job, log) == ["FAILED"]
    text = log.read_text()
    joined = r"2 of 3 nodes joined at node1:\d+ \(node1, node2\); not: node3\n"
    assert len(re.findall(f"waiting for nodes: {joined}", text)) >= 2, text
    ends = r"error: (not all nodes came within 25 s \(JOIN_TIMEOUT\): |(the head|another node).* or is lost; )"
    assert len(re.findall(ends + joined, text)) == 2 and "not all nodes came" in text, text


def test_scancel_ends_cleanly(config: Path, tmp_path: Path):
    """The job that scores sees that there is no more to wait for, scores what was saved, and ends."""
    run_dir = tmp_path / "run"
    settings = ("train.steps=100000", "checkpoint.interval=100000", "--evaluate", scored(config))
    job = submit(config, f"run.dir={run_dir}", *settings, *TWO_NODES)
    log = run_dir / f"job/slurm-{job}.out"
    must_reach(run_dir, 5, log)
    mine = [process for process in psutil.process_iter() if _mentions(process, str(run_dir))]
    assert len(mine) >= 4, "on each node a launcher and a rank"
    slurm_says("scancel", job)
    assert must_end(job, log) == ["CANCELLED"]
    _, left = psutil.wait_procs(mine, timeout=30)
    assert not left, f"outlived the job: {left}"
    assert "requeueing" not in log.read_text() and "Restarts=0" in slurm_says("scontrol", "show", "job", job)
    last = history(run_dir)[-1]
    assert (last["event"], last["outcome"]) == ("end", "signal"), "it had the seconds that saving takes"
    assert (run_dir / f"checkpoints/step_{last['step']:08d}").is_dir()
    follower = str(int(job) + 1)
    log = run_dir / f"job/evaluate-{follower}.out"
    assert must_end(follower, log) == ["COMPLETED"], log.read_text()
    assert [line["step"] for line in records(run_dir, "evaluations.jsonl")] == [last["step"]]


def scored(config: Path) -> str:
    """What to score, as --evaluate takes it: some held-out samples."""
    return f"--data {yaml.safe_load(config.read_text())['data']['path']} --max-samples 4"


def _mentions(process: psutil.Process, text: str) -> bool:
    try:
        return any(text in word for word in process.cmdline())
    except psutil.Error:
        return False


@FULL
def test_a_launcher_that_is_killed_is_started_again(config: Path, undisturbed: Path, tmp_path: Path):
    """Without a requeue: Slurm's nodes are all well."""
    run_dir = tmp_path / "run"
    job = submit(config, f"run.dir={run_dir}", *TWO_NODES)
    log = run_dir / f"job/slurm-{job}.out"
    must_reach(run_dir, 30, log)
    launchers = [p for p in psutil.process_iter() if _mentions(p, "launch.torchrun") and _mentions(p, str(run_dir))]
    (second,) = [process for process in launchers if process.environ()["NODE_RANK"] == "1"]
    for victim in [*second.children(recursive=True), second]:
        victim.kill()
    assert must_end(job, log) == ["COMPLETED"], log.read_text()[-3000:]
    assert "a node's task was killed (exit code 137): starting all tasks again" in log.read_text()
    assert trajectory(run_dir) == trajectory(undisturbed)


def test_a_bad_config_fails_before_it_is_queued(config: Path, tmp_path: Path):
    before = slurm_says("scontrol", "show", "job", "-o")
    for setting, reason in {
        "parallel.tensor=4": "2 nodes x 1 processes: the world has 2 ranks, which is not a multiple of 4",
        "train.step=3": "train.step",
        "optimizer.lr=-1": "optimizer.lr is -1",
    }.items():
        done = run("launch/submit", config, f"run.dir={tmp_path}/run", setting, *TWO_NODES, seconds=60)
        assert done.returncode == 1 and reason in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1, "one line"
    assert not (tmp_path / "run").exists()
    assert slurm_says("scontrol", "show", "job", "-o") == before
    rejected = run("launch/submit", config, f"run.dir={tmp_path}/run", *TWO_NODES, "--partition", "none", seconds=60)
    assert rejected.returncode == 1 and "sbatch rejected it" in rejected.stderr and "partition" in rejected.stderr


@FULL
def test_a_failing_job_ends_its_log_with_the_first_failure(config: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    job = submit(config, f"run.dir={run_dir}", f"data.path={tmp_path}/nothing", *TWO_NODES)
    log = run_dir / f"job/slurm-{job}.out"
    assert must_end(job, log) == ["FAILED"]
    last = log.read_text().splitlines()[-2:]
    assert re.fullmatch(r"==== first failure, at .*: rank 0 on node[12]", last[0]), last
    assert "nothing/train has no index.json" in last[1]
    assert "srun: error" in log.read_text(), "Slurm's own lines come before it"
    assert "starting again" not in log.read_text()


@FULL
def test_by_hand_with_frozen_code_left_out(config: Path, tmp_path: Path):
    """The script is a batch script like any other; the config is checked on the node then."""
    command = ["sbatch", "--parsable", "--nodes=2", "--time=10", f"--output={tmp_path}/log", "--signal=B:USR1@60"]
    command += ["launch/slurm.sbatch", str(config), f"run.dir={tmp_path}/run", "train.steps=3"]
    where = {"cwd": Path(__file__).parents[2], "env": environment(NPROC_PER_NODE="1")}
    job = subprocess.run(command, **where, capture_output=True, text=True, check=True).stdout.strip()
    assert must_end(job, tmp_path / "log") == ["COMPLETED"]
    assert len(records(tmp_path / "run")) == 3


def test_hosts_are_never_guessed():
    """Without a list of nodes, with one that scontrol reads otherwise, and outside of Slurm."""
    bad_jobs = {
        "": "cannot name the hosts of SLURM_JOB_NODELIST=''",
        "node1": "scontrol names 1 hosts (node1), Slurm gave 2 nodes",
    }
    for nodes, message in bad_jobs.items():
        job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": nodes, "SLURM_JOB_NUM_NODES": "2"}
        rejected = run("bash", "launch/slurm.sbatch", "config.yaml", seconds=30, **job)
        assert rejected.returncode == 1 and message in rejected.stderr, rejected.stderr
    for name, value in {"SLURM_JOB_ID": "a[$(touch obeyed)]", "MAX_REQUEUES": "many"}.items():
        job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"} | {name: value}
        rejected = run("bash", "launch/slurm.sbatch", "config.yaml", seconds=30, **job)
        assert rejected.returncode == 1
        assert f"{name}='{value}' is not a whole number" in rejected.stderr
    outside = run("bash", "launch/slurm.sbatch", "config.yaml", seconds=30)
    assert outside.returncode == 1 and "submit it with sbatch" in outside.stderr


def test_the_frozen_config_decides(config: Path, tmp_path: Path):
    """The same again continues; another config is rejected, unless one insists; --dry-run queues nothing."""
    command = ("launch/submit", config, f"run.dir={tmp_path}/run", *TWO_NODES, "--dry-run")
    assert "frozen in" in run(*command, seconds=60).stdout
    assert "holds this config and code already" in run(*command, seconds=60).stdout
    rejected = run(*command, "optimizer.lr=0.1", seconds=60)
    assert rejected.returncode == 1
    assert "optimizer.lr (config.yaml: 0.005, now 0.1)" in rejected.stderr and "--refreeze" in rejected.stderr
    assert run(*command, "optimizer.lr=0.1", "--refreeze", seconds=60).returncode == 0
    frozen = yaml.safe_load((tmp_path / "run/job/config.yaml").read_text())
    assert frozen["optimizer"]["lr"] == 0.1 and len(list((tmp_path / "run").glob("job.*"))) == 1
