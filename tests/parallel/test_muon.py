"""Muon under every layout: what one process computes, through checkpoints between them, and with overlap."""

from __future__ import annotations

import pytest

from megatron_depthattn.config.hardware_checks import muon_lacks
from megatron_depthattn.train.step_folders import step_folder
from tests.checkpoints import stored
from tests.parallel.cases import LAYOUTS, MUON, MUON_CONTROLS, MUON_OVERLAPPED, MUON_RESUMES, SAVE_AFTER, Job
from tests.parallel.compare import BOUND, violations, worst_loss_error

pytestmark = [
    pytest.mark.timeout(3600),  # whichever test comes first to a world waits for all of its jobs
    pytest.mark.skipif(bool(muon_lacks()), reason=f"Muon needs what is missing here: {muon_lacks()}"),
]
BF16_BOUND = 2e-3
"""The gradients' roundings, 1e-7 of them, turn some of the bf16 roundings of Newton-Schulz."""


def by_name(jobs: list[Job]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("job", jobs, ids=[job.name for job in jobs])


@by_name(MUON)
def test_losses_and_norms_are_those_of_one_process(campaign, job):
    result, reference = campaign.result(job), campaign.result(job.reference)
    assert len(result["losses"]) == job.steps
    bound = BOUND if job.dtype == "fp32" else BF16_BOUND
    assert worst_loss_error(result["losses"], reference["losses"]) < bound
    assert result["grad_norms"] == pytest.approx(reference["grad_norms"][: job.steps], rel=10 * bound)
    assert job.dtype == "bf16" or not violations(result, reference)


@by_name(MUON_CONTROLS)
def test_a_deliberate_mistake_is_noticed(campaign, job):
    result, reference = campaign.result(job), campaign.result(job.reference)
    assert worst_loss_error(result["losses"], reference["losses"]) > 3 * BOUND


@by_name(MUON_RESUMES)
def test_a_resumed_run_continues_like_the_undisturbed_one(campaign, job):
    (saved,) = (save for save in MUON if save.save and save.layout == job.resume)
    resumed, undisturbed = campaign.result(job), campaign.result(saved)
    following = {key: undisturbed[key][SAVE_AFTER:] for key in ("losses", "grad_norms")}
    if job.layout == job.resume:
        assert {key: resumed[key] for key in following} == following  # to the last bit
    else:
        assert len(resumed["losses"]) == len(following["losses"])
        assert not violations(resumed, following)


def test_a_checkpoint_of_several_ranks_is_that_of_one(campaign):
    """One momentum of a matrix and no moment of Adam's, two of any other weight; of every weight its fp32 copy."""
    jobs = [job for job in MUON if job.save]
    for job in jobs:
        campaign.result(job)
    one, two = (stored(step_folder(campaign.folder / job.checkpoint, SAVE_AFTER)) for job in jobs)
    assert one.keys() == two.keys()
    weights = {name for name in one if not name.startswith("optimizer.")}
    states = {
        kind: {name for name in weights if f"optimizer.state.{kind}.{name}" in one}
        for kind in ("param", "momentum_buffer", "exp_avg", "exp_avg_sq")
    }
    assert states["param"] == weights and states["exp_avg"] == states["exp_avg_sq"]
    assert states["momentum_buffer"] == {
        name
        for name in weights
        if name.endswith(("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight"))
    }
    assert states["exp_avg"] == weights - states["momentum_buffer"]
    for name, value in one.items():
        assert float((two[name] - value).norm()) <= 1e-3 * float(value.norm()), name


@by_name(MUON_OVERLAPPED)
def test_overlapped_communication_changes_no_number(campaign, job):
    result = campaign.result(job)
    assert result["buckets"] >= (4 if LAYOUTS[job.layout].parallel.pipeline == 1 else 3)
    plain, overlapped, resumed = result["plain"], result["overlapped"], result["resumed"]
    assert overlapped["grad_norms"] == pytest.approx(plain["grad_norms"], rel=1e-6)
    exact = job.grad_clip == 0.0
    assert overlapped["losses"] == pytest.approx(plain["losses"], rel=0.0 if exact else 1e-6, abs=0.0)
    assert resumed["losses"] == pytest.approx(overlapped["losses"][-1:], rel=0.0 if exact else 1e-6, abs=0.0)
    assert not exact or result["different"] == {"overlapped": 0, "resumed": 0}
