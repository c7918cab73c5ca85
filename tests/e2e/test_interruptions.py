"""What interrupts a run, and how it goes on; one process, so that exit codes are the program's own.

`tests/faults` does the same to four processes under torchrun, at random moments.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import REPOSITORY, must_succeed, python

SAME = ("step", "loss", "grad_norm", "lr", "tokens", "samples", "skipped_steps")


def records(run_dir: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def trajectory(run_dir: Path) -> list[tuple]:
    return [tuple(record[name] for name in SAME) for record in records(run_dir)]


def history(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    must_succeed(python("-m", "megatron_depthattn.train", config_file, f"run.dir={run_dir}", "train.steps=40"))
    return run_dir


def test_a_signal_saves_and_the_same_command_goes_on(undisturbed: Path, config_file: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    settings = [f"run.dir={run_dir}", "train.steps=40", "checkpoint.load=latest", "checkpoint.async_save=true"]
    command = [sys.executable, "-m", "megatron_depthattn.train", str(config_file), *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                if line.startswith("step 4/"):
                    process.send_signal(signal.SIGUSR1)
                    break
            output = process.stdout.read()
            assert process.wait(60) == 75
        finally:
            process.kill()
    stopped_at = records(run_dir)[-1]["step"]
    assert 4 < stopped_at < 40, "the step under way is finished, and no more than that begun"
    assert f"stopped by SIGUSR1 at step {stopped_at}, saved: start the same command again" in output
    assert (run_dir / "checkpoints/latest").read_text() == f"step_{stopped_at:08d}\n"
    assert history(run_dir)[-1]["outcome"] == "signal"
    must_succeed(python(*command[1:]))
    assert trajectory(run_dir) == trajectory(undisturbed)
    starts = [record for record in history(run_dir) if record["event"] == "start"]
    assert [start["step"] for start in starts] == [0, stopped_at]
    assert len({start["run_id"] for start in starts}) == 1
    assert 0 < history(run_dir)[-1]["goodput"]["goodput"] < 1
    assert "nothing to do" in must_succeed(python(*command[1:])).stdout


def flip_a_bit(folder: Path) -> None:
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_with_a_loud_line(undisturbed: Path, config_file: Path, tmp_path: Path):
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    checkpoints = run_dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_00000036", "step_00000040"]
    flip_a_bit(checkpoints / "step_00000040")
    command = ("-m", "megatron_depthattn.train", config_file, f"run.dir={run_dir}", "train.steps=40")
    refused = python(*command, "checkpoint.load=step_00000040")
    assert refused.returncode == 1
    assert "checkpoint.load=step_00000040 is damaged" in refused.stderr
    result = must_succeed(python(*command, "checkpoint.load=latest"))
    assert "DAMAGED CHECKPOINT" in result.stderr and "step_00000040.damaged; falling back" in result.stderr
    assert "start: " + str(checkpoints / "step_00000036") in result.stdout
    assert trajectory(run_dir) == trajectory(undisturbed)
    assert (checkpoints / "step_00000040.damaged").is_dir(), "nothing is thrown away"
    for folder in checkpoints.glob("step_????????"):
        flip_a_bit(folder)
    result = python(*command, "checkpoint.load=latest")
    assert result.returncode == 1, "with every checkpoint damaged the run must not begin anew by itself"
    assert "all 2 checkpoints in" in result.stderr and "Traceback" not in result.stderr


def test_another_run_leaves_the_checkpoints_alone(undisturbed: Path, config_file: Path, tmp_path: Path):
    checkpoints = undisturbed / "checkpoints"
    before = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    settings = (f"run.dir={tmp_path}", f"checkpoint.dir={checkpoints}", "checkpoint.load=latest", "train.steps=60")
    result = python("-m", "megatron_depthattn.train", config_file, *settings)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    run_id = history(undisturbed)[0]["run_id"]
    assert f"checkpoint.dir={checkpoints} belongs to run {run_id} of run.dir={undisturbed}: " in line
    assert {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()} == before


EXPLODING = ("optimizer.lr=1e30", "optimizer.warmup_ratio=0", "optimizer.grad_clip=0", "checkpoint.load=latest")


def test_non_finite_stops_before_the_optimizer_and_a_restart_loop_ends(config_file: Path, tmp_path: Path):
    """A learning rate that blows the weights up: the step that is not finite changes and saves nothing."""
    settings = (*EXPLODING, "checkpoint.interval=1", "train.max_fruitless_starts=1")
    command = ("-m", "megatron_depthattn.train", config_file, f"run.dir={tmp_path}", *settings)
    result = python(*command)
    assert result.returncode == 1
    assert "not finite, so the optimizer was not stepped" in result.stderr
    assert "sample ids" in result.stderr and "layer" in result.stderr
    steps = records(tmp_path)
    assert (tmp_path / "checkpoints/latest").read_text().strip() == f"step_{len(steps):08d}"
    assert history(tmp_path)[-1]["outcome"] == "not finite"
    again = python(*command)  # from the newest checkpoint now: a first start from there
    assert "not finite, so the optimizer was not stepped" in again.stderr
    refused = python(*command)
    assert refused.returncode == 1
    assert f"the last 1 starts all began at step {len(steps)} and none reached another checkpoint" in refused.stderr


def test_skipped_steps_are_counted_and_have_an_end(config_file: Path, tmp_path: Path):
    settings = (*EXPLODING, "train.on_non_finite=skip", "train.max_skipped_in_a_row=2", "train.eval_interval=null")
    result = python("-m", "megatron_depthattn.train", config_file, f"run.dir={tmp_path}", *settings)
    assert result.returncode == 1
    assert "3 steps in a row, more than train.max_skipped_in_a_row=2" in result.stderr
    steps = records(tmp_path)
    assert [step["skipped_steps"] for step in steps[-3:]] == [0, 1, 2]
    assert [step["loss"] is None or step["grad_norm"] is None for step in steps[-3:]] == [False, True, True]
