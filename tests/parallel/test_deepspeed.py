"""The DeepSpeed engine against the Megatron engine in one process: losses, norms, gradients, checkpoints, bad steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.compare import BOUND, DEPTH_BOUND, worst_depth_difference
from tests.parallel.deepspeed_cases import (
    BF16,
    CLIP,
    CONTROLS,
    LAYOUTS,
    PARITY,
    POISONED,
    RESUMES,
    SAVE_AFTER,
    SAVES,
    STEPS,
    Job,
    needs,
    saver_of,
)
from tests.parallel.launch import run_jobs

# Whichever test comes first to a world waits for all of its jobs.
pytestmark = pytest.mark.timeout(3600)

NORM_BOUND = 1e-4
BF16_LOSS_BOUND, BF16_NORM_BOUND = 1e-3, 1e-2
"""Of one process in bf16, whose sums are rounded in another order; bf16 rounds at 4e-3."""
Results = Callable[[Job], dict[str, Any]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """Runs, world by world, exactly the jobs of the selected tests and those that they need."""
    folder = tmp_path_factory.mktemp("deepspeed")
    callspecs = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    wanted = [spec.params["job"] for spec in callspecs if isinstance(spec.params.get("job"), Job)]
    everything = list(dict.fromkeys(job for one in wanted for job in (*needs(one), one)))
    # A world is started once, but for the single process: it writes the references, and continues from all others.
    for world_size, resuming in ((1, {False}), (4, {False, True}), (2, {False, True}), (1, {True})):
        jobs = [job for job in everything if LAYOUTS[job.layout].world_size == world_size]
        jobs = [job for job in jobs if bool(job.resume) in resuming]
        jobs.sort(key=lambda job: (job != job.reference, bool(job.resume), list(LAYOUTS).index(job.layout)))
        run_jobs(folder, world_size, jobs, "tests.parallel.deepspeed_worker")
    yield lambda job: _result(folder, job)
    print_table(folder, everything)  # seen with -s


def print_table(folder: Path, jobs: list[Job]) -> None:
    """What a reader quotes: the worst relative errors of every job that ran, a line each."""
    print(f"\n{'job':<72}{'loss':>9}{'norm':>9}{'gradient':>9}")
    for job in jobs:
        if job != job.reference and not (folder / f"{job.name}.error").exists():
            found = errors(lambda one: _result(folder, one), job)
            print(f"{job.name:<72}{found['loss']:>9.1e}{found['norm']:>9.1e}{found['gradient']:>9.1e}")


def _result(folder: Path, job: Job) -> dict[str, Any]:
    error = folder / f"{job.name}.error"
    if error.exists():
        pytest.fail(f"{job.name} failed:\n{error.read_text()}", pytrace=False)
    return json.loads((folder / f"{job.name}.json").read_text())


def by_name(jobs: list[Job]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("job", jobs, ids=[job.name for job in jobs])


def worst(result: dict[str, Any], reference: dict[str, Any], key: str) -> float:
    """The largest relative error of the steps that were run, which are the reference's last ones."""
    expected = reference[key][STEPS - len(result[key]) :]
    return max(abs(one - other) / abs(other) for one, other in zip(result[key], expected, strict=True))


def errors(results: Results, job: Job) -> dict[str, float]:
    result, reference = results(job), results(job.reference)
    assert min(reference["grad_norms"]) > 2 * CLIP, "steps that are not clipped show nothing about clipping"
    return {
        "loss": max(worst(result, reference, "losses"), abs(result["held_out"] / reference["held_out"] - 1)),
        "norm": worst(result, reference, "grad_norms"),
        "learning rate": worst(result, reference, "learning_rates"),
        "gradient": max(result.get("gradient_errors", {"": 0.0}).values()),
    }


WHOLE_RUNS = [*PARITY, *POISONED, *(job for job in SAVES if job.dtype == "fp32" and job.engine == "deepspeed")]


@by_name(WHOLE_RUNS)
def test_steps_are_those_of_the_megatron_engine(results, job):
    found = errors(results, job)
    assert len(results(job)["losses"]) == STEPS
    assert results(job)["gradient_errors"].keys() > {"output_layer.weight"} or job.tied
    assert found["loss"] <= BOUND and found["norm"] <= NORM_BOUND and found["gradient"] <= BOUND
    assert found["learning rate"] == 0


@by_name([job for job in (*PARITY, SAVES[1]) if (job.layout, job.rows, job.method) == ("dp2", 1, "depth_attention")])
def test_weights_over_depth_on_record_are_those_of_the_megatron_engine(results, job):
    """Two replicas begin with a row each, the one process with both."""
    ours, theirs = results(job)["depth"], results(job.reference)["depth"]
    assert ours["tokens"] == theirs["tokens"] and [*ours["layers"]] == ["1", "2", "3"]
    assert worst_depth_difference(ours, theirs) < DEPTH_BOUND


@by_name([*BF16, *(job for job in SAVES if job.dtype == "bf16")])
def test_steps_in_bf16_agree_to_its_rounding(results, job):
    found = errors(results, job)
    assert found["loss"] <= BF16_LOSS_BOUND and found["norm"] <= BF16_NORM_BOUND


@by_name(CONTROLS)
def test_a_deliberate_mistake_is_noticed(results, job):
    found = errors(results, job)
    assert max(found["loss"] / BOUND, found["norm"] / NORM_BOUND, found["gradient"] / BOUND) > 10


@by_name(POISONED)
def test_a_step_that_is_not_finite_changes_nothing_and_is_explained(results, job):
    """That the steps after it are those of a run without it is the first test's to show."""
    seen = results(job)["poisoned"]
    blamed = len(seen) - 1
    for skipped, unchanged, diagnosis in seen:
        assert skipped and unchanged
        assert diagnosis == seen[0][2]
        headline, line = diagnosis
        assert "not finite, so the optimizer was not stepped" in headline
        assert line.startswith(f"rank {blamed} (") and "output of layer 1 mlp.linear_fc2" in line


@by_name(RESUMES)
def test_a_checkpoint_of_either_engine_continues_under_the_other(results, job):
    saver = saver_of(job)
    resumed, saved = results(job), results(saver)
    assert len(resumed["losses"]) == STEPS - SAVE_AFTER
    if (job.engine, job.stage, job.layout, job.dtype) == (saver.engine, saver.stage, saver.layout, saver.dtype):
        for key in ("losses", "grad_norms", "learning_rates"):
            assert resumed[key] == saved[key][SAVE_AFTER:]  # to the last bit
        assert resumed["held_out"] == saved["held_out"]
        return
    found = errors(results, job)
    is_exact = job.dtype == "fp32"
    assert found["loss"] <= (BOUND if is_exact else BF16_LOSS_BOUND)
    assert found["norm"] <= (NORM_BOUND if is_exact else BF16_NORM_BOUND)
    assert found["learning rate"] == 0
