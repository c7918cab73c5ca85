"""Runs and commands on rehearsed GPUs against the CPU's, and faults that only the first may notice."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda.budget import BORDERS, COPIES, beyond_budget, other_copies
from tests.cuda.harness_checks import CHECKS
from tests.cuda.planted import FAULTS
from tests.cuda.runs import COMMANDS, RUNS
from tests.forked import PRELOADED, forked

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: nothing to rehearse")
MODULE = "tests.cuda.runs"


@pytest.fixture(scope="module")
def found(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every run came to, by device: one process each."""
    folder = tmp_path_factory.mktemp("rehearsed")
    for device in ("cpu", "cuda"):
        (folder / device).mkdir()
        options = {"preloaded": ("tests.cuda.eight_gpus", *PRELOADED)} if device == "cuda" else {}
        done = forked(0, MODULE, device, corpus, folder / device, seconds=280, **options)
        assert done.returncode == 0, done.stderr[-5000:]
    return {device: json.loads((folder / device / "results.json").read_text()) for device in ("cpu", "cuda")}


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_the_rehearsal_itself(found: dict[str, Any], name: str) -> None:
    """If torch has changed: harness_checks.py says of each what to look at."""
    assert (found["cuda"][name]["error"], found["cuda"][name]["faults"]) == (None, [])


def test_a_gpu_without_transformer_engine_computes_with_local_layers(found: dict[str, Any]) -> None:
    """The import and Triton are real."""
    spec, op, reason, error = found["cuda"]["auto"]["value"]
    assert (spec, op) == ("local", "triton")
    assert reason == (
        "local (auto: no TransformerEngine: ModuleNotFoundError: No module named 'transformer_engine' (pip install "
        "--no-build-isolation 'transformer-engine[pytorch]'))"
    )
    assert error.startswith("model.spec=te needs TransformerEngine")


@pytest.mark.parametrize("name", [*RUNS, *COMMANDS])
def test_it_computes_on_a_gpu_what_it_computes_on_the_cpu(found: dict[str, Any], name: str) -> None:
    rehearsed, expected = found["cuda"][name], found["cpu"][name]
    assert not (rehearsed["error"] or rehearsed["faults"] or expected["error"])
    assert expected["value"]
    assert_same(rehearsed["value"], expected["value"])


def assert_same(a: Any, b: Any) -> None:
    """Equal; numbers to 1e-6, as what is on record of the depth is rounded."""
    if isinstance(a, dict | list):
        assert type(a) is type(b) and len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key])
    elif isinstance(a, float):
        assert math.isclose(a, b, rel_tol=1e-6, abs_tol=1.1e-6), (a, b)
    else:
        assert a == b


@pytest.mark.parametrize("name", [name for name in RUNS if "not finite" not in name])
def test_a_step_waits_for_the_device_once(found: dict[str, Any], name: str) -> None:
    """`BUDGET` is the whole list of what a step may wait for; one that is skipped looks for the reason as well."""
    steps = found["cuda"][name]["steps"]
    assert len([did for _, did, *_ in steps if did != ["save"]]) >= 2
    assert beyond_budget(steps) == (set(), set())
    assert other_copies(steps) <= COPIES | BORDERS


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if not fault.counted])
def test_a_planted_fault_is_found(found: dict[str, Any], name: str) -> None:
    rehearsed = found["cuda"][name]
    assert re.search(FAULTS[name].found, rehearsed["faults"][0]) and rehearsed["error"]


def test_planted_waits_are_counted(found: dict[str, Any]) -> None:
    """Each at its line, and nothing else."""
    rehearsed = found["cuda"]["counted faults"]
    assert (rehearsed["value"], rehearsed["faults"]) == (0, [])
    assert beyond_budget(rehearsed["steps"]) == ({tuple(one) for one in found["cuda"]["places"]["value"]}, set())


def test_no_planted_fault_is_found_on_the_cpu(found: dict[str, Any]) -> None:
    on_cpu = found["cpu"]["all faults"]
    assert (on_cpu["value"], on_cpu["error"]) == (0, None)
