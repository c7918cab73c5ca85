"""The batch size of every step of a ramp: Megatron's own calculator, and sums written out."""

import itertools
import math

import pytest
from megatron.core import num_microbatches_calculator as calculators

from megatron_depthattn.config import from_dict, to_dict
from megatron_depthattn.config.batch_sizes import BatchSizes

RAMPS = [  # the full batch, and start, increment, samples
    (16, [4, 4, 64]),
    (16, [4, 4, 1]),  # at its end after the first step
    (64, [8, 8, 50]),  # some sizes have no step
    (24, [2, 2, 997]),
    (7, [1, 1, 100]),
    (1024, [16, 16, 1_000_003]),
    (6, [3, 3, 7]),
    (8, [1, 1, 232]),  # 232 / (232 / 7) is 6.999...: Megatron rises a step later than exact numbers would
]


@pytest.mark.skipif(
    not hasattr(calculators, "RampupBatchsizeNumMicroBatchesCalculator"), reason="Megatron-Core 0.19 has no batch ramp"
)
@pytest.mark.parametrize(("full", "ramp"), RAMPS)
def test_sizes_are_megatrons(full, ramp):
    samples, theirs = ramp[2], calculators.RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 1, *ramp)
    consumed, each = 0, BatchSizes.of(full, ramp).each(0)
    while consumed < samples + 2 * full:
        size = next(each)
        theirs.update(consumed, consistency_check=True)
        assert size == theirs.get_current_global_batch_size() == theirs.get(), consumed
        consumed += size
    assert size == full


@pytest.mark.parametrize(("full", "ramp"), [*RAMPS[:5], RAMPS[-1], (8, None)])
def test_sums_and_steps_are_those_of_steps_one_by_one(full, ramp):
    """From the beginning and from anywhere; samples after some steps, steps to some tokens."""
    sizes = BatchSizes.of(full, ramp)
    for first in (0, 1, 37, 5000):
        each = list(itertools.islice(sizes.each(first), 150))
        for steps in (0, 1, 2, 5, 149, 150):
            stretches = list(sizes.stretches(steps, first))
            assert [size for size, count in stretches for _ in range(count)] == each[:steps]
            assert sizes.consumed_after(steps, first) == first + sum(each[:steps])
    sums = list(itertools.islice(itertools.accumulate(sizes.each(0), initial=0), 150))
    for tokens in (1, 31, 32, 32.5, 320, 4321.5):
        assert sizes.steps_to(tokens, 32) == next(steps for steps, samples in enumerate(sums) if samples * 32 >= tokens)
    assert BatchSizes.of(8).steps_to(1e12 + 0.5, 7) == math.ceil((1e12 + 0.5) / 56)


def test_a_run_keeps_its_ramp():
    """Another one, or another full batch, would give other samples to the steps that are left; and an older run, whose
    config has no such key, resumes without one."""
    from megatron_depthattn.train.checkpoint import _fixed_in_a_run

    def fixed(**train):
        return _fixed_in_a_run(to_dict(from_dict({"train": train}, "a test")))

    older = to_dict(from_dict({}, "a test"))
    del older["train"]["batch_ramp"], older["data"]["document_mask"]
    assert _fixed_in_a_run(older) == fixed() == fixed(global_batch_size=32)
    ramp = [4, 4, 64]
    assert fixed(batch_ramp=ramp) not in (fixed(), fixed(batch_ramp=[4, 4, 65]))
    assert fixed(batch_ramp=ramp) != fixed(batch_ramp=ramp, global_batch_size=32)
