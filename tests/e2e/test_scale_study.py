"""A tiny study through every verb, as a user runs it: interrupted, continued, fitted, reported."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.commands import REPOSITORY, must_succeed, python, wait_until

STUDY = "configs/studies/smoke.yaml"


def study(verb: str, output: Path, *more: str, seconds: float = 60) -> str:
    return must_succeed(python("tools/scale_study.py", verb, STUDY, "--output", output, *more, seconds=seconds)).stdout


@pytest.mark.timeout(600)
def test_two_rungs_through_plan_run_fit_and_report(tmp_path):
    told = study("plan", tmp_path)
    points = json.loads((tmp_path / "plan.json").read_text())["points"]
    assert len(points) == 8 and "nothing was started" in told and not (tmp_path / "runs").exists()

    command = [sys.executable, "tools/scale_study.py", "run", STUDY, "--output", str(tmp_path), "--jobs", "2"]
    log = tmp_path / "run.log"
    with log.open("w") as file:
        cut = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
        assert wait_until(lambda: ": finished, held-out loss" in log.read_text(), 180, poll=0.2), log.read_text()
        cut.send_signal(signal.SIGTERM)
        assert cut.wait(90) == 75, log.read_text()
    finished = log.read_text().count(": finished, held-out loss")
    assert 1 <= finished < len(points)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/*/*/history.jsonl")}

    told = study("run", tmp_path, "--jobs", "2", seconds=420)
    assert told.count("finished already") == finished
    assert told.count("finished, held-out loss") == len(points) - finished
    untouched = [path for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert len(untouched) == finished, "what is finished is left alone"
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(result["finished"] and result["commit"] and 4 < result["loss"] < 6 for result in results["results"])
    assert {rung: set(methods) for rung, methods in results["timing"].items()} == {
        rung: {"vanilla", "depth_attention"} for rung in ("d2", "d4")
    }

    assert "depth_attention: " in study("fit", tmp_path)
    fitted = json.loads((tmp_path / "fit.json").read_text())
    assert {len(difference["pairs"]) for difference in fitted["differences"]} == {2}
    assert "refused" in fitted["laws"]["vanilla"], "two sizes and one budget do not make a law"

    study("report", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert all(point["id"] in page and point["run_dir"] in page for point in points)
    assert str(tmp_path) not in page
    assert (tmp_path / "report.md").read_text().startswith("# ")


def test_errors_are_one_line(tmp_path):
    for verb, wanted in (("fit", "holds no plan.json"), ("report", "plan.json")):
        ended = python("tools/scale_study.py", verb, STUDY, "--output", tmp_path)
        assert ended.returncode == 1 and wanted in ended.stderr.splitlines()[-1], ended.stderr
    ended = python("tools/scale_study.py", "plan", "configs/studies/none.yaml")
    assert ended.returncode == 1 and "does not exist" in ended.stderr
