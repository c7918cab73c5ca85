"""A run's history: its identity, restart loops, goodput, and files that a crash has cut off."""

import json
from pathlib import Path

import pytest

from megatron_depthattn.train import history as module
from megatron_depthattn.train.history import RunHistory
from megatron_depthattn.train.line_files import drop_steps_after


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    return now


def metrics(run_dir: Path, *seconds: float) -> None:
    lines = [json.dumps({"step": i + 1, "step_seconds": each}) + "\n" for i, each in enumerate(seconds)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))


def test_the_identity_stays(tmp_path):
    first = RunHistory(tmp_path)
    first.start(0, "v", 1, "latest")
    assert RunHistory(tmp_path).run_id == first.run_id
    assert RunHistory(tmp_path, "of a checkpoint").run_id == first.run_id
    assert RunHistory(tmp_path / "lost", "of a checkpoint").run_id == "of a checkpoint"
    assert RunHistory(tmp_path / "new").run_id != first.run_id


START = ("start", 100, "v", 1, "latest")


def starts(run_dir: Path, *records: tuple) -> RunHistory:
    for event, *arguments in records:
        getattr(RunHistory(run_dir), event)(*arguments)
    return RunHistory(run_dir)


def test_a_restart_loop_is_rejected(tmp_path):
    history = starts(tmp_path, *[START] * 3)
    with pytest.raises(ValueError, match=r"last 3 starts .* train.max_restarts_without_progress=6"):
        history.check_restart_loop(100, "v", 3)
    history.check_restart_loop(100, "v", 4)
    history.check_restart_loop(100, "v", None)


@pytest.mark.parametrize(
    ("records", "step", "version"),
    [
        ([START] * 2, 100, "v"),
        ([START] * 5, 150, "v"),  # a checkpoint was reached
        ([START] * 5, 100, "changed"),  # somebody did something about it
        ([START, ("start", 50, "v", 1, "latest"), *[START] * 2], 100, "v"),
        ([*[START] * 5, ("end", 100, "stop_after")], 100, "v"),
        ([START, ("end", 100, "signal")] * 5, 100, "v"),  # stopped before a step was trained, which says nothing
    ],
)
def test_control_a_run_that_gets_on_may_start_again(tmp_path, records, step, version):
    starts(tmp_path, *records).check_restart_loop(step, version, 3)


def test_an_end_by_an_error_does_not_hide_a_loop(tmp_path):
    records = [("start", 7, "v", 1, "latest"), ("end", 9, "not finite")] * 3
    with pytest.raises(ValueError, match="began at step 7"):
        starts(tmp_path, *records).check_restart_loop(7, "v", 3)


@pytest.mark.parametrize(
    ("end", "continues"),
    [(None, True), ("signal", True), ("not finite", True), ("finished", False), ("stop_after", False)],
)
def test_an_interrupted_run_continues_by_the_same_command(tmp_path, end, continues):
    """Whatever checkpoint.load says: what a scheduler starts again must not go back to where the run once began."""
    history = starts(tmp_path, ("start", 0, "v", 1, "imported"), *([("end", 5, end)] if end else []))
    assert history.has_started_from("imported") is continues
    assert not history.has_started_from("step_00000100")
    assert not RunHistory(tmp_path / "new").has_started_from("imported")


def test_goodput_counts_a_step_once_and_the_time_between_a_crash_and_its_restart(tmp_path, clock):
    RunHistory(tmp_path).start(0, "v", 2, "latest")
    clock[0] += 60  # 40 s of steps, of which 10 s are repeated after a crash; 20 s until the restart
    clock[0] += 20
    history = RunHistory(tmp_path)
    history.start(3, "v", 2, "latest")
    clock[0] += 20
    metrics(tmp_path, 10, 10, 10, 10, 10)
    end = history.end(5, "finished")
    assert end["goodput"] == {"goodput": 0.5, "useful_seconds": 50, "wall_seconds": 100, "starts": 2}


def test_goodput_leaves_out_what_follows_a_deliberate_end(tmp_path, clock):
    history = RunHistory(tmp_path)
    history.start(0, "v", 2, "latest")
    clock[0] += 10
    metrics(tmp_path, 5)
    assert history.end(1, "stop_after")["goodput"]["goodput"] == 0.5
    clock[0] += 86400
    history = RunHistory(tmp_path)
    history.start(1, "v", 2, "latest")
    clock[0] += 10
    metrics(tmp_path, 5, 10)
    assert history.end(2, "finished")["goodput"] == {
        "goodput": 0.75,
        "useful_seconds": 15,
        "wall_seconds": 20,
        "starts": 2,
    }


GARBLED = [
    '{"time": 1, "event": "st',
    "3",
    "null",
    "[1]",
    '{"event": "start"}',
    '{"time": 1, "event": "end"}',
    "[" * 9999,
]


@pytest.mark.parametrize("line", [*(line.encode() for line in GARBLED), b"\xff\xfe\x00"])
def test_a_line_that_a_crash_cut_off_costs_only_itself(tmp_path, line):
    RunHistory(tmp_path).start(0, "v", 1, "latest")
    for name in ("history.jsonl", "metrics.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(line)
    drop_steps_after(tmp_path / "metrics.jsonl", 1)
    assert not RunHistory(tmp_path).has_started_from(None)
    RunHistory(tmp_path).check_restart_loop(0, "v", 2)
    history = RunHistory(tmp_path)
    history.start(3, "v", 1, "latest")
    assert RunHistory(tmp_path).run_id == history.run_id
    assert RunHistory(tmp_path).goodput()["starts"] == 2
