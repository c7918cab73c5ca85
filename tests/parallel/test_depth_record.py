"""Weights over depth on record under several layouts: those of one process, and the step is the one without them."""

from __future__ import annotations

import copy

import pytest

from tests.parallel.cases import LAYOUTS, LOOPED, PARITY, Job
from tests.parallel.compare import DEPTH_BOUND, worst_depth_difference

pytestmark = pytest.mark.timeout(3600)  # whichever test comes first to a world waits for all of its jobs

# Jobs of the parity campaign: no more of them are run. Of four tensor ranks two share a key/value head.
CASES = {
    *(("pp2", "none"), ("pp2xvpp2", "none"), ("pp2xvpp2", "uniform1"), ("tp2+sp", "none"), ("cp2", "none")),
    *(("tp4+sp", "none"), ("single", "uniform1"), ("single", "selective")),
    *(("pp2xvpp2-uneven", "none"), ("pp4-alone", "none")),
}
SAME = [
    job
    for job in PARITY
    if job.method == "depth_attention"
    and (job.layout, job.recompute) in CASES
    and (job.stride, job.window, job.loops, job.weights, job.mixes, job.ramp) == (2, 1, 1, "softmax", "value", False)
]
LOOPS = [job for job in LOOPED if job.layout in ("pp2xvpp2", "pp2xvpp4")]
REPLICAS = next(job for job in PARITY if job.layout == "dp2" and (job.stride, job.method) == (2, "depth_attention"))
VANILLA = next(job for job in PARITY if job.layout == "pp2" and job.method != "depth_attention")


@pytest.mark.parametrize("job", [*SAME, *LOOPS], ids=lambda job: job.name)
def test_the_record_is_that_of_one_process(campaign, job):
    ours, theirs = campaign.result(job)["depth"], campaign.result(job.reference)["depth"]
    assert ours["tokens"] == theirs["tokens"] == 2 * 32
    assert [*ours["layers"]] == [str(layer) for layer in range(1, 8)]
    assert worst_depth_difference(ours, theirs) < DEPTH_BOUND
    shifted = copy.deepcopy(ours)  # control: weights in another order
    for entry in shifted["layers"].values():
        entry["weights"].reverse()
    assert worst_depth_difference(shifted, theirs) > 1e-2


@pytest.mark.parametrize("job", [REPLICAS], ids=lambda job: job.name)
def test_replicas_are_averaged(campaign, job):
    ours, reference = campaign.result(job)["depth"], campaign.result(job.reference)
    first, second = reference["depth"], reference["depth_of_second"]
    assert ours["tokens"] == 2 * first["tokens"]
    mean = copy.deepcopy(first)
    for layer, entry in mean["layers"].items():
        other = second["layers"][layer]
        entry["weights"] = [(a + b) / 2 for a, b in zip(entry["weights"], other["weights"], strict=True)]
        entry["entropy"] = (entry["entropy"] + other["entropy"]) / 2
    assert worst_depth_difference(ours, mean) < DEPTH_BOUND
    assert worst_depth_difference(ours, first) > 1e-4  # control: one replica's alone


@pytest.mark.parametrize("job", [j for j in (*SAME, *LOOPS, REPLICAS) if j.steps > 1], ids=lambda job: job.name)
def test_the_loss_is_bit_equal_to_that_of_the_step_without(campaign, job):
    """The first step is run twice from the same weights: once on record, once as a training step."""
    result = campaign.result(job)
    assert result["first_loss"] == result["losses"][0]


@pytest.mark.parametrize("job", [VANILLA], ids=lambda job: job.name)
def test_other_methods_have_none(campaign, job):
    assert campaign.result(job)["depth"] is None


def test_the_cases_are_there():
    assert len(SAME) == len(CASES) and {LAYOUTS[job.layout].world_size for job in SAME} == {1, 2, 4}
    assert all(isinstance(job, Job) for job in LOOPS) and len(LOOPS) == 4
