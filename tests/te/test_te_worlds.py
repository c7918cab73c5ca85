"""Worlds of several ranks on TransformerEngine's layers compute what one process computes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from megatron_depthattn.estimate.activations import chunk_memory
from megatron_depthattn.estimate.memory import rank_memory
from tests.gpu.te_models import METHODS_OWN
from tests.parallel import cases
from tests.parallel.cases import LAYOUTS, MODEL
from tests.parallel.compare import BOUND, violations, worst_gradient_error, worst_loss_error
from tests.parallel.launch import run_jobs
from tests.te import stand_in
from tests.te.world_cases import (
    BF16,
    CONTROLS,
    DELAYED,
    INFINITE,
    MEMORY,
    OVERLAPPED,
    PARITY,
    ROUNDED,
    ROUNDED_CONTROLS,
    Job,
    needs,
)

pytestmark = pytest.mark.timeout(1800)
PRELOADED = ("tests.te.stand_in:use_transformer_engine", "tests.te.worlds")
ROUNDING = 1.2
"""Farther from fp32 than one process, in the mean error of a parameter's gradient: other sums, other roundings. Under
tensor parallel 0.95 to 1.15 times, else 0.97 to 1.04."""


def by_name(jobs: list[Job]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("job", jobs, ids=[job.name for job in jobs])


class Worlds:
    """Results of the jobs that the selected tests ask for, and of those they are compared with."""

    def __init__(self, folder: Path, wanted: list[Job]) -> None:
        self._folder = folder
        everything = list(dict.fromkeys(one for job in wanted for one in (*needs(job), job)))
        everything.sort(key=lambda job: list(LAYOUTS).index(job.layout))
        alone = [job for job in everything if job.layout == "single"]
        alone.sort(key=lambda job: job.spec == "te")  # the local ones write weights and gradients
        self._rounds = [alone, [job for job in everything if job.layout != "single"]]

    def result(self, job: Job) -> dict[str, Any]:
        while self._rounds and not self._file(job, "json").exists():
            jobs = self._rounds.pop(0)
            ranks = LAYOUTS[jobs[0].layout].world_size if jobs else 1
            run_jobs(self._folder, ranks, jobs, "tests.te.worlds", PRELOADED)
        if (error := self._file(job, "error")).exists():
            pytest.fail(f"{job.name} failed:\n{error.read_text()}", pytrace=False)
        return json.loads(self._file(job, "json").read_text())

    def _file(self, job: Job, kind: str) -> Path:
        return self._folder / f"{job.name}.{kind}"


@pytest.fixture(scope="session")
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    if not (stand_in.FOLDER / "transformer_engine").is_dir():
        pytest.skip(f"no TransformerEngine in {stand_in.FOLDER}: run make install, or set DEPTHATTN_TE")
    here = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    wanted = [item.callspec.params["job"] for item in here if "job" in item.callspec.params]
    return Worlds(tmp_path_factory.mktemp("te-worlds"), wanted)


@by_name(PARITY)
def test_losses_and_gradients_are_those_of_one_process(worlds, job):
    """On local layers, in fp32."""
    assert not violations(worlds.result(job), worlds.result(job.reference))


@by_name(CONTROLS)
def test_control_a_mistake_violates_the_bounds(worlds, job):
    assert worst_gradient_error(worlds.result(job)) > 1e3 * BOUND
    assert violations(worlds.result(job), worlds.result(job.reference))


def error(result: dict[str, Any]) -> float:
    """Mean over parameters of the gradient's distance from one process on local layers in fp32. A method's own have few
    numbers, sums of terms that cancel: one of them would outweigh all others."""
    return mean(x for name, x in result["gradient_errors"].items() if not any(part in name for part in METHODS_OWN))


@by_name(ROUNDED)
def test_no_farther_from_fp32_than_one_process(worlds, job):
    result, alone = worlds.result(job), worlds.result(job.in_one_process)
    assert worst_loss_error(result["losses"], alone["losses"]) < 3e-3
    assert error(result) < ROUNDING * error(alone)
    is_in_order = job.recompute == "none" or (job.recompute == "uniform1" and job.method != "attnres")
    if job.layout in ("single", "pp2") and is_in_order:  # nothing is summed in another order
        assert result["gradient_errors"] == alone["gradient_errors"]


@by_name([job for job in ROUNDED if job.recipe == DELAYED])
def test_scales_are_those_of_one_process_on_every_rank(worlds, job):
    """Weights' to the last bit; those of inputs and gradients follow from the largest entry of any rank."""
    everyones, alone = worlds.result(job)["scales"], worlds.result(job.in_one_process)["scales"][0]
    assert set().union(*everyones) == alone.keys()
    for layer, scales in ((layer, scales) for mine in everyones for layer, scales in mine.items()):
        assert all(mine.get(layer, scales) == scales for mine in everyones), layer
        assert scales == pytest.approx(alone[layer], rel=0.3), layer
        assert scales[1] == alone[layer][1] or job.steps > 1, layer
        assert 1.0 not in (scales[0], scales[2]), "nothing was scaled"


@by_name(INFINITE)
def test_an_infinite_attention_is_a_finite_step_in_fp8(worlds, job):
    """As docs/precision.md says: the cast into the next layer's FP8 input saturates. In bf16 the step is left out."""
    result = worlds.result(job)
    assert (result["skipped"] == 0) == all(map(math.isfinite, result["losses"])) == (job.precision != BF16)


@by_name(ROUNDED_CONTROLS)
def test_control_a_mistake_shows_in_scales_or_errors(worlds, job):
    result = worlds.result(job)
    if job.sabotage == "dtypes_gathered_together":  # after the first step
        assert worst_loss_error(result["losses"], worlds.result(job.in_one_process)["losses"]) > 0.01
    elif job.recipe == DELAYED:
        first, second = result["scales"]
        assert first.keys() == second.keys() and all(first[layer] != second[layer] for layer in first)
    else:
        assert error(result) > 1.5 * ROUNDING * error(worlds.result(job.in_one_process))


@by_name([job for job in ROUNDED if job.recipe == DELAYED])
def test_histories_are_rolled_as_documented(worlds, job):
    """In a microbatch, on every rank: see docs/precision.md."""
    pipeline = LAYOUTS[job.layout].parallel.pipeline
    chunks, layers = LAYOUTS[job.layout].parallel.virtual_pipeline, MODEL.num_layers // pipeline
    everyones = worlds.result(job)["rolls"]
    for rank, rolls in enumerate(everyones):
        if size := cases.RECOMPUTE[job.recompute].num_layers:
            is_last = rank * pipeline // len(everyones) == pipeline - 1
            assert rolls == [chunks + layers // size, 2 * (layers // size) + is_last]
        else:
            assert rolls == [chunks, chunks]


@by_name([job for job in ROUNDED if job.save])
def test_a_resumed_run_is_the_one_that_was_not_stopped(worlds, job):
    """To the last bit, with weights of other layers and scaling state of every use of them."""
    result = worlds.result(job)
    last = {name: result[name][-1:] for name in ("losses", "grad_norms")}
    assert result["resumed"] == last | {"skipped": 0}


@by_name(OVERLAPPED)
def test_overlapped_communication_changes_no_weight(worlds, job):
    """Neither does what the local layers are tried with: evaluations, a step left out, a save."""
    result = worlds.result(job)
    assert result["buckets"] > 4
    assert result["different"] == {"overlapped": 0, "resumed": 0}
    assert result["overlapped"]["losses"] == result["plain"]["losses"]
    assert result["resumed"]["losses"] == result["plain"]["losses"][-1:]


@by_name(MEMORY)
def test_fp8_copies_are_those_that_the_estimate_counts(worlds, job):
    """Of weights to the byte; of what is kept for the backward pass above bf16, but for the scales."""
    plain = job.in_bf16
    config, above = job.config(), rank_memory(plain.config(), 1, pipeline_rank=0).weights
    assert worlds.result(job)["copies"] == rank_memory(config, 1, pipeline_rank=0).weights - above
    measured = worlds.result(job)["saved"] - worlds.result(plain)["saved"]
    estimated = chunk_memory(config, 0).activations - chunk_memory(plain.config(), 0).activations
    if job.recipe == DELAYED:  # attention as it runs here leaves its output to the projection, which keeps a copy alone
        model = config.model
        tokens = config.data.sequence_length * config.train.micro_batch_size
        estimated -= 2 * tokens * model.num_attention_heads * model.kv_channels * model.num_layers * model.num_loops
    assert measured == pytest.approx(estimated, rel=0.07)
    assert estimated < -50_000
