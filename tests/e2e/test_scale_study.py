"""A tiny study through every verb, as a user runs it: interrupted, resumed, fitted, reported."""

import contextlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_depthattn.study.report_data import read_report_data
from megatron_depthattn.train.history import METRICS
from megatron_depthattn.train.line_files import read_records
from tests.e2e.commands import REPOSITORY, wait_until
from tools.scale_study import main

STUDY = REPOSITORY / "configs/studies/smoke.yaml"


def study(verb: str, file: Path, output: Path, *more: str) -> str:
    """What a verb prints, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([verb, str(file), "--output", str(output), *more]) == 0
    return printed.getvalue()


@pytest.fixture
def small_study(tmp_path: Path) -> Path:
    """The shipped smoke study at its smaller size and two budgets on a trunk, all its files in the test's folder."""
    content = yaml.safe_load(STUDY.read_text())
    content["config"] = str(REPOSITORY / "configs/quickstart.yaml")
    content["settings"]["data.path"] = str(tmp_path / "corpus")
    content["corpus"]["input"] = str(REPOSITORY / "megatron_depthattn/study")
    content["ladder"]["layers"] = [2]
    content |= {"schedule": "wsd", "decay_ratio": 0.3, "seeds": [1], "tokens_per_parameter": [0.2, 0.4]}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.timeout(400)
def test_a_study_through_plan_run_fit_and_report(small_study: Path, tmp_path: Path):
    output = tmp_path / "study"
    planned = study("plan", small_study, output)
    plan = json.loads((output / "plan.json").read_text())
    points, num_runs = plan["points"], len(plan["points"] + plan["trunks"])
    assert (len(points), num_runs) == (4, 6) and "nothing was started" in planned and not (output / "runs").exists()
    assert "2 of the runs are trunks" in planned

    command = [sys.executable, "tools/scale_study.py", "run", str(small_study), "--output", str(output), "--jobs", "2"]
    log = tmp_path / "run.log"
    with log.open("w") as file:
        cut = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
        assert wait_until(lambda: ": finished, held-out loss" in log.read_text(), 180, poll=0.2), log.read_text()
        cut.send_signal(signal.SIGTERM)
        assert cut.wait(90) == 75, log.read_text()
    finished = log.read_text().count(": finished, held-out loss")
    assert 1 <= finished < num_runs
    assert log.read_text().index("cost: ") < log.read_text().index("; of step")
    before = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/*/*/*/history.jsonl")}

    printed = study("run", small_study, output, "--jobs", "2")
    assert printed.count("finished already") == finished and "by the steps so far" in printed
    assert printed.count("finished, held-out loss") == num_runs - finished
    untouched = [path for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert len(untouched) == finished, "what is finished is left alone"
    results = json.loads((output / "results.json").read_text())
    assert all(result["finished"] and result["commit"] and 4 < result["loss"] < 6.5 for result in results["results"])
    assert {rung: set(methods) for rung, methods in results["timing"].items()} == {"d2": {"vanilla", "depth_attention"}}

    assert "depth_attention: " in study("fit", small_study, output)
    fitted = json.loads((output / "fit.json").read_text())
    assert {len(difference["pairs"]) for difference in fitted["differences"]} == {1}
    assert "reason" in fitted["laws"]["vanilla"], "one size does not make a law"

    study("report", small_study, output)
    page = (output / "report.html").read_text()
    assert all(point["id"] in page for point in points)
    assert str(tmp_path) not in page
    assert (output / "report.md").read_text().startswith("# ")
    flops = results["flops"]
    assert flops["in_separate_runs"] == sum(point["flops"] for point in points)
    assert flops["spent"] == pytest.approx(sum(run["flops"] * run["steps"] / whole_steps(run) for run in runs_of(plan)))
    assert f"({flops['in_separate_runs'] / flops['spent']:.2f} times)" in page

    for run in read_report_data(output).runs:
        curve = [tokens for tokens, _ in run["train_loss"]]
        assert len(curve) == whole_steps(run) and curve == sorted(curve) and curve[-1] == run["tokens"], (
            "with its trunk"
        )

    # A budget on the trunk is, to the last bit, a run of its own: the study of such runs, without a trunk.
    branches = [point for point in points if point["method"] == "depth_attention"]
    content, warmup = yaml.safe_load(small_study.read_text()), round(0.1 * max(map(whole_steps, points)))
    content |= {"schedule": None, "timing_rounds": 0, "methods": {}}
    for point in branches:
        wsd = {"schedule": "wsd", "decay_ratio": 0.3, "warmup_ratio": warmup / whole_steps(point)}
        settings = {"model.method": "depth_attention"} | {f"optimizer.{key}": value for key, value in wsd.items()}
        budget = point["tokens_per_parameter"]
        content["methods"][f"to{budget}"] = {"settings": settings, "tokens_per_parameter": [budget]}
    content["baseline"] = next(iter(content["methods"]))
    small_study.write_text(yaml.safe_dump(content))
    plain = tmp_path / "plain"
    assert study("run", small_study, plain, "--jobs", "2").count("finished, held-out loss") == 2
    results = json.loads((plain / "results.json").read_text())
    assert [result["finished"] for result in results["results"]] == [True, True] and "trunks" not in results
    for point in branches:
        budget = point["tokens_per_parameter"]
        runs = (
            output / f"runs/{point['trunk']}",
            output / f"runs/{point['id']}",
            plain / f"runs/d2/to{budget}/x{budget}/seed1",
        )
        trunk, branch, whole = (
            [tuple(record[key] for key in ("loss", "grad_norm", "lr")) for record in read_records(folder / METRICS)]
            for folder in runs
        )
        assert trunk[: point["trunk_steps"]] + branch == whole and len(whole) == whole_steps(point)


def whole_steps(run: dict) -> int:
    return run["steps"] + run["trunk_steps"]


def runs_of(plan: dict) -> list[dict]:
    return [*plan["points"], *plan["trunks"]]


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for verb, file, wanted in (
        ("fit", STUDY, "holds no plan.json"),
        ("report", STUDY, "plan.json"),
        ("plan", STUDY.with_name("none.yaml"), "does not exist"),
    ):
        assert main([verb, str(file), "--output", str(tmp_path)]) == 1
        assert wanted in capsys.readouterr().err.splitlines()[-1]
