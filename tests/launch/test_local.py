"""One node: a rank that is killed, a stop signal, an error, a hang; and the logs that they leave."""

import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.e2e.commands import wait_until
from tests.launch.jobs import STEPS, end, history, must_reach, records, run, start, trajectory

pytestmark = pytest.mark.timeout(600)


def ranks_of(launcher: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The training processes by rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            words, variables, parent = process.cmdline(), process.environ(), process.parent().cmdline()
        except (psutil.Error, AttributeError):  # it, or its parent, has gone
            continue
        is_rank = "megatron_depthattn.train" in words and "megatron_depthattn.launch.torchrun" in parent  # no loader
        if is_rank and "RANK" in variables:
            found[int(variables["RANK"])] = process
    return found


def test_a_killed_rank_and_a_stop_signal(config: Path, undisturbed: Path, tmp_path: Path):
    """torchrun restarts after the one, from the last checkpoint; the launcher ends with 75 after the other."""
    run_dir, output = tmp_path / "run", tmp_path / "output.txt"
    command = ("launch/local.sh", config, f"run.dir={run_dir}")
    launcher = start(*command, output=output, NPROC_PER_NODE="2", MAX_RESTARTS="3")
    try:
        must_reach(run_dir, 25, output)
        ranks_of(launcher)[1].kill()
        assert wait_until(lambda: len(history(run_dir)) == 2, 120), output.read_text()[-3000:]
        begun = history(run_dir)[-1]["step"]
        assert begun >= 20
        log = run_dir / "log.txt"  # the second start has begun to train, and to write its own steps
        assert wait_until(lambda: log.read_text().count(" start: ") == 2 and len(records(run_dir)) > begun + 3, 120)
        launcher.send_signal(signal.SIGUSR2)
        launcher.send_signal(signal.SIGTERM)  # a scheduler may tell a process twice
        assert launcher.wait(120) == 75, output.read_text()[-3000:]
    finally:
        end(launcher)
    printed = output.read_text()
    assert "failed; starting again, 2 restarts left after that" in printed, printed
    assert printed.rstrip().endswith("stopped by a signal, saved: start the same command again")
    assert "Traceback" not in printed.rpartition("\nstart: ")[2]
    assert history(run_dir)[-1]["outcome"] == "signal"
    done = trajectory(run_dir)
    assert begun + 3 < len(done) < STEPS and done == trajectory(undisturbed)[: len(done)]
    shown = run("launch/logs", run_dir, seconds=60).stdout
    titles = re.findall(r"^==== \S+: rank (\d), attempt (\d), stdout$", shown, flags=re.M)
    assert titles == [("0", "0"), ("0", "1")]
    assert re.search(r"rank 1 \(pid \d+\) ended: killed by SIGKILL; if nobody did that.*\n$", shown), shown[-2000:]


def test_a_stop_before_the_first_step(config: Path, tmp_path: Path):
    output = tmp_path / "output.txt"
    launcher = start("launch/local.sh", config, f"run.dir={tmp_path}/run", output=output, NPROC_PER_NODE="2")
    try:
        assert wait_until(lambda: len(ranks_of(launcher)) == 2, 60)
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(90) == 75, output.read_text()
    finally:
        end(launcher)
    assert "stopped by a signal, " in output.read_text().splitlines()[-1]


def test_an_error_is_the_last_line_and_not_tried_again(config: Path, tmp_path: Path):
    """Rank 0 cannot read its data; rank 1, which learns of that, is not the news, whoever is first."""
    run_dir = tmp_path / "run"
    command = ("launch/local.sh", config, f"run.dir={run_dir}", f"data.path={tmp_path}/nothing")
    done = run(*command, seconds=120, NPROC_PER_NODE="2", MAX_RESTARTS="3")
    assert done.returncode == 1
    *_, title, last = done.stderr.splitlines()
    assert re.fullmatch(r"first failure, at .*: rank 0 on .*", title)
    assert re.fullmatch(r"error \(rank 0\): .*/nothing/train has no index.json.*", last)
    assert "starting again" not in done.stderr and "Traceback" not in done.stderr
    (logs,) = (run_dir / "logs").iterdir()
    assert {path.name for path in logs.glob("rank_*")} == {"rank_00000_attempt_0", "rank_00001_attempt_0"}
    assert (logs / "rank_00000_attempt_0/error.json").is_file() and (logs / "torchrun.log").stat().st_size


def test_a_hang_ends_with_its_own_code(config: Path, tmp_path: Path):
    """A rank is stopped at a step; the watchdog of the other ends the run. Ranks that do not end: test_two_nodes.py."""
    run_dir, output = tmp_path / "run", tmp_path / "output.txt"
    settings = ("train.hang_timeout=4", "train.steps=100000", "checkpoint.interval=100000")
    launcher = start("launch/local.sh", config, f"run.dir={run_dir}", *settings, output=output, NPROC_PER_NODE="2")
    try:
        must_reach(run_dir, 5, output)
        going, stopped = (process for _, process in sorted(ranks_of(launcher).items()))
        stopped.suspend()
        psutil.wait_procs([going], timeout=60)
        stopped.resume()  # it is asked to end by now; as long as it is stopped torchrun would wait
        assert launcher.wait(120) == 70, output.read_text()[-3000:]
    finally:
        end(launcher)
    assert output.read_text().rstrip().endswith("ended: exit code 70: the watchdog found the run hung")
    assert list((run_dir / "stacks").glob("*_hang_0.txt"))
