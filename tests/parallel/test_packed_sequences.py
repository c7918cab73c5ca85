"""Documents in rows over four context-parallel ranks: as in one process. The other layouts are in test_parity.py. With
pipeline stages every microbatch has as many tokens; else it is an error."""

import json

import pytest
import torch

from tests.e2e.commands import must_succeed
from tests.forked import forked
from tests.parallel.cases import FULL
from tests.parallel.packed_worker import step

WORKER = "tests.parallel.packed_worker"
BATCHES = [[5, 11], [7, 3, 6], [16], [1, 1, 9, 5]]
"""Other borders in each microbatch, in every piece of a row and on one's border."""


@pytest.mark.usefixtures("megatron_world_of_one")
def test_four_context_ranks_are_one_process(tmp_path, record_property):
    must_succeed(forked(4, WORKER, tmp_path, json.dumps(BATCHES), "context"))
    ranks = [torch.load(tmp_path / f"{rank}of4.pt") for rank in range(4)]
    gradients = {name: gradient for rank in ranks for name, gradient in rank["gradients"].items()}
    losses = next(rank["losses"] for rank in ranks if rank["losses"])

    def difference(batches: list[list[int]]) -> float:
        one = step(batches)
        assert gradients.keys() == one["gradients"].keys()
        pairs = [*zip(losses, one["losses"], strict=True)]
        pairs += [(gradients[name], gradient) for name, gradient in one["gradients"].items()]
        return max(float((x - y).norm() / y.norm()) for x, y in pairs)

    record_property("difference", found := difference(BATCHES))
    assert found < 1e-5
    assert difference([[5, 11], [7, 3, 6], [16], [1, 2, 8, 5]]) > 1e-2, "control: a border one token later"


@pytest.mark.skipif(
    not FULL, reason="the error itself is in tests/unit/test_schedule.py; in two processes: make parity-full"
)
def test_microbatches_of_unequal_lengths_are_rejected(tmp_path):
    done = forked(2, WORKER, tmp_path, "[[5, 11], [7, 3]]", "pipeline")
    assert done.returncode != 0
    assert "a message of 10 rows and micro-batch 1 is to be sent, but the schedule was given 16 rows" in done.stderr
