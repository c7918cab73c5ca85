"""A run that branches off another one, by the training command: it is that run, or differs where it should."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_depthattn.train.step_folders import step_folder, update_latest_and_rotate
from tests.e2e.commands import must_succeed
from tests.e2e.small_run import train

# A constant rate, in bf16: its fp32 weights are the optimizer's. The branch begins after 5 of 12 steps of 8 samples.
CONSTANT = (
    "precision.dtype=bf16",
    "optimizer.warmup_ratio=0",
    "optimizer.min_lr_ratio=1",
    "train.eval_interval=null",
    "data.log_samples=true",
)
BEGUN, STEPS, BATCH = 5, 12, 8
SAME = ("loss", "grad_norm", "lr")


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(run_dir: Path) -> list[tuple]:
    return [tuple(record[key] for key in SAME) for record in records(run_dir)]


def samples(run_dir: Path) -> list[list]:
    lines = (run_dir / "samples/rank_00000.jsonl").read_text().splitlines()
    return [json.loads(line)["sample_ids"] for line in lines]


@contextmanager
def rotating(folder: Path) -> Iterator[None]:
    """From when somebody holds a lease on the checkpoint, its run tries to rotate it away, until it is gone."""
    ended = threading.Event()

    def rotate() -> None:
        seen = False
        while folder.exists() and not ended.wait(0.005):
            seen = seen or any(folder.glob(".lease-*"))
            if seen:
                update_latest_and_rotate(step_folder(folder.parent, STEPS), 1)

    thread = threading.Thread(target=rotate)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_branch_is_its_trunk(config_file: Path, tmp_path: Path):
    """With optimizer and samples, bit for bit, also when it was stopped in the middle; without either it is not."""
    trunk = tmp_path / "trunk"
    kept = ("checkpoint.interval=4", "checkpoint.keep=1", f"checkpoint.keep_steps=[{BEGUN}]")
    must_succeed(train(config_file, f"run.dir={trunk}", *CONSTANT, *kept))
    folders = sorted(path.name for path in (trunk / "checkpoints").glob("step_*"))
    assert folders == [f"step_{BEGUN:08d}", f"step_{STEPS:08d}"]

    parent = trunk / f"checkpoints/step_{BEGUN:08d}"
    command = (config_file, *CONSTANT, f"train.steps={STEPS - BEGUN}", f"checkpoint.start_from={parent}")
    optimizer, behind = "checkpoint.start_optimizer=true", f"data.skip_samples={BEGUN * BATCH}"
    whole = (*command, optimizer, behind, "checkpoint.load=latest", f"run.dir={tmp_path / 'branch'}")
    first = must_succeed(train(*whole, "train.stop_after=3"))
    rest = must_succeed(train(*whole))
    assert numbers(tmp_path / "branch") == numbers(trunk)[BEGUN:]
    assert samples(tmp_path / "branch") == samples(trunk)[BEGUN:]
    assert [record["samples"] for record in records(tmp_path / "branch")] == [BATCH * n for n in range(1, 8)], "its own"
    starts = [json.loads(line) for line in (tmp_path / "branch/history.jsonl").read_text().splitlines()][::2]
    theirs = json.loads((trunk / "history.jsonl").read_text().splitlines()[0])["run_id"]
    for start in starts:
        known = start["parent"]
        assert (known["run_id"], known["step"], known["position"]) == (theirs, BEGUN, BEGUN * BATCH)
        assert known["folder"] == str(parent) and known["optimizer"] and start["run_id"] != theirs
    assert [start["step"] for start in starts] == [0, 3]
    said = f"start: of run {theirs} after {BEGUN} steps: weights, optimizer (its fp32 weights, moments and count of"
    assert said in first.stdout and said not in rest.stdout
    assert f"start: anew: step 0, schedule, samples from {BEGUN * BATCH} of the order of seed 1234" in first.stdout
    assert "the first 40 samples of the order are passed over" in rest.stdout and "note:" not in first.stdout

    another = train(*command, "checkpoint.load=latest", f"run.dir={trunk}")
    assert another.returncode == 1 and "has begun with initial weights" in another.stderr

    # Controls: without the optimizer, and without its place in the samples (of a trunk that still trains).
    forgetful, again = tmp_path / "forgetful", tmp_path / "again"
    must_succeed(train(*command, behind, f"run.dir={forgetful}"))
    assert numbers(forgetful)[0][:2] == numbers(trunk)[BEGUN][:2] and numbers(forgetful)[1] != numbers(trunk)[6]
    busy = shutil.copytree(trunk / "checkpoints", tmp_path / "training") / parent.name
    with rotating(busy):
        settings = ("train.stop_after=2", f"run.dir={again}", f"checkpoint.start_from={busy}")
        output = must_succeed(train(*command, optimizer, *settings)).stdout
    assert not busy.exists(), "gone once it was loaded"
    assert samples(again) == samples(trunk)[:2] and numbers(again)[0] != numbers(trunk)[BEGUN]
    assert "the parent has read 40: data.skip_samples=40 begins behind them" in output
