"""The sequence of sample ids: the same global batches whatever the layout, and resume from a count alone."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_depthattn.config.batch_sizes import BatchSizes
from megatron_depthattn.data import order
from megatron_depthattn.data.order import (
    EpochOrder,
    MixedSequence,
    SampleSequence,
    StagedMixture,
    batch_positions,
    num_micro_batches,
    random_words,
    slots_of,
    steps,
)
from tests.documented_order import epoch_order, mixed_order, stream_order

SHARDS = np.array([7, 3, 9, 10])
NUM_SAMPLES, GLOBAL_BATCH = 29, 16  # coprime: batches cross the ends of epochs at every offset
LAYOUTS = [(dp, mbs) for dp in (1, 2, 4) for mbs in (1, 2, 4)]


def sequence(seed: int = 5, shuffle: bool = True) -> SampleSequence:
    """Windows of 40 samples, more than an epoch."""
    return SampleSequence(SHARDS, seed=seed, shuffle=shuffle, window=16)


def layout(dp: int, mbs: int, rank: int) -> dict[str, int]:
    return {
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": mbs,
        "data_parallel_rank": rank,
        "data_parallel_size": dp,
    }


def batch(consumed: int, dp: int, mbs: int) -> list[np.ndarray]:
    """Every rank's ids of one step, each rank with a sequence of its own, as in a run."""
    return [next(steps(sequence(), consumed, **layout(dp, mbs, rank))) for rank in range(dp)]


def written_out(length: int) -> list[int]:
    """The stream, epoch by epoch, without any of the code under test."""
    return list(itertools.islice(stream_order(SHARDS.tolist(), seed=5, window=40), length))


# ------------------------------------------------------------------------------------------ one stream


@pytest.mark.parametrize(("sizes", "window"), [([50] * 40, 200), ([50] * 39 + [1], 256), ([7, 90, 3] * 9, 360)])
def test_a_piece_of_an_epoch_equals_the_whole(sizes: list[int], window: int) -> None:
    expected = epoch_order(sizes, 3, 1, 2, window)
    order = EpochOrder(np.array(sizes), (3, 1, 2), window)
    for start, stop in [(0, 10), (0, len(expected)), (333, 777), (len(expected) - 1, len(expected)), (199, 201)]:
        assert order.ids(start, stop).tolist() == expected[start:stop]
    ids = SampleSequence(np.array(sizes), seed=3, shuffle=True, stream=1, window=window)
    positions = np.arange(2 * len(expected), 3 * len(expected))
    assert ids.sample_ids(positions).tolist() == expected
    assert ids.sample_ids(positions[::-7]).tolist() == expected[::-7]
    assert sorted(expected) == list(range(sum(sizes)))


def test_a_sample_stays_within_its_window_and_shards_mix() -> None:
    """No sample is taken further than a window from its shard's place: a cold cache needs few shards at a time."""
    size, window = 50, 400
    ids = SampleSequence(np.full(200, size), seed=0, shuffle=True, window=window).sample_ids(np.arange(200 * size))
    shards = ids // size
    spans = [np.ptp(np.flatnonzero(shards == shard)) for shard in range(200)]
    assert size < min(spans) and max(spans) <= 2 * window + size
    assert len(set(shards[5000:5050])) > 6  # of the eight or so whose samples can be here
    assert np.mean(np.abs(np.diff(ids)) == 1) < 0.05


def test_the_shuffle_is_uniform_enough() -> None:
    """Within a window any sample can stand anywhere: over seeds, its mean place is the middle."""
    places = [np.argsort(SampleSequence(SHARDS, seed=s, shuffle=True).sample_ids(np.arange(29))) for s in range(2000)]
    mean = np.mean(places, axis=0)
    assert np.abs(mean - 14).max() < 5 * (29 / 12**0.5) / 2000**0.5


def test_a_position_in_a_large_epoch_needs_a_small_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    moved = EpochOrder._moved
    monkeypatch.setattr(EpochOrder, "_moved", lambda self, i: drawn.append(i) or moved(self, i))
    large = SampleSequence(np.full(1500, 65_536), seed=1, shuffle=True)
    ids = large.sample_ids(np.arange(50_000_000, 50_000_256))
    assert len(set(ids.tolist())) == 256
    assert len(drawn) <= 14  # of 1500 shards: three windows of four


def test_orders_differ_by_epoch_seed_and_stream() -> None:
    def order(seed: int, stream: int, epoch: int) -> tuple[int, ...]:
        own = SampleSequence(SHARDS, seed=seed, shuffle=True, stream=stream)
        return tuple(own.sample_ids(np.arange(29) + 29 * epoch).tolist())

    orders = [order(*key) for key in itertools.product(range(3), repeat=3)]
    assert all(sorted(ids) == list(range(NUM_SAMPLES)) for ids in orders)
    assert len(set(orders)) == 27
    assert order(2, 1, 0) == order(2, 1, 0)
    assert sequence(shuffle=False).sample_ids(np.arange(60)).tolist() == [i % 29 for i in range(60)]


# -------------------------------------------------------------------------------------------- layouts


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


def test_every_epoch_holds_every_sample_once() -> None:
    ids = sequence().sample_ids(np.arange(5 * NUM_SAMPLES)).reshape(5, -1)
    assert (np.sort(ids, axis=1) == np.arange(NUM_SAMPLES)).all()
    assert len({tuple(row) for row in ids.tolist()}) == 5


@pytest.mark.parametrize("consumed", [0, 16, 17, 28, 29, 30, 64, 29 * 3, 1000])
def test_a_resumed_stream_continues_the_uninterrupted_one(consumed: int) -> None:
    expected = written_out(consumed + 5 * GLOBAL_BATCH)[consumed:]
    for dp, mbs in LAYOUTS:
        ranks = [steps(sequence(), consumed, **layout(dp, mbs, rank)) for rank in range(dp)]
        # Row-block m of a step is rank 0's micro-batch m, then rank 1's, ...: together the stream in order.
        rows = [row for _ in range(5) for row in np.stack([next(rank) for rank in ranks], axis=1).reshape(-1, mbs)]
        assert np.concatenate(rows).tolist() == expected


def test_a_resumed_stream_may_change_layout_and_global_batch() -> None:
    first = steps(sequence(), 0, **layout(1, 4, 0))
    read = [next(first) for _ in range(2)]
    second = steps(sequence(), 32, **(layout(1, 2, 0) | {"global_batch_size": 6}))
    read += [next(second) for _ in range(7)]
    assert np.concatenate([ids.ravel() for ids in read]).tolist() == written_out(74)


def test_control_wrong_orders_differ() -> None:
    """What the tests above would catch: consumed samples ignored, another seed, one order for all epochs."""
    right = np.concatenate(batch(48, 2, 2)).ravel().tolist()
    ignored = np.concatenate(batch(0, 2, 2)).ravel().tolist()
    other_seed = [next(steps(sequence(6), 48, **layout(2, 2, rank))) for rank in range(2)]
    first_epoch = written_out(29)
    assert set(right) != set(ignored)
    assert np.concatenate(other_seed).ravel().tolist() != right
    assert sorted(right) != sorted(first_epoch[position % 29] for position in range(48, 64))


@pytest.mark.parametrize(("gbs", "mbs", "dp"), [(16, 3, 1), (16, 4, 3), (0, 1, 1), (8, 0, 2), (8, 16, 1)])
def test_sizes_that_do_not_divide_are_errors(gbs: int, mbs: int, dp: int) -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch_size.*set a multiple of"):
        num_micro_batches(global_batch_size=gbs, micro_batch_size=mbs, data_parallel_size=dp)


# -------------------------------------------------------------------------------------- several streams


@pytest.mark.parametrize(
    ("proportions", "slots"),
    [
        ((1.0,), (1000,)),
        ((0.7, 0.3), (700, 300)),
        ((7.0, 3.0), (700, 300)),
        ((1, 1, 1), (334, 333, 333)),
        ((0.9994, 0.0006), (999, 1)),
        ((1e9, 1e9), (500, 500)),
        ((0, 0.7, 0, 1.4), (0, 333, 0, 667)),
    ],
)
def test_slots_by_largest_remainder(proportions: tuple[float, ...], slots: tuple[int, ...]) -> None:
    assert slots_of(proportions) == slots


def test_a_proportion_that_rounds_to_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"data\.streams\[1\]\.proportion is 0\.0004, which rounds to none of 1000"):
        slots_of((0.9996, 0.0004))


SIZES = (np.array([4, 7]), np.array([50, 30]), np.array([5]))  # 11, 80 and 5 samples
ONE = [(0, (2, 7, 1))]
THREE = [*ONE, (237, (5, 0, 5)), (503, (0, 9, 1))]  # neither begins at the end of a block, and streams rest
KINDS = pytest.mark.parametrize("stages", [ONE, THREE], ids=["one", "three"])


def mixed(stages=THREE) -> MixedSequence:
    own = [SampleSequence(sizes, seed=4, shuffle=True, stream=i) for i, sizes in enumerate(SIZES)]
    return MixedSequence(StagedMixture(stages, 4), own, (0, 11, 91))


def mixture_written_out(stages, length: int) -> list[int]:
    (_, slots), *later = stages
    return list(itertools.islice(mixed_order([sizes.tolist() for sizes in SIZES], slots, 4, later), length))


@KINDS
def test_any_position_of_a_mixture_can_be_asked_for(stages) -> None:
    whole = mixture_written_out(stages, 2000)
    assert mixed(stages).sample_ids(np.arange(2000)).tolist() == whole
    positions = np.random.default_rng(0).integers(0, 2000, (20, 5))
    assert (mixed(stages).sample_ids(positions) == np.array(whole)[positions]).all()


@KINDS
def test_each_stream_of_a_mixture_is_its_own_endless_sequence(stages) -> None:
    """Taken apart again, stream by stream and in order, a mixture is every stream's epochs one after the other."""
    ids = mixed(stages).sample_ids(np.arange(2000))
    for i, (sizes, offset) in enumerate(zip(SIZES, (0, 11, 91), strict=True)):
        own = ids[(ids >= offset) & (ids < offset + sizes.sum())] - offset
        alone = SampleSequence(sizes, seed=4, shuffle=True, stream=i)
        assert own.tolist() == alone.sample_ids(np.arange(len(own))).tolist()


@pytest.mark.parametrize(("dp", "mbs"), [(dp, mbs) for dp, mbs in LAYOUTS if dp * mbs <= 8])
def test_stages_and_a_ramp_are_the_same_under_every_layout_from_every_step(dp: int, mbs: int) -> None:
    """A run that has skipped 100 samples, and resumes before each of its steps with nothing but their count."""
    skipped, sizes = 100, BatchSizes.of(24, [8, 8, 400])
    whole = mixture_written_out(THREE, 1000)[skipped:]
    consumed = 0
    while consumed < 700:
        size = sizes.at(consumed)
        ranks = [steps(mixed(), skipped + consumed, sizes.each(consumed), **layout(dp, mbs, i)) for i in range(dp)]
        rows = np.stack([next(rank) for rank in ranks], axis=1).reshape(-1)
        assert rows.tolist() == whole[consumed : consumed + size]
        consumed += size
    assert size == 24


def test_a_mixture_holds_its_proportions_in_every_block_and_reorders_the_slots() -> None:
    streams, inner = StagedMixture(THREE, 4).locate(np.arange(1503))
    for (first, slots), end in zip(THREE, (237, 503, 1503), strict=True):
        whole = first + (end - first) // 10 * 10  # the next stage cuts the last block short
        blocks = [tuple(block) for block in streams[first:whole].reshape(-1, 10).tolist()]
        assert {tuple(np.bincount(block, minlength=3)) for block in blocks} == {slots}
        assert (np.bincount(streams[whole:end], minlength=3) <= slots).all()
        assert len(set(blocks)) > len(blocks) // 5 > 3 or slots[1] == 9  # which has ten orders
    assert streams[:230].tolist() != streams[237:467].tolist()
    for stream in range(3):
        assert inner[streams == stream].tolist() == list(range((streams == stream).sum()))
    assert StagedMixture(THREE, 5).locate(np.arange(1503))[0].tolist() != streams.tolist()


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), max_size=4),
    slots=st.lists(st.permutations([0, 2, 8]) | st.permutations([1, 4, 5]) | st.just([10, 0, 0]), min_size=5),
    position=st.integers(0, 300),
)
@example(lengths=[237, 266], slots=[slots for _, slots in THREE], position=12_345)
def test_a_mixture_counts_what_it_took_from_each_stream(lengths, slots, position: int) -> None:
    mixture = StagedMixture(list(zip(itertools.accumulate(lengths, initial=0), slots, strict=False)), 4)
    streams, _ = mixture.locate(np.arange(position))
    assert mixture.consumed(position).tolist() == np.bincount(streams, minlength=3).tolist()


def test_counts_after_many_samples_need_one_block_of_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(order, "random_words", lambda n, *key: drawn.append(n) or random_words(n, *key))
    stages = [(0, (700, 300)), (10**8 + 7, (0, 1000)), (2 * 10**8, (1000, 0))]
    counts = StagedMixture(stages, 1).consumed(3 * 10**8 + 1)
    assert abs(counts[0] - (0.7 * (10**8 + 7) + 10**8 + 1)) <= 7 and counts.sum() == 3 * 10**8 + 1
    assert drawn == [1000] * 3


def test_control_streams_that_restart_at_a_stage_are_noticed() -> None:
    restarting = mixed()
    restarting._mixture._begun[:] = 0
    ids, whole = restarting.sample_ids(np.arange(600)).tolist(), mixture_written_out(THREE, 600)
    assert ids[:237] == whole[:237] and ids != whole
    once = [id for id in range(11, 91) if whole[:503].count(id) == ids[:503].count(id)]
    assert len(once) == 80 and [id for id in range(11, 91) if whole.count(id) != ids.count(id)]


@pytest.mark.parametrize("num_shards", [1, 7])
def test_the_ends_of_an_epoch_come_from_everywhere(num_shards):
    """Were samples moved beyond the ends of the line, an epoch would begin with samples from its beginning."""
    sizes = np.full(num_shards, 14_000 // num_shards)
    ids = SampleSequence(sizes, seed=3, shuffle=True).sample_ids(np.arange(14_000))
    for part in (ids[:400], ids[-400:]):
        # The mean of 400 uniform numbers: standard deviation 14000 / sqrt(12 * 400) = 202.
        assert abs(part.mean() - 7000) < 5 * 202
