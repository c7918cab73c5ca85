"""Packed documents under two pipeline stages: as under one, if every microbatch has as many tokens; else rejected."""

import json

import pytest
import torch

from tests.e2e.commands import must_succeed
from tests.forked import forked
from tests.parallel.cases import FULL
from tests.parallel.packed_worker import step

WORKER = "tests.parallel.packed_worker"


@pytest.mark.usefixtures("megatron_world_of_one")
def test_two_stages_are_one(tmp_path, record_property):
    batches = [[5, 11], [7, 3, 6], [16]]  # other borders in each microbatch
    one = step(batches, rank=0, stages=1)
    must_succeed(forked(2, WORKER, tmp_path, json.dumps(batches)))
    first, last = (torch.load(tmp_path / f"{name}.pt") for name in ("0of2", "1of2"))
    found = [float((x - y).norm() / y.norm()) for x, y in zip(last["losses"], one["losses"], strict=True)]
    both = first["gradients"] | last["gradients"]
    assert both.keys() == one["gradients"].keys()
    found += [float((both[name] - x).norm() / x.norm()) for name, x in one["gradients"].items()]
    record_property("difference", max(found))
    assert max(found) < 1e-5


@pytest.mark.skipif(
    not FULL, reason="the error itself is in tests/unit/test_schedule.py; in two processes: make parity-full"
)
def test_microbatches_of_unequal_lengths_are_rejected(tmp_path):
    done = forked(2, WORKER, tmp_path, "[[5, 11], [7, 3]]")
    assert done.returncode != 0
    assert "a message of 10 rows and micro-batch 1 is to be sent, but the schedule was given 16 rows" in done.stderr
