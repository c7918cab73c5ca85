"""`make gpu` on a machine without a GPU: everything is skipped, for a reason that is told and counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import benchmark, gpu
from tools.benchmarks.result import machine_facts

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
    verbs = {parser.parse_args(part.arguments).measure.__name__ for part in gpu.PARTS if not part.is_tests}
    assert verbs == {"measure_op", "measure_step", "measure_memory", "measure_data"}


def test_a_part_that_runs_fails_or_takes_too_long(tmp_path):
    flops = gpu.run_part(gpu.Part("flops", (), ("flops",), 120), 120, tmp_path)
    assert (flops.state, flops.said) == ("ran", "see below")
    assert flops.figures["figures"]["3b, stride 24"]["mix"] > 0
    refused = gpu.run_part(gpu.Part("data", (), ("data", "--directory", "/no/such/folder"), 120), 120, tmp_path)
    assert refused.state == "failed"
    assert refused.said.startswith("exit code 1: error: ")
    late = gpu.run_part(gpu.Part("op", (), ("flops",), 0.2), 0.2, tmp_path)
    assert (late.state, late.said) == ("failed", "not done after 0 s")
    page = gpu.page([flops, refused, late], machine_facts(), 3.0)
    assert "1 ran, 2 failed, 0 skipped" in page
    assert "### Operations of one token's forward pass" in page


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
