"""`tools/evaluate.py --follow` beside a real run: what is scored, how it ends, what survives a kill."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_depthattn import follow
from megatron_depthattn.cli.convert import main as convert
from megatron_depthattn.cli.evaluate import main
from megatron_depthattn.train.lease import lease
from megatron_depthattn.train.step_folders import complete_folders
from tests.e2e.commands import must_succeed, wait_until
from tests.e2e.exported import error_of
from tests.e2e.small_run import train
from tests.forked import start

TASKS = ("last_word", "which_name")
SCORED = ("--suite", "offline", "--tasks", *TASKS, "--limit", "4", "--max-samples", "12", "--batch-size", "4")


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines() if line[-1] == "}"]


def measures(run_dir: Path) -> list[tuple]:
    return [(record["step"], record["task"], record.get("shots")) for record in records(run_dir)]


def steps(run_dir: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in complete_folders(run_dir / "checkpoints")]


@pytest.fixture(scope="module")
def scored(config_file: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two starts: the follower scores steps 8 and 12, the second while it trains.

    It keeps one checkpoint in its second start, and the one that a lease holds.
    """
    run_dir = tmp_path_factory.mktemp("followed") / "run"
    settings = (config_file, f"run.dir={run_dir}", "checkpoint.interval=4")
    settings = (*settings, "checkpoint.load=latest", "model.max_position_embeddings=512")
    command = ["--follow", str(run_dir), "--data", str(corpus), "--every", "8", *SCORED]
    must_succeed(train(*settings, "train.stop_after=8"))
    assert main([*command, "--once"]) == 0
    rest = ("megatron_depthattn.train", *map(str, settings), "checkpoint.keep=1")
    with lease(run_dir / "checkpoints/step_00000004"):
        world = start(0, *rest, logs=[run_dir / "out", run_dir / "err"])
        assert main(command) == 0
        assert world.wait(60) and world.codes == {0: 0}
    assert steps(run_dir) == [4, 12]
    return run_dir


def test_scores_are_those_of_the_same_export_by_hand(scored: Path, corpus: Path, tmp_path: Path):
    """Each measure of each step once; the curves show the same; nothing but the record is left."""
    each = [("val", None), *((task, shots) for shots in (0, 5) for task in TASKS)]
    assert measures(scored) == [(step, *measure) for step in (8, 12) for measure in each]
    hf, figures = tmp_path / "hf", tmp_path / "figures.json"
    assert convert(["to-hf", "--checkpoint", str(scored / "checkpoints"), "--output", str(hf)]) == 0
    assert main(["--model", str(hf), "--data", str(corpus), *SCORED, "--json", str(figures)]) == 0
    (by_hand,) = json.loads(figures.read_text())["models"]
    events = EventAccumulator(str(scored / "tensorboard/evaluations")).Reload()
    for record in records(scored):
        values, shots, name = record["values"], str(record.get("shots")), record["task"]
        assert len(record["checkpoint"]) == 16 and record["seconds"] > 0 and record["versions"]["torch"]
        if record["step"] == 12:
            expected = by_hand["results"][shots][name] if name != "val" else by_hand["data"]
            assert {key: expected[key] for key in values} == values
            assert record["samples"] == expected["samples" if name == "val" else "questions"]
        for key, value in values.items():
            curve = f"{corpus.name}/val" if name == "val" else f"{name}/{shots}-shot"
            curve = f"evaluation/{curve}/{key}"
            assert (record["step"], pytest.approx(value)) in [(e.step, e.value) for e in events.Scalars(curve)]
    losses = {record["step"]: record["values"]["loss"] for record in records(scored) if record["task"] == "val"}
    assert losses[12] < losses[8], "two checkpoints"
    assert not list((scored / "exports").iterdir())


def test_a_killed_follower_continues_where_it_was(scored: Path, corpus: Path, tmp_path: Path, capsys, monkeypatch):
    """Its checkpoint is rotated away, its last line cut off; another one is damaged; a second follower stays out.

    That of another run, with the same --output and such a checkpoint, leaves its export alone.
    """
    left_out = shutil.ignore_patterns("evaluations.jsonl", "step_00000004")
    run_dir, exports = shutil.copytree(scored, tmp_path / "run", ignore=left_out), tmp_path / "exports"
    options = ["--data", str(corpus), *SCORED, "--output", str(exports)]
    command = ["--follow", str(run_dir), *options]
    logs = [tmp_path / "out", tmp_path / "err"]
    world = start(0, "megatron_depthattn.cli", "evaluate", *command, logs=logs)
    record = run_dir / "evaluations.jsonl"
    assert wait_until(record.exists, 120, poll=0.01), logs[1].read_text()
    os.kill(world.pids[0], signal.SIGSTOP)  # in the middle, and it has the lock
    with monkeypatch.context() as patched:
        patched.setattr(follow, "LOCK_SECONDS", 0.1)
        assert "another process scores the checkpoints of" in error_of(main, capsys, *command)
    os.kill(world.pids[0], signal.SIGKILL)
    assert world.wait(30) and world.codes == {0: -signal.SIGKILL}
    before = records(run_dir)
    assert 0 < len(before) < 5, "killed in the middle"
    assert main(["--follow", str(scored), *options, "--every", "8", "--once"]) == 0
    step = run_dir / "checkpoints/step_00000012"
    (damaged,) = step.rename(step.with_name("step_00000004")).glob("__0_0.distcp")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with record.open("a") as file:
        file.write('{"step": 12, "task": "val", "valu')
    capsys.readouterr()
    assert main(command) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: step 4 is not scored: ") and "damaged" in warnings[0]
    kept = [json.loads(line) for line in record.read_text().splitlines() if line.endswith("}")]
    assert kept[: len(before)] == before and len({(each["task"], each.get("shots")) for each in kept}) == len(kept) == 5
    ours, theirs = ({(r["task"], r.get("shots")): r["values"] for r in each} for each in (kept, records(scored)[5:]))
    assert ours == theirs and not list(exports.rglob("*step_*"))


def test_it_waits_for_a_run_and_ends_by_a_signal(corpus: Path, tmp_path: Path, capsys):
    logs = [tmp_path / "out", tmp_path / "err"]
    command = ("evaluate", "--follow", str(tmp_path / "run"), "--data", str(corpus))
    world = start(0, "megatron_depthattn.cli", *command, logs=logs)
    assert wait_until(lambda: logs[0].exists() and "waiting for" in logs[0].read_text(), 60), logs[1].read_text()
    os.kill(world.pids[0], signal.SIGTERM)
    assert world.wait(30) and world.codes == {0: 75}
    assert len(logs[1].read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--data", "{corpus}", "--once"], "there is no run (no config.yaml)"),
        ([], "no --data: name a folder written by depthattn prepare, or a --suite or --tasks"),
        (["--data", "{corpus}", "--every", "0"], "--every 0: set at least 1"),
        (["--data", "{corpus}", "--model", "hf", "--json", "f"], "--model, --json: not with --follow"),
        (["--tasks", "no_such_task", "--suite", "offline"], "--tasks no_such_task: the suite"),
    ],
)
def test_options_are_checked_before_it_waits(options, complaint, corpus: Path, tmp_path: Path, capsys):
    options = [option.format(corpus=corpus) for option in options]
    assert complaint in error_of(main, capsys, "--follow", tmp_path / "run", *options)
    assert "only with --follow" in error_of(main, capsys, "--model", tmp_path, "--data", corpus, "--keep-exports")
