"""The sequence of sample ids: the same global batches whatever the layout, and resume from a count alone."""

import itertools

import numpy as np
import pytest

from megatron_depthattn.data.order import (
    SampleSequence,
    batch_positions,
    batch_sample_ids,
    micro_batches,
    num_micro_batches,
)

NUM_SAMPLES, GLOBAL_BATCH = 29, 16  # coprime: batches cross the ends of epochs at every offset
LAYOUTS = [(dp, mbs) for dp in (1, 2, 4) for mbs in (1, 2, 4)]


def permutation(epoch: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(NUM_SAMPLES)


def layout(dp: int, mbs: int, rank: int) -> dict[str, int]:
    return {
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": mbs,
        "data_parallel_rank": rank,
        "data_parallel_size": dp,
    }


def batch(consumed: int, dp: int, mbs: int) -> list[np.ndarray]:
    """Every rank's ids of one step, each rank with a sequence of its own, as in a run."""
    return [
        batch_sample_ids(SampleSequence(NUM_SAMPLES, permutation), consumed, **layout(dp, mbs, rank))
        for rank in range(dp)
    ]


def written_out(length: int) -> list[int]:
    """The stream, epoch by epoch, without any of the code under test."""
    epochs = itertools.chain.from_iterable(permutation(epoch) for epoch in itertools.count())
    return [int(i) for i in itertools.islice(epochs, length)]


@pytest.mark.parametrize(("dp", "mbs"), LAYOUTS)
def test_a_global_batch_holds_the_same_samples_under_every_layout(dp: int, mbs: int) -> None:
    stream = written_out(GLOBAL_BATCH * 8)
    for step in range(8):  # 128 samples: more than four epochs
        expected = stream[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
        ids = np.concatenate([rank.ravel() for rank in batch(step * GLOBAL_BATCH, dp, mbs)])
        assert sorted(ids.tolist()) == sorted(expected)


@pytest.mark.parametrize(("dp", "mbs"), LAYOUTS)
def test_the_documented_position_of_each_row(dp: int, mbs: int) -> None:
    for rank in range(dp):
        positions = batch_positions(1000, **layout(dp, mbs, rank))
        for (m, k), position in np.ndenumerate(positions):
            assert position == 1000 + (m * dp + rank) * mbs + k
        assert positions.shape == (GLOBAL_BATCH // (dp * mbs), mbs)


def test_one_rank_reads_the_stream_in_order() -> None:
    rows = itertools.islice(
        micro_batches(SampleSequence(NUM_SAMPLES, permutation), 0, **layout(1, 4, 0)), 3 * NUM_SAMPLES
    )
    assert np.concatenate(list(rows)).tolist() == written_out(12 * NUM_SAMPLES)


def test_every_epoch_holds_every_sample_once() -> None:
    ids = SampleSequence(NUM_SAMPLES, permutation).sample_ids(np.arange(5 * NUM_SAMPLES)).reshape(5, -1)
    assert (np.sort(ids, axis=1) == np.arange(NUM_SAMPLES)).all()
    assert len({tuple(row) for row in ids.tolist()}) == 5


@pytest.mark.parametrize("consumed", [0, 16, 17, 28, 29, 30, 64, 29 * 3, 1000])
def test_a_resumed_stream_continues_the_uninterrupted_one(consumed: int) -> None:
    expected = written_out(consumed + 5 * GLOBAL_BATCH)[consumed:]
    for dp, mbs in LAYOUTS:
        ranks = [
            micro_batches(SampleSequence(NUM_SAMPLES, permutation), consumed, **layout(dp, mbs, rank))
            for rank in range(dp)
        ]
        # Row-block m of a step is rank 0's micro-batch m, then rank 1's, ...: together the stream in order.
        rows = [next(rank) for _ in range(5 * GLOBAL_BATCH // (dp * mbs)) for rank in ranks]
        assert np.concatenate(rows).tolist() == expected


def test_a_resumed_stream_may_change_layout_and_global_batch() -> None:
    first = micro_batches(SampleSequence(NUM_SAMPLES, permutation), 0, **layout(1, 4, 0))
    read = [next(first) for _ in range(8)]
    changed = layout(1, 2, 0) | {"global_batch_size": 6}
    second = micro_batches(SampleSequence(NUM_SAMPLES, permutation), 32, **changed)
    read += [next(second) for _ in range(20)]
    assert np.concatenate(read).tolist() == written_out(72)


def test_control_wrong_orders_differ() -> None:
    """What the tests above would catch: consumed samples ignored, another seed, one order for all epochs."""
    right = batch(48, 2, 2)
    ignored = batch(0, 2, 2)
    other_seed = SampleSequence(NUM_SAMPLES, lambda epoch: permutation(epoch, seed=6))
    same_epoch = SampleSequence(NUM_SAMPLES, lambda epoch: permutation(0))
    assert set(np.concatenate(right).ravel()) != set(np.concatenate(ignored).ravel())
    for wrong in (other_seed, same_epoch):
        ids = [batch_sample_ids(wrong, 48, **layout(2, 2, rank)) for rank in range(2)]
        assert not np.array_equal(np.concatenate(ids), np.concatenate(right))


@pytest.mark.parametrize(("gbs", "mbs", "dp"), [(16, 3, 1), (16, 4, 3), (0, 1, 1), (8, 0, 2), (8, 16, 1)])
def test_sizes_that_do_not_divide_are_refused(gbs: int, mbs: int, dp: int) -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch_size.*set a multiple of"):
        num_micro_batches(global_batch_size=gbs, micro_batch_size=mbs, data_parallel_size=dp)


def test_impossible_coordinates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 2 is outside \[0, 2\)"):
        batch_positions(0, **layout(2, 2, 2))
    with pytest.raises(ValueError, match="consumed_samples is -1"):
        batch_positions(-1, **layout(2, 2, 0))
    with pytest.raises(ValueError, match="at least 1 sample"):
        SampleSequence(0, permutation)
    with pytest.raises(ValueError, match="shape"):
        SampleSequence(NUM_SAMPLES + 1, permutation).sample_ids(np.arange(3))
