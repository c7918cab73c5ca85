"""The main result: every layout computes what one process computes, and the comparison notices when it does not."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from megatron_depthattn.train.step_folders import MANIFEST, step_folder
from tests.checkpoints import stored
from tests.parallel.cases import (
    AGREEMENT,
    CHATTY,
    CONTROLS,
    DOCUMENTS,
    EVEN_PLAN,
    LAYOUTS,
    LOOPED,
    OVERLAP_CONTROLS,
    OVERLAPPED,
    PARITY,
    RESUMES,
    SAVE_AFTER,
    SAVES,
    VANILLA_LOOPED,
    Job,
    needs,
)
from tests.parallel.compare import BOUND, violations, worst_gradient_error, worst_loss_error
from tests.parallel.least_bytes import least_bytes

# Whichever test comes first to a world waits for all of its jobs.
pytestmark = pytest.mark.timeout(3600)


def by_name(jobs: list[Job]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("job", jobs, ids=[job.name for job in jobs])


@by_name([*PARITY, *VANILLA_LOOPED, *DOCUMENTS])
def test_losses_and_gradients_are_those_of_one_process(campaign, job):
    result, reference = campaign.result(job), campaign.result(job.reference)
    assert len(result["losses"]) == job.steps
    assert result["gradient_errors"].keys() == reference["gradient_errors"].keys()
    assert not violations(result, reference)
    connected = {text.removeprefix("connecting ").partition(",")[0] for text in result["connected"]}
    assert set(result.get("groups", ())) <= {"default_pg"} | connected, "groups that only connect in a step"
    if job.layout == "pp4xvpp2":  # Megatron sends one by one: each pair of neighbours has a connection of its own
        pairs = [f"connecting PIPELINE_MODEL_PARALLEL_GROUP, ranks {pair}" for pair in ("0-1", "0, 3")]
        assert result["connected"][-3:-1] == pairs  # the last group is that of the embedding


@by_name([job for job in (*LOOPED, *VANILLA_LOOPED) if job.steps > 1])
def test_gradient_norms_count_every_weight_of_a_loop_once(campaign, job):
    norms, expected = campaign.result(job)["grad_norms"], campaign.result(job.reference)["grad_norms"]
    assert len(norms) == job.steps
    assert norms == pytest.approx(expected[: job.steps], rel=BOUND)


@by_name([job for job in PARITY if LAYOUTS[job.layout].parallel.pipeline > 1])
def test_a_pipeline_sends_the_fewest_bytes_possible(campaign, job):
    """Counted below Megatron: hidden states and sources, their gradients, and nothing else, such as shapes."""
    result, layout = campaign.result(job), LAYOUTS[job.layout]
    sent, num_microbatches = result["sent"], result["microbatches"]
    assert sent["bytes"] == least_bytes(job, layout, num_microbatches)
    edges = layout.parallel.pipeline * layout.parallel.virtual_pipeline - 1
    assert sent["messages"] == 2 * edges * num_microbatches


@by_name([job for job in LOOPED if LAYOUTS[job.layout].parallel.pipeline > 1 and not job.unrolled])
def test_earlier_selves_cross_no_edge(campaign, job):
    """What is sent is what would be if layers read their own loop alone; counted through all loops it is more."""
    result, layout = campaign.result(job), LAYOUTS[job.layout]
    sent, num_microbatches = result["sent"]["bytes"], result["microbatches"]
    assert sent == least_bytes(job, layout, num_microbatches, earlier_selves=False)
    through_all = least_bytes(dataclasses.replace(job, unrolled=True), layout, num_microbatches)
    assert sum(sent.values()) < sum(through_all.values())


@by_name([CHATTY])
def test_control_exchanged_shapes_are_counted(campaign, job):
    result = campaign.result(job)
    least = least_bytes(job, LAYOUTS[job.layout], result["microbatches"])
    assert not violations(result, campaign.result(job.reference))
    assert all(result["sent"]["bytes"][edge] > size for edge, size in least.items())


@by_name([EVEN_PLAN])
def test_control_the_plan_of_an_even_cut_fails(campaign, job):
    with pytest.raises(pytest.fail.Exception, match="failed"):
        campaign.result(job)


@by_name(CONTROLS)
def test_a_deliberate_mistake_is_noticed(campaign, job):
    result, reference = campaign.result(job), campaign.result(job.reference)
    loss, gradient = worst_loss_error(result["losses"], reference["losses"]), worst_gradient_error(result)
    assert violations(result, reference)
    assert max(loss, gradient) > 1000 * BOUND


@by_name(SAVES)
def test_a_checkpoint_holds_what_megatron_would_gather(campaign, job):
    """Every tensor, bit by bit; and each data-parallel rank wrote its share."""
    campaign.result(job)
    ours, gathered = (
        step_folder(campaign.folder / one.checkpoint, SAVE_AFTER)
        for one in (job, dataclasses.replace(job, gathered=True))
    )
    written, expected = stored(ours), stored(gathered)
    assert written.keys() == expected.keys() and len(written) > 4 * 20
    assert [name for name in expected if not torch.equal(written[name], expected[name])] == []
    files, parallel = json.loads((ours / MANIFEST).read_text())["files"], LAYOUTS[job.layout].parallel
    sizes = [files[f"__{rank}_0.distcp"]["bytes"] for rank in range(LAYOUTS[job.layout].world_size)]
    for tensor_rank in range(parallel.tensor if parallel.pipeline == 1 else 0):
        of_replicas = sizes[tensor_rank :: parallel.tensor]
        assert max(of_replicas) < 1.2 * min(of_replicas), sizes


@by_name(RESUMES)
def test_a_resumed_run_continues_like_the_undisturbed_one(campaign, job):
    saved = next(save for save in needs(job) if save.save and save.layout == job.resume)
    resumed, undisturbed = campaign.result(job), campaign.result(saved)
    following = {key: undisturbed[key][SAVE_AFTER:] for key in ("losses", "grad_norms")}
    if job.layout == job.resume:  # whichever of the two checkpoints it was
        assert {key: resumed[key] for key in following} == following  # to the last bit
    else:
        assert len(resumed["losses"]) == len(following["losses"])
        assert not violations(resumed, following)


@by_name(OVERLAPPED)
def test_overlapped_communication_changes_no_number(campaign, job):
    """But for the norm of the gradient, which is summed shard by shard, and what is clipped by it."""
    result = campaign.result(job)
    assert result["buckets"] >= 4
    plain, overlapped, resumed = result["plain"], result["overlapped"], result["resumed"]
    assert overlapped["grad_norms"] == pytest.approx(plain["grad_norms"], rel=1e-6)
    assert overlapped["losses"] == pytest.approx(plain["losses"], rel=1e-7 if job.grad_clip else 0.0, abs=0.0)
    assert result["different"]["overlapped"] == 0 or job.grad_clip
    assert resumed["losses"] == pytest.approx(overlapped["losses"][-1:], rel=1e-7 if job.grad_clip else 0.0, abs=0.0)
    assert result["different"]["resumed"] == 0 or job.grad_clip


@by_name(OVERLAP_CONTROLS)
def test_control_overlap_that_does_not_wait_is_noticed(campaign, job):
    assert campaign.result(job)["different"]["overlapped"] > 0


@by_name([AGREEMENT])
def test_ranks_that_disagree_all_raise(campaign, job):
    messages = campaign.result(job)["messages"]
    assert len(messages) == LAYOUTS[job.layout].world_size
    assert all(message and "{3: 'odd'}" in message for message in messages), messages
