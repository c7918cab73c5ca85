"""Weights & Biases through its own client, offline: what its files hold is the run's record, whatever happens to it."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_depthattn.config import load_config, save_config
from megatron_depthattn.train import curves
from megatron_depthattn.train.curves import STILL_SENDING, WandbMirror, log_evaluation, run_curves
from megatron_depthattn.train.line_files import append_durably, drop_steps_after
from tests.wandb_files import history, records, run_record
from tests.wandb_server import serving

RUN_ID = "0123456789ab"
IMAGE = "depth/weights"
ROWS = 1000
AGAIN = "its service has ended and is started again"


class Report:
    """What a run's log would have."""

    def __init__(self):
        self.said, self.warned = [], []

    def lines(self, texts):
        self.said += texts

    def warn(self, texts):
        self.warned += texts


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run that logs offline and has not trained."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(curves, "FINISH_SECONDS", 120.0)  # on a busy machine
    folder = tmp_path / "first"
    settings = [f"run.dir={folder}", "log.wandb.project=ladder", "log.wandb.mode=offline", "log.wandb.entity=team"]
    save_config(load_config("configs/quickstart.yaml", settings), folder / "config.yaml")
    append_durably(folder / "history.jsonl", {"event": "start", "run_id": RUN_ID})
    with tempfile.TemporaryDirectory(prefix="of-") as temporary:  # a short name: sockets lie there
        monkeypatch.setenv("TMPDIR", temporary)
        yield folder
        assert not list(Path(temporary).iterdir())


def train(run_dir, steps, loss):
    """Add these steps to the record."""
    depth = {"tokens": 8, "layers": {"1": {"sources": [0], "weights": [0.4, 0.6], "entropy": 0.67, "collapsed": 0.0}}}
    for step in steps:
        held_out = {"eval_loss": loss + 1 / step, "held_out": {"code": loss + 2 / step}} if step % 5 == 0 else {}
        record = {"step": step, "loss": loss / step, "mfu": None, "eval_loss": None, "held_out": None} | held_out
        append_durably(run_dir / "metrics.jsonl", record | {"depth": depth if step % 4 == 1 else None})


def file_of(run_dir):
    """The only file of the client in the run's folder."""
    (file,) = (path for path in run_dir.glob("wandb/offline-run-*/*.wandb"))
    return file


def rows(run_dir, axis="step"):
    """What the file has by steps, values of several rows together."""
    merged = {}
    for row in history(file_of(run_dir)):
        own = {name: value for name, value in row.items() if not name.startswith("_") and name != axis}
        if axis in row:
            merged[row[axis]] = merged.get(row[axis], {}) | own
    return merged


def on_record(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: run_curves(record) for record in lines}


def without_images(found):
    return {step: {name: x for name, x in row.items() if not name.startswith(IMAGE)} for step, row in found.items()}


def processes():
    children = psutil.Process().children(recursive=True)
    return {each.name(): each for each in children if "wandb" in " ".join(each.cmdline())}  # not another test's


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def test_each_start_brings_the_record_as_it_is_now(run_dir):
    """A crash after step 15, a restart from step 10 that trains otherwise, a held-out loss that comes late."""
    train(run_dir, range(1, 16), loss=8.0)
    report = Report()
    mirror = WandbMirror(run_dir, report)
    wait_for(lambda: list(run_dir.glob("wandb/offline-run-*/*.wandb")))
    mirror._process.stdin.close()  # the training process was killed
    assert mirror._process.wait(60) == 0 and not processes()
    assert without_images(rows(run_dir)) == on_record(run_dir)
    assert [record.exit.exit_code for record in records(file_of(run_dir)) if record.HasField("exit")] == [1]
    before = rows(run_dir)

    drop_steps_after(run_dir / "metrics.jsonl", 10)
    append_durably(run_dir / "evaluations.jsonl", {"step": 10, "name": "val", "values": {"acc": 0.5}, "seconds": 2})
    mirror = WandbMirror(run_dir, report)
    wait_for(lambda: mirror._pass_on())
    train(run_dir, range(11, 14), loss=7.0)
    mirror.draw({})
    for each in processes().values():  # a scheduler signals all processes of a job
        each.terminate()
    *_, newest = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    wait_for(lambda: mirror.draw({}) or len(report.said) == 3)
    time.sleep(2.5)  # the mirror has sent step 13
    drop_steps_after(run_dir / "metrics.jsonl", 12, newest | {"eval_loss": 6.5})
    mirror.close()
    found, expected = rows(run_dir), on_record(run_dir)
    assert without_images(found) == expected and expected[13]["eval_loss"] == 6.5
    assert found[11]["loss"] != before[11]["loss"] and 14 not in found, "the cut-off attempt is gone"
    assert [step for step, row in found.items() if f"{IMAGE}/path" in row] == [1, 5, 9, 13]
    steps = [row["step"] for row in history(file_of(run_dir)) if "step" in row]
    assert steps == [*range(1, 14), 13], "once each, and the late loss"
    tasks = {"evaluation/val/acc": 0.5, "evaluation/count": 1}
    assert rows(run_dir, "evaluation/step") == {10: tasks}
    own = run_record(file_of(run_dir))
    assert (own.run_id, own.display_name, own.project, own.entity) == (RUN_ID, "first", "ladder", "team")
    config = {entry.key: json.loads(entry.value_json) for entry in own.config.update}
    assert config["model"]["num_layers"] == 8 and config["log"]["wandb"]["mode"] == "offline"
    axes = {record.metric.name: record.metric.step_metric for record in records(file_of(run_dir))}
    assert axes["loss"] == axes["eval_loss/code"] == "step"
    assert axes["evaluation/val/acc"] == "evaluation/step"
    assert not processes() and not report.warned
    assert [line.split(": ")[1].split(" 0")[0] for line in report.said] == ["run", AGAIN, "run"]


@pytest.mark.parametrize("kind", ["kill", "suspend"])
def test_a_lost_service_is_one_warning(run_dir, monkeypatch, kind):
    monkeypatch.setattr(curves, "FINISH_SECONDS", 3.0)
    train(run_dir, range(1, 4), loss=8.0)
    report = Report()
    mirror = WandbMirror(run_dir, report)
    service = wait_for(lambda: processes().get("wandb-core"))
    wait_for(lambda: mirror._pass_on())
    getattr(service, kind)()
    train(run_dir, range(4, 7), loss=8.0)
    if kind == "kill":
        wait_for(lambda: "started again" in mirror._pass_on())
        wait_for(lambda: mirror._pass_on())  # it has another
        assert not report.warned
        processes()["wandb-core"].kill()
        wait_for(lambda: mirror.draw({}) or report.warned)
    started = time.monotonic()
    mirror.draw({})
    assert time.monotonic() - started < 30, "no step waits"
    mirror.close()
    assert len(report.warned) == 1 and "the run is not affected" in report.warned[0], report.warned
    assert not processes()
    if kind == "kill":
        monkeypatch.setattr(curves, "FINISH_SECONDS", 120.0)
        WandbMirror(run_dir, report).close()
        assert without_images(rows(run_dir)) == on_record(run_dir) and len(report.warned) == 1


@pytest.fixture
def online(run_dir, monkeypatch):
    """A server; the config leaves the mode to the environment."""
    save_config(load_config(run_dir / "config.yaml", ["log.wandb.mode=null"]), run_dir / "config.yaml")
    with serving() as server:
        fast = ("X_FILE_STREAM_TRANSMIT_INTERVAL", "0.5")  # in place of 15 s
        for name, value in (("MODE", "online"), ("BASE_URL", server.url), ("API_KEY", "0" * 40), fast):
            monkeypatch.setenv(f"WANDB_{name}", value)
        yield server


def test_a_run_that_is_resumed_online_gets_what_it_lacks(run_dir, online):
    """Rows that a crash has kept from it, and nothing twice; of steps that are trained again the first stay."""
    train(run_dir, range(1, 13), loss=8.0)
    append_durably(run_dir / "evaluations.jsonl", {"step": 10, "name": "val", "values": {"acc": 0.5}})
    first = on_record(run_dir)
    report = Report()
    mirror = WandbMirror(run_dir, report)
    wait_for(lambda: len(online.rows) == 13 and "wandb-summary.json" in online.files)
    curves.end_tree(psutil.Process(mirror._process.pid))
    (left,) = Path(os.environ["TMPDIR"]).iterdir()
    shutil.rmtree(left)
    drop_steps_after(run_dir / "metrics.jsonl", 10)
    train(run_dir, range(11, 18), loss=7.0)
    WandbMirror(run_dir, report).close()
    *_, newest = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    drop_steps_after(run_dir / "metrics.jsonl", 16, newest | {"eval_loss": 6.5})
    append_durably(run_dir / "evaluations.jsonl", {"step": 15, "name": "val", "values": {"acc": 0.6}})
    WandbMirror(run_dir, report).close()
    steps = [row for row in online.rows if "step" in row]
    assert [row["step"] for row in steps] == [*range(1, 18), 17] and steps[-1]["eval_loss"] == 6.5
    again = on_record(run_dir)
    assert [row["loss"] for row in steps[:17]] == [(first if s < 13 else again)[s]["loss"] for s in range(1, 18)]
    tasks = [row for row in online.rows if "evaluation/step" in row]
    assert [(row["evaluation/step"], row["evaluation/val/acc"]) for row in tasks] == [(10, 0.5), (15, 0.6)]
    assert online.bucket["name"] == RUN_ID and online.bucket["displayName"] == "first"
    assert len(report.said) == 2 and f"{online.url}/team/ladder/runs/{RUN_ID}" in report.said[0]
    assert not report.warned and not processes()


def test_a_network_that_is_down_is_one_warning(run_dir, online, monkeypatch):
    monkeypatch.setattr(curves, "FINISH_SECONDS", 3.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    train(run_dir, range(1, 4), loss=8.0)
    report = Report()
    mirror = WandbMirror(run_dir, report)
    time.sleep(2)
    mirror.close()
    assert len(report.warned) == 1 and "nothing more for 3 s" in report.warned[0], report.warned
    assert not processes()


def test_an_evaluation_joins_the_curves_at_any_time(run_dir, monkeypatch):
    """And where the config is silent the environment is heard."""
    for name, value in (("MODE", "offline"), ("NAME", "by hand"), ("ENTITY", "nobody")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    save_config(load_config(run_dir / "config.yaml", ["log.wandb.mode=null"]), run_dir / "config.yaml")
    train(run_dir, range(1, 9), loss=8.0)
    report = Report()
    mirror = WandbMirror(run_dir, report)
    wait_for(lambda: mirror._pass_on())
    for step in (4, 8):
        line = {"step": step, "name": "arc_easy", "values": {"acc": step / 10}}
        append_durably(run_dir / "evaluations.jsonl", line)
        log_evaluation(run_dir, step, line)
        if step == 4:  # while the run trains its own mirror sends it
            assert len(list(run_dir.glob("wandb/offline-run-*"))) == 1
            mirror.close()
    found = rows(run_dir, "evaluation/step")
    assert {step: row["evaluation/arc_easy/acc"] for step, row in found.items()} == {4: 0.4, 8: 0.8}
    assert without_images(rows(run_dir)) == on_record(run_dir)
    events = EventAccumulator(str(run_dir / "tensorboard" / "evaluations")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("evaluation/arc_easy/acc")] == [
        (4, pytest.approx(0.4)),
        (8, pytest.approx(0.8)),
    ]
    own = run_record(file_of(run_dir))
    assert (own.display_name, own.entity) == ("by hand", "team")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    report = Report()
    WandbMirror(run_dir, report).close()
    assert not report.warned and not report.said


def test_a_long_record_is_sent_anew_as_long_as_that_takes(run_dir, monkeypatch):
    """By a process that the run leaves alone then; one folder is left, with a few of the pictures. If it is slower than
    its limit nothing is left."""
    layers = {str(layer): {"sources": [*range(layer)], "weights": [0.1] * (layer + 1)} for layer in range(1, 24)}
    depth = {"layers": {layer: of | {"entropy": 0.5, "collapsed": 0.0} for layer, of in layers.items()}}
    lines = (json.dumps({"step": step, "loss": 1 / step, "depth": depth}) + "\n" for step in range(1, ROWS + 1))
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    for seconds, has_time in ((0.01, False), (5.0, True)):
        monkeypatch.setattr(curves, "FINISH_SECONDS", seconds)
        report = Report()
        mirror = WandbMirror(run_dir, report)
        process = mirror._process
        wait_for(lambda: mirror._pass_on())  # noqa: B023
        mirror.close()
        assert process.wait(240) == (0 if has_time else 1) and bool(report.warned) is not has_time, report.warned
        assert has_time or "not all was sent" in report.warned[0], report.warned
        assert len(list(run_dir.glob("wandb/offline-run-*"))) == has_time
    assert report.said[1:] == [f"Weights & Biases: {STILL_SENDING}"] * len(report.said[1:])
    found = rows(run_dir)
    assert without_images(found) == on_record(run_dir)
    assert [step for step, row in found.items() if f"{IMAGE}/path" in row] == [*range(ROWS // 20, ROWS + 1, ROWS // 20)]
