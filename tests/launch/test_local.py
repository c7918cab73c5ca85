"""One node: a rank that is killed, a stop signal, an error; and the logs that they leave."""

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
        is_rank = "megatron_depthattn.train" in words and "launch.ranks" in parent  # not one of its loader processes
        if is_rank and "RANK" in variables:
            found[int(variables["RANK"])] = process
    return found


def test_a_killed_rank_and_a_stop_signal(config: Path, undisturbed: Path, tmp_path: Path):
    """The launcher starts again after the one, from the last checkpoint, and ends with 75 after the other."""
    run_dir, output = tmp_path / "run", tmp_path / "output.txt"
    command = ("launch/local.sh", config, f"run.dir={run_dir}")
    launcher = start(*command, output=output, NPROC_PER_NODE="2", MAX_RESTARTS="1")
    try:
        must_reach(run_dir, 25, output)
        ranks_of(launcher)[1].kill()
        assert wait_until(lambda: len(history(run_dir)) == 2, 120), output.read_text()[-3000:]
        begun = history(run_dir)[-1]["step"]
        assert begun >= 20
        log = run_dir / "log.txt"  # the second start has begun to train, and to write its own steps
        assert wait_until(lambda: log.read_text().count(" start: ") == 2 and len(records(run_dir)) > begun + 3, 120)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(120) == 75, output.read_text()[-3000:]
    finally:
        end(launcher)
    told = output.read_text()
    assert re.search(r"starting again, 0 restarts left after that: rank 1 on .*: .* killed by SIGKILL", told), told
    assert told.rstrip().endswith("node 0: stopped by a signal, saved: start the same command again")
    assert history(run_dir)[-1]["outcome"] == "signal"
    done = trajectory(run_dir)
    assert begun + 3 < len(done) < STEPS and done == trajectory(undisturbed)[: len(done)]
    starts = sorted((run_dir / "logs").iterdir())
    merged = run("launch/logs", run_dir, "--all", seconds=60).stdout.splitlines()
    assert [line for line in merged if line.startswith("====")] == [f"==== start {path.name}" for path in starts]
    lines = [line for line in merged if " | " in line]
    assert lines == sorted(lines, key=lambda line: line[:23]) and len(starts) == 2
    assert all(re.match(r"[\d-]{10} [\d:.]{12} \S+ rank \d+ (out|err) \| ", line) for line in lines)
    assert sum("start: " in line for line in lines) == 2


def test_a_stop_before_the_first_step(config: Path, tmp_path: Path):
    output = tmp_path / "output.txt"
    launcher = start("launch/local.sh", config, f"run.dir={tmp_path}/run", output=output, NPROC_PER_NODE="2")
    try:
        assert wait_until(lambda: len(ranks_of(launcher)) == 2, 60)
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(90) == 75, output.read_text()
    finally:
        end(launcher)
    assert "stopped by a signal, before there was anything to save" in output.read_text()


def test_an_error_is_told_last_and_not_tried_again(config: Path, tmp_path: Path):
    """Rank 0 cannot read its data; rank 1, which hears of that, is not the news, whoever is first."""
    run_dir = tmp_path / "run"
    command = ("launch/local.sh", config, f"run.dir={run_dir}", f"data.path={tmp_path}/nothing")
    done = run(*command, seconds=120, NPROC_PER_NODE="2", MAX_RESTARTS="3")
    assert done.returncode == 1
    *_, title, last = done.stderr.splitlines()
    assert re.fullmatch(r"first failure of the run, at .*: rank 0 on .*", title)
    assert re.fullmatch(r"error \(rank 0\): .*/nothing/train has no index.json.*", last)
    assert "not started again, as the same would follow" in done.stderr
    (logs,) = (run_dir / "logs").iterdir()
    assert (logs / "first_failure.txt").read_text() == f"{title}\n{last}\n"
    assert {path.name for path in logs.glob("error_rank_*.json")} == {f"error_rank_{rank:05d}.json" for rank in (0, 1)}
