"""Worlds with something wrong on rank 1: found before anything is built, in one line.

Each has 50 s from its start, imports apart, before it is ended and so fails (`odd_worlds.SECONDS`). Two are started by
torchrun with the training command, as users start them; the others are the preflight's own command, forked from one
process.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.commands import REPOSITORY, must_succeed, python, torchrun
from tests.launch.jobs import FULL
from tests.small_disk import can_mount

ODD_RANK = "tests/e2e/odd_rank.py"
TRAIN = "megatron_depthattn.train"
NEEDS_MOUNTS = "needs root, to mount a file system that one rank alone sees"

SCENARIOS = {
    "healthy": ([0, 0], [], "preflight: 2 ranks on cpu; python "),
    "other config": ([1, 1], ["rank 1 (", "has optimizer.lr=0.5; rank 0 (", "has optimizer.lr=0.005."], None),
    "other config/preflight.on_problem=warn": ([1, 1], ["different run configs"], None),
    "other variable": ([0, 0], ["WARNING: different values of NCCL_ALGO: rank 1 (", "has no value"], "passed in"),
    "disk that hangs/preflight.timeout=2": (
        [1, -9],
        ["no report for 2 s, in a world of 2, of rank 1 (", ", which has joined: most likely a file system hangs"],
        None,
    ),
    "slow to join/preflight.timeout=3": ([0, 0], [], "passed in"),
    "stopped in a group/preflight.timeout=2": (
        [70, -9],
        ["step 0 (connecting DATA_PARALLEL_GROUP_WITH_CP, ranks 0-1)"],
        None,
    ),
    "stopped/preflight.timeout=2": ([1, -9], ["of rank 1, which has not joined: ", "is stopped"], None),
    "stopped, no launcher/preflight.timeout=2": ([1, -9], ["rank 0 of 2 waited at MASTER_ADDR:MASTER_PORT"], None),
}
WITH_MOUNTS = {
    "no disk space": ([1, 1], ["disk space: rank 1 (", "196.6 kB free for 1 checkpoint of about 988.7 kB"], None),
    "no disk space/preflight.on_problem=warn": ([0, 0], ["WARNING: disk space: rank 1 ("], "passed in"),
    "no space at all": ([1, 1], ["cannot write: rank 1 (", "No space left on device: checkpoint.dir ("], None),
    "another folder": ([1, 1], ["not shared: what rank 1 (", "writes to checkpoint.dir, rank 0 ("], None),
    "read-only": ([1, 1], ["cannot write: rank 1 (", "Read-only file system: run.dir (", ", checkpoint.dir ("], None),
}


@pytest.fixture(scope="module")
def may_mount(tmp_path_factory: pytest.TempPathFactory) -> bool:
    return can_mount(tmp_path_factory.mktemp("mount"))


@pytest.fixture(scope="module")
def results(config_file: Path, may_mount: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What became of each scenario's world."""
    work = tmp_path_factory.mktemp("worlds")
    scenarios = [*SCENARIOS, *(WITH_MOUNTS if may_mount else ())]
    must_succeed(python("-W", "ignore", "-m", "tests.e2e.odd_worlds", work, config_file, *scenarios, seconds=240))
    return {name: json.loads((work / str(i) / "result.json").read_text()) for i, name in enumerate(scenarios)}


@pytest.mark.parametrize("scenario", SCENARIOS | WITH_MOUNTS)
def test_world(scenario: str, results: dict[str, dict]):
    if scenario not in results:
        pytest.skip(NEEDS_MOUNTS)
    codes, texts, output = (SCENARIOS | WITH_MOUNTS)[scenario]
    result = results[scenario]
    assert result["codes"] == codes, result
    for rank, said in enumerate(result["errors"]):
        lines = [line for line in said.splitlines() if line.startswith(f"error (rank {rank})")]
        assert len(lines) == (codes[rank] == 1), "an error is one line on each rank, and no more than that"
        assert "Traceback" not in said
        if lines:
            assert all(text in lines[0] for text in texts), lines
    assert all(text in result["errors"][0] for text in texts), result["errors"][0]
    assert (output or "") in result["outputs"][0]
    left = {name for name in result["left"] if not name.startswith("stacks/")}
    assert left <= {"preflight.json"}, "the files that ranks tried to write are gone"


def test_a_healthy_world_has_no_finding_and_a_record(results: dict[str, dict]):
    result = results["healthy"]
    assert result["errors"][1] == result["outputs"][1] == ""
    assert result["errors"][0] == "" and "STOP" not in result["outputs"][0]
    assert result["left"] == ["preflight.json"]


def other_code(folder: Path) -> Path:
    """A copy of the package with one line more in one file."""
    shutil.copytree(REPOSITORY / "megatron_depthattn", folder / "megatron_depthattn")
    with (folder / "megatron_depthattn" / "ops" / "lean.py").open("a") as file:
        file.write("# one line more\n")
    return folder


@FULL
def test_two_versions_of_the_code_do_not_train_until_asked_to(config_file: Path, tmp_path: Path):
    run_dir, other = tmp_path / "run", other_code(tmp_path / "other")
    command = [ODD_RANK, "other code", other, TRAIN, config_file, f"run.dir={run_dir}", "train.steps=2"]
    result = torchrun(2, *command)
    assert result.returncode == 1
    for rank in range(2):
        assert f"error (rank {rank}): preflight: different versions of this package's code: rank 1 (" in result.stderr
    assert f"({other / 'megatron_depthattn'}); rank 0 (" in result.stderr
    assert not (run_dir / "metrics.jsonl").exists() and not (run_dir / "config.yaml").exists()

    asked_to = must_succeed(torchrun(2, *command, "preflight.on_problem=warn"))
    assert "preflight: WARNING: different versions of this package's code: rank 1 (" in asked_to.stderr
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    assert "WARNING: different versions" in (run_dir / "log.txt").read_text()
    record = json.loads((run_dir / "preflight.json").read_text())
    assert [finding["severity"] for finding in record["findings"]] == ["stop"]
    assert len({report["code"] for report in record["reports"]}) == 2
