"""A step that is not finite: nothing changes, and the log names who began it. Real worlds, poisoned on one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_depthattn.config import ParallelConfig, RecomputeConfig
from megatron_depthattn.train.step import NonFiniteError, SkippedSteps, StepResult
from tests.e2e.commands import must_succeed
from tests.forked import forked
from tests.parallel.non_finite_worker import CASES, LAYER, LAYOUTS, cases_of, config_of, run_case, undisturbed_run

POISONED = [f"{layout} {case}" for layout in LAYOUTS for case in cases_of(layout) if case != "clean"]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of four ranks saw, for every layout and case."""
    file: Path = tmp_path_factory.mktemp("non_finite") / "results.json"
    must_succeed(forked(4, "tests.parallel.non_finite_worker", file, *LAYOUTS))
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", POISONED)
def test_a_skipped_step_leaves_no_trace(worlds, name):
    """The control is the step before, which changes something."""
    for seen in worlds[name]:
        assert seen["skipped"]
        assert seen["untouched"]
        assert seen["first_step_changed_something"]
        assert seen["continues_as_without"], "the next step differs from that of a run without the poisoned one"
        assert seen["hooks_left"] == 0
        assert seen["diagnosis"] == worlds[name][0]["diagnosis"], "ranks differ in what they say"


@pytest.mark.parametrize("name", POISONED)
def test_the_log_names_rank_layer_and_samples(worlds, name):
    seen, case = worlds[name], name.split()[1]
    (blamed,) = (one for one in seen if one["blamed"])
    replica = [one for one in seen if one["data_rank"] == blamed["data_rank"]]
    samples = ", ".join(map(str, next(one["ids"] for one in replica if one["ids"])))
    headline, *lines = blamed["diagnosis"]
    assert "not finite, so the optimizer was not stepped" in headline
    who = f"rank {blamed['rank']} (data-parallel rank {blamed['data_rank']}, pipeline stage {blamed['stage']})"
    if case == "forward_overflow":
        (line,) = lines
        assert line.startswith(f"{who}: output of layer {LAYER} mlp.linear_fc2: ")
        assert "inf of" in line and "NaN" not in line and "from finite input; microbatch 1 of" in line
        assert line.endswith(f"sample ids {samples}")
    elif case == "backward_nan":
        (line,) = lines
        assert "loss nan" not in headline and "gradient norm nan" in headline
        assert str(blamed["rank"]) in line.split("(")[0]
        # A later loop's weight is the first loop's: what names the layer is the gradient of the input.
        what = f"the output of layer {LAYER} mlp" if "loops" in name else f"layer {LAYER} mlp.linear_fc2.weight"
        assert f": gradient of {what}" in line and "NaN of" in line
        assert "; microbatch 1 of" in line and line.endswith(f"sample ids {samples}")
    elif case == "nan_weight":
        weight, line = lines
        name_of = f"layer {LAYER} self_attention.linear_proj"
        assert weight.startswith(f"{who}: the weights are not finite already before this step: {name_of}.weight (1 NaN")
        assert line.startswith(f"{who}: output of {name_of}: ") and samples in line
    elif case == "once_only":
        again, line = lines
        assert "not reproduced" in again
        assert f"data-parallel rank {blamed['data_rank']}," in line and "loss of the first run" in line
    else:
        (line,) = lines
        assert "every output and every gradient of a microbatch is finite" in line
        assert f"layer {LAYER} self_attention.linear_proj.weight on rank {blamed['rank']}," in line
        assert "gradient norm inf" in headline


def test_control_a_clean_step_is_not_skipped(worlds):
    for seen in worlds["dp2xpp2 clean"]:
        assert not seen["skipped"]
        assert not seen["diagnosis"]
        assert not seen["untouched"]
        assert not seen["continues_as_without"]


@pytest.mark.parametrize("recompute", [RecomputeConfig(), RecomputeConfig(granularity="selective")], ids=str)
@pytest.mark.usefixtures("megatron_world_of_one")
def test_one_process(recompute):
    config, device = config_of(ParallelConfig(), recompute), torch.device("cpu")
    seen = run_case(config, CASES["backward_nan"], device, undisturbed_run(config, device))
    assert seen["untouched"] and seen["continues_as_without"] and seen["hooks_left"] == 0
    (line,) = seen["diagnosis"][1:]
    assert line.startswith(f"rank 0 (data-parallel rank 0, pipeline stage 0): gradient of layer {LAYER} mlp.linear_fc2")
    assert "microbatch 1 of 4 (from 0), sample ids 1010, 1011" in line


GOOD, BAD = (
    StepResult(5.0, 1.0),
    StepResult(float("nan"), 1.0, skipped=True, diagnosis=("loss nan", "rank 3", "rank 4")),
)


def test_stop_raises_at_once():
    steps = SkippedSteps("stop", max_in_a_row=10)
    steps.record(1, GOOD)
    with pytest.raises(NonFiniteError, match=r"step 2: loss nan; rank 3; set train\.on_non_finite=skip"):
        steps.record(2, BAD)


def test_skip_stops_after_too_many_in_a_row():
    steps = SkippedSteps("skip", max_in_a_row=2)
    for step, result in enumerate([BAD, BAD, GOOD, BAD, BAD], start=1):
        steps.record(step, result)
    assert steps.in_a_row == 2
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, more than train\.max_skipped_in_a_row=2"):
        steps.record(6, BAD)
