"""What interrupts a run, and how it continues; one process, so that exit codes are the program's own.

`tests/faults` does the same to four processes under torchrun, at random moments.
"""

import json
import shutil
from pathlib import Path

import pytest

from megatron_depthattn.data import shard_writer
from megatron_depthattn.data.prepare import prepare_corpus
from tests.e2e.commands import must_succeed, python
from tests.e2e.small_run import REPOSITORY, train
from tests.prepared import make_settings
from tests.wandb_files import history as wandb_history

SAME = ("step", "loss", "grad_norm", "lr", "tokens", "predicted_tokens", "samples", "stream_samples", "skipped_steps")


def read_lines(file: Path) -> list[dict]:
    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=reject) for line in file.read_text().splitlines()]


def records(run_dir: Path) -> list[dict]:
    return read_lines(run_dir / "metrics.jsonl")


def trajectory(run_dir: Path) -> list[tuple]:
    return [tuple(record[name] for name in SAME) for record in records(run_dir)]


def sample_ids(run_dir: Path) -> list[list]:
    return [line["sample_ids"] for line in read_lines(run_dir / "samples/rank_00000.jsonl")]


def history(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    must_succeed(train(config_file, f"run.dir={run_dir}", "train.steps=40"))
    return run_dir


@pytest.fixture(scope="module")
def stopped(config_file: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case of stop_worlds.py."""
    work = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "SHARD_BYTES", 4000)
        for pack, name in (("concat", "concat"), ("best-fit", "packed")):
            given = {"sequence_length": 32, "validation_fraction": 0.2, "pack": pack, "max_bytes": 300_000}
            prepare_corpus(make_settings(REPOSITORY / "megatron_depthattn", corpus / "tokenizer", work / name, **given))
    must_succeed(python("-W", "ignore", "-m", "tests.e2e.stop_worlds", work, config_file, seconds=400))
    return work


def starts(case: Path) -> list[dict]:
    return json.loads((case / "result.json").read_text())


@pytest.mark.parametrize(
    ("name", "signal", "steps", "saved"),
    [
        ("step", "SIGUSR1", 3, 3),
        ("first evaluation", "SIGHUP", 0, None),
        ("evaluation", "SIGHUP", 2, 2),
        ("last evaluation", "SIGHUP", 4, 4),
        ("data", "SIGINT", 2, 2),
        ("record", "SIGTERM", 2, 2),
        ("save", "SIGTERM", 2, 2),
        ("start", "SIGUSR2", None, None),
    ],
)
def test_a_stop_is_obeyed_where_the_run_is(stopped: Path, name: str, signal: str, steps: int | None, saved: int | None):
    """Whoever got the signal, no rank begins a step but one that was agreed on; what was trained is saved, once."""
    case = stopped / name
    stop, *_ = starts(case)
    said, errors = stop["output"][0], "".join(stop["errors"])
    assert set(stop["codes"]) == {75}, stop
    assert "Traceback" not in errors
    if steps is None:
        line = f"stopped by {signal} before the first step, nothing to save: start the same command again"
        assert stop["errors"] == [f"{line} (rank {rank})\n" for rank in range(2)]
        assert not (case / "run/history.jsonl").exists(), "a start that did not begin is no restart without progress"
        return
    assert len(read_lines(case / "metrics.jsonl")) == steps
    done = "nothing new to save" if saved is None else "saved"
    assert f"stopped by {signal} at step {steps}, {done}: start the same command again" in said
    end = history(case / "run")[1]
    assert (end["outcome"], end["step"]) == ("signal", steps)
    if saved is None:
        assert not list((case / "run/checkpoints").glob("step_*"))
    else:
        assert said.count(f"/step_{saved:08d}: ") == 1


@pytest.mark.parametrize("name", ["step", "everything", "everything elsewhere", "evaluation", "last evaluation"])
def test_the_same_command_continues_as_if_nothing_had_happened(stopped: Path, name: str):
    """Nothing that was read ahead is missing, no held-out loss that a stop has cut off."""
    _, again = starts(stopped / name)
    assert again["codes"] == [0]
    expected = records(stopped / ("undisturbed everything/run" if name.startswith("everything") else "undisturbed/run"))
    assert len(expected) == 4
    for ours, theirs in zip(records(stopped / name / "run"), expected, strict=True):
        is_float = name in ("everything elsewhere", "evaluation")  # which ran in a pipeline until the stop
        for key in (*SAME, "eval_loss"):
            value = (
                theirs[key]
                if not (is_float and isinstance(theirs[key], float))
                else pytest.approx(theirs[key], rel=1e-4)
            )
            assert ours[key] == value, (ours["step"], key)
    if name == "evaluation":  # Weights & Biases was there, for one of the two ranks, and has the run as a whole
        assert [file.name for file in (stopped / name).glob("client_*")] == ["client_0"]
        (file,) = (stopped / name).glob("run/wandb/offline-run-*/*.wandb")
        rows = [(row["step"], row["loss"], row.get("eval_loss")) for row in wandb_history(file)]
        ours = records(stopped / name / "run")
        assert rows == [(record["step"], record["loss"], record["eval_loss"]) for record in ours]
    if name.startswith("everything"):
        assert "documents: from the borders in the samples" in again["output"][0]
        assert "stage 2, from step 4 on: samples 17 to 25 of the order: stream 0 20 %" in again["output"][0]
        assert [record["samples"] for record in expected] == [4, 8, 12, 20]  # of a batch that grows
        assert all(0 < record["predicted_tokens"] < 32 * record["samples"] for record in expected)
        streams = [tuple(record["stream_samples"].values()) for record in expected]
        assert all(map(sum, streams)) and streams[0][2] == 0 < streams[2][2] and streams[0][1] == streams[2][1]
        assert sample_ids(stopped / name / "run") == sample_ids(stopped / "undisturbed everything/run")
    if name == "last evaluation":  # which ended in the second split, of the same text
        *_, last = records(stopped / name / "run")
        assert last["held_out"] == {"same": last["eval_loss"]}
    begins = [record for record in history(stopped / name / "run") if record["event"] == "start"]
    assert len({start["run_id"] for start in begins}) == 1
    assert 0 < history(stopped / name / "run")[-1]["goodput"]["goodput"] < 1
    assert ("nothing to do" in again["output"][0]) is (name == "last evaluation")


@pytest.mark.parametrize(("name", "batch"), [("first evaluation", 2), ("evaluation", 4), ("last evaluation", 11)])
def test_an_evaluation_ends_after_the_batch_with_the_signal(stopped: Path, name: str, batch: int):
    assert {len(file.read_text()) for file in (stopped / name).glob("batches_*")} == {batch}


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
    command = (config_file, f"run.dir={run_dir}", "train.steps=40")
    rejected = train(*command, "checkpoint.load=step_00000040")
    assert rejected.returncode == 1
    assert "checkpoint.load=step_00000040 is damaged" in rejected.stderr
    result = must_succeed(train(*command, "checkpoint.load=latest"))
    assert "DAMAGED CHECKPOINT" in result.stderr and "It is now step_00000040.damaged." in result.stderr
    assert "start: " + str(checkpoints / "step_00000036") in result.stdout
    assert trajectory(run_dir) == trajectory(undisturbed)
    assert (checkpoints / "step_00000040.damaged").is_dir(), "nothing is thrown away"
    for folder in checkpoints.glob("step_????????"):
        flip_a_bit(folder)
    result = train(*command, "checkpoint.load=latest")
    assert result.returncode == 1, "with every checkpoint damaged the run must not begin anew by itself"
    assert "all 2 checkpoints in" in result.stderr and "Traceback" not in result.stderr


def test_another_run_leaves_the_checkpoints_alone(undisturbed: Path, config_file: Path, tmp_path: Path):
    checkpoints = undisturbed / "checkpoints"
    before = {path: path.stat().st_mtime_ns for path in (checkpoints, *checkpoints.rglob("*"))}
    settings = (f"run.dir={tmp_path}", f"checkpoint.dir={checkpoints}", "checkpoint.load=latest", "train.steps=60")
    result = train(config_file, *settings)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    run_id = history(undisturbed)[0]["run_id"]
    assert f"checkpoint.dir={checkpoints} belongs to run {run_id} of run.dir={undisturbed}: " in line
    assert {path: path.stat().st_mtime_ns for path in (checkpoints, *checkpoints.rglob("*"))} == before


EXPLODING = ("optimizer.lr=1e30", "optimizer.warmup_ratio=0", "optimizer.grad_clip=0", "checkpoint.load=latest")


def test_non_finite_stops_before_the_optimizer_and_a_restart_loop_ends(config_file: Path, tmp_path: Path):
    """A learning rate that blows the weights up: the step that is not finite changes and saves nothing."""
    settings = (*EXPLODING, "checkpoint.interval=1", "train.max_restarts_without_progress=1")
    command = (config_file, f"run.dir={tmp_path}", *settings)
    result = train(*command)
    assert result.returncode == 1
    assert "not finite, so the optimizer was not stepped" in result.stderr
    assert "sample ids" in result.stderr and "layer" in result.stderr
    steps = records(tmp_path)
    assert (tmp_path / "checkpoints/latest").read_text().strip() == f"step_{len(steps):08d}"
    assert history(tmp_path)[-1]["outcome"] == "not finite"
    again = train(*command)  # from the newest checkpoint now: a first start from there
    assert "not finite, so the optimizer was not stepped" in again.stderr
    rejected = train(*command)
    assert rejected.returncode == 1
    assert f"the last 1 starts all began at step {len(steps)} and none reached another checkpoint" in rejected.stderr


def test_skipped_steps_are_counted_and_have_an_end(config_file: Path, tmp_path: Path):
    settings = (*EXPLODING, "train.on_non_finite=skip", "train.max_skipped_in_a_row=2", "train.eval_interval=null")
    result = train(config_file, f"run.dir={tmp_path}", *settings)
    assert result.returncode == 1
    assert "3 steps in a row, more than train.max_skipped_in_a_row=2" in result.stderr
    steps = records(tmp_path)
    assert [step["skipped_steps"] for step in steps[-3:]] == [0, 1, 2]
    assert [step["loss"] is None or step["grad_norm"] is None for step in steps[-3:]] == [False, True, True]
