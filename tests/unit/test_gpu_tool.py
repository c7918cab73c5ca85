"""`make gpu` on a machine without a GPU: everything is skipped, for a reason that is reported and counted."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megatron_depthattn.benchmarks import command as benchmark
from megatron_depthattn.benchmarks.result import machine_facts
from tools import gpu

ROOT = Path(__file__).parents[2]


def test_reasons_to_skip():
    part = gpu.Part("step", ("torch", "megatron.core"), ("step",), 60)
    here = {"gpu": "NVIDIA H100", "seconds_left": 100.0, "is_installed": lambda module: True}
    assert gpu.reason_to_skip(part, **here) is None
    assert gpu.reason_to_skip(part, **here | {"gpu": None}) == "torch sees no NVIDIA GPU"
    missing = here | {"is_installed": lambda module: module != "megatron.core"}
    assert gpu.reason_to_skip(part, **missing) == "not installed: megatron.core"
    assert gpu.reason_to_skip(part, **missing | {"gpu": None}).count(";") == 1
    assert gpu.reason_to_skip(part, **here | {"seconds_left": 3.2}) == "3 s left of 530"


def test_what_is_installed():
    assert gpu.is_installed("torch.nn")
    assert not gpu.is_installed("no_such_package")
    assert not gpu.is_installed("no_such_package.core")


def test_limits_are_within_nine_minutes_and_names_are_unique():
    assert gpu.TOTAL_SECONDS <= 540 - 10  # what is written at the end takes some seconds
    assert all(part.seconds <= 150 for part in gpu.PARTS)
    assert len({part.name for part in gpu.PARTS}) == len(gpu.PARTS)


def test_every_benchmark_part_is_a_command():
    parser = benchmark.build_parser()
    verbs = {parser.parse_args(part.arguments).measure.__module__ for part in gpu.PARTS if not part.is_tests}
    assert {verb.rpartition(".")[2] for verb in verbs} == {"op", "step", "generate", "memory", "precision"}


def test_a_part_that_runs_fails_or_takes_too_long(tmp_path):
    sizes = ("--tokens", "8", "--sources", "1", "--runs", "1", "--implementations", "lean")
    op = gpu.run_part(gpu.Part("op", (), ("op", "--shape", "cpu", *sizes), 120), 120, tmp_path)
    assert (op.state, op.said) == ("ran", "see below")
    rejected = gpu.run_part(gpu.Part("layouts", (), ("layouts", "/no/such/file.yaml"), 120), 120, tmp_path)
    assert rejected.state == "failed"
    assert rejected.said.startswith("exit code 1: error: ")
    late = gpu.run_part(gpu.Part("op", (), ("op",), 0.2), 0.2, tmp_path)
    assert (late.state, late.said) == ("failed", "not done after 0 s")
    page = gpu.page([op, rejected, late], machine_facts())
    assert "1 ran, 2 failed, 0 skipped" in page
    assert "### Depth mix on" in page


TESTS = """
import pytest
def test_passes(record_property):
    record_property("found", {"error": 0.01234})
def test_fails():
    assert 1 == 2, "not equal"
@pytest.mark.parametrize("n", [1, 2])
def test_skips(n):
    pytest.skip("no such recipe")
"""


def test_a_part_of_tests_tells_what_was_found_and_what_was_skipped(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    part = gpu.Part("some", (), (str(tmp_path / "test_some.py"),), 60, is_tests=True)
    outcome = gpu.run_part(part, 60, tmp_path)
    assert outcome.state == "failed"
    assert outcome.figures["found"] == {"test_passes": {"error": 0.01234}}
    assert outcome.figures["skipped"] == {"no such recipe": 2}
    assert "### some: 1 passed, 1 failed, 2 skipped" in outcome.page
    assert "| test_passes |  error | 0.0123 |" in outcome.page
    assert "- failed: test_fails: AssertionError: not equal" in outcome.page
    assert "- skipped (2): no such recipe" in outcome.page


def test_a_part_that_is_over_its_bound_fails_and_keeps_its_table(tmp_path, monkeypatch):
    def over(*_, **__) -> subprocess.CompletedProcess[str]:
        (tmp_path / "precision.json").write_text('{"is_over": true}')
        (tmp_path / "precision.md").write_text("the table")
        return subprocess.CompletedProcess([], 1, "", "done")

    monkeypatch.setattr(gpu.subprocess, "run", over)
    outcome = gpu.run_part(gpu.Part("precision", (), ("precision",), 60), 60, tmp_path)
    assert (outcome.state, outcome.said, outcome.page) == ("failed", "over a bound, see below", "the table")


def test_a_second_call_on_the_same_machine_keeps_what_the_first_ran():
    machine = {"gpu": "NVIDIA H100", "torch": "2.11.0", "date": "today"}
    first = [
        gpu.Outcome("op", "ran", "see below", 9.0, date="morning"),
        gpu.Outcome("memory-3b", "skipped", "3 s left"),
    ]
    earlier = {"machine": machine, "parts": [asdict(outcome) for outcome in first]}
    second = [gpu.Outcome("memory-3b", "ran", "see below"), gpu.Outcome("tests", "ran", "9 passed")]
    merged = gpu.merge(earlier, second, machine | {"date": "tomorrow"})
    assert [(one.part, one.state) for one in merged] == [("tests", "ran"), ("op", "ran"), ("memory-3b", "ran")]
    assert merged[1].date == "morning"
    skipped = [gpu.Outcome("op", "skipped", "3 s left"), gpu.Outcome("memory-3b", "skipped", "1 s left")]
    assert [outcome.said for outcome in gpu.merge(earlier, skipped, machine)] == ["see below", "1 s left"]
    other_packages = {"machine": machine | {"pyarrow": "26.0.1"}, "parts": earlier["parts"]}
    assert len(gpu.merge(other_packages, second, machine | {"deepspeed": None})) == 3
    assert gpu.merge(earlier, second, machine | {"torch": "2.15.0"}) == [second[1], second[0]]
    assert gpu.merge(None, second, machine) == [second[1], second[0]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: make gpu would measure for minutes")
def test_without_a_gpu_everything_is_skipped_and_the_page_is_written(tmp_path):
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}", f"GPU_ARGS=--output {tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "no-gpu.json").read_text())
    assert [part["part"] for part in results["parts"]] == [part.name for part in gpu.PARTS]
    assert all("torch sees no NVIDIA GPU" in part["said"] for part in results["parts"])
    page = (tmp_path / "no-gpu.md").read_text()
    assert f"0 ran, 0 failed, {len(gpu.PARTS)} skipped" in page


def test_what_is_set_does_not_undo_the_recompute_modes():
    parser = benchmark.build_parser()
    memory = [parser.parse_args(part.arguments) for part in gpu.PARTS if part.arguments[0] == "memory"]
    assert len(memory) == 4
    assert not [key for given in memory for key in given.set if key.startswith("recompute.")]
