"""Reading a prepared corpus by sample number, the epoch order, and the loader."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import MDSWriter

from megatron_depthattn.data import stream
from megatron_depthattn.data.order import SampleSequence
from megatron_depthattn.data.stream import TokenDataset, TokenLoader, build_loader, sample_order

LENGTH, NUM_SAMPLES = 8, 100
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 1 << 16, (NUM_SAMPLES, LENGTH + 1)).astype(np.uint16)


def write_shards(folder: Path) -> Path:
    """Known tokens in several compressed shards, written with streaming itself."""
    columns = {"tokens": f"ndarray:uint16:{LENGTH + 1}"}
    with MDSWriter(columns=columns, out=str(folder), compression="zstd", hashes=["xxh64"], size_limit=600) as out:
        for row in TOKENS:
            out.write({"tokens": row})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder / "train")
    return folder


@pytest.fixture
def corpus(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return shutil.copytree(shards, tmp_path / "corpus")


@pytest.fixture
def dataset(corpus: Path) -> TokenDataset:
    return TokenDataset(corpus, "train", sequence_length=LENGTH)


def sequence(dataset: TokenDataset, seed: int = 3) -> SampleSequence:
    order = dataset.samples_per_shard
    return SampleSequence(len(dataset), lambda epoch: sample_order(order, NUM_SAMPLES, seed, epoch, True))


@pytest.fixture
def open_loaders() -> Iterator[list[TokenLoader]]:
    loaders: list[TokenLoader] = []
    yield loaders
    for loader in loaders:
        loader.close()


def read(dataset: TokenDataset, count: int, consumed: int = 0, workers: int = 0) -> list[dict[str, torch.Tensor]]:
    loader = build_loader(
        dataset,
        sequence(dataset),
        consumed_samples=consumed,
        global_batch_size=8,
        micro_batch_size=4,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=workers,
    )
    batches = [next(loader) for _ in range(count)]
    assert loader.data_seconds > 0
    loader.close()
    return batches


def test_samples_come_back_by_number(dataset: TokenDataset) -> None:
    assert len(dataset) == NUM_SAMPLES
    assert len(dataset.samples_per_shard) > 3
    assert dataset.manifest is None
    for i in RNG.permutation(NUM_SAMPLES):
        assert dataset[int(i)].dtype == torch.int64
        assert dataset[int(i)].tolist() == TOKENS[i].tolist()


def test_the_manifest_comes_with_the_data(corpus: Path) -> None:
    (corpus / "manifest.json").write_text(json.dumps({"vocab_size": 65536}))
    assert TokenDataset(corpus).manifest == {"vocab_size": 65536}


def test_another_sequence_length_is_refused(corpus: Path) -> None:
    assert TokenDataset(corpus).sequence_length == LENGTH
    with pytest.raises(ValueError, match=r"data.sequence_length is 9, but .* was prepared with 8: set data"):
        TokenDataset(corpus, sequence_length=9)


def test_paths_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"val has no index\.json: give data.path a folder"):
        TokenDataset(tmp_path, "val")
    with pytest.raises(ValueError, match=r"s3://bucket/corpus is remote and data.cache is not set"):
        TokenDataset("s3://bucket/corpus")
    with MDSWriter(columns={"text": "str"}, out=str(tmp_path / "train")) as out:
        out.write({"text": "not tokens"})
    with pytest.raises(ValueError, match=r"not 'tokens' of a fixed length: prepare the corpus with"):
        TokenDataset(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_shard_is_named_and_nobody_waits_for_it(corpus: Path, workers: int) -> None:
    file = corpus / "train" / "shard.00001.mds.zstd"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    dataset = TokenDataset(corpus)
    first = int(dataset.samples_per_shard[0])
    for _ in range(2):  # the second reader would otherwise wait for the first one's preparation to end
        with pytest.raises(ValueError, match=r"shard\.00001\.mds\.zstd: its bytes differ from the hash"):
            dataset[first]
    with pytest.raises(ValueError, match=r"shard\.00001\.mds\.zstd: its bytes differ from the hash"):
        read(dataset, NUM_SAMPLES // 4, workers=workers)
    assert dataset[0].tolist() == TOKENS[0].tolist()


def test_an_only_copy_is_never_deleted(corpus: Path) -> None:
    """Streaming would delete the raw shard here, since its compressed form is gone."""
    TokenDataset(corpus)[0]
    raw = corpus / "train" / "shard.00000.mds"
    assert raw.is_file()
    (corpus / "train" / "shard.00000.mds.zstd").unlink()
    with pytest.raises(ValueError, match=r"shard\.00000\.mds\.zstd is missing: copy or prepare"):
        TokenDataset(corpus)
    assert raw.is_file()


def test_reading_keeps_the_shards(corpus: Path) -> None:
    before = {p.name for p in (corpus / "train").iterdir()}
    read(TokenDataset(corpus), 30)
    assert before <= {p.name for p in (corpus / "train").iterdir()}


def test_a_cache_leaves_the_corpus_alone_and_survives_leftovers(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name for p in (corpus / "train").iterdir()}
    first = TokenDataset(corpus, cache=tmp_path / "cache")
    assert [first[i].tolist() for i in range(NUM_SAMPLES)] == TOKENS.tolist()
    assert {p.name for p in (corpus / "train").iterdir()} == before
    # `first` is still registered in shared memory, as a killed run would be.
    second = TokenDataset(corpus, cache=tmp_path / "cache")
    assert second[7].tolist() == TOKENS[7].tolist()
    monkeypatch.setattr(stream, "clean_stale_shared_memory", lambda: None)
    with pytest.raises(ValueError, match="Reused local directory"):  # control: why the cleaning is there
        TokenDataset(corpus, cache=tmp_path / "cache")


def test_orders_are_permutations_that_differ_by_epoch_and_seed(dataset: TokenDataset) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return sample_order(dataset.samples_per_shard, NUM_SAMPLES, seed, epoch, True).tolist()

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(ids) == list(range(NUM_SAMPLES)) for ids in orders)
    assert len({tuple(ids) for ids in orders}) == 9
    assert order(2, 1) == order(2, 1)
    unshuffled = sample_order(dataset.samples_per_shard, NUM_SAMPLES, 0, 1, False)
    assert unshuffled.tolist() == list(range(NUM_SAMPLES))


def test_one_shard_gives_independent_orders_for_neighbouring_seeds() -> None:
    """Streaming draws from seed + epoch: with one shard, seed 0's epoch 1 would be seed 1's epoch 0."""
    one_shard = np.array([NUM_SAMPLES])
    first, second = (sample_order(one_shard, NUM_SAMPLES, seed, 1 - seed, True) for seed in (0, 1))
    assert first.tolist() != second.tolist()


def test_batches_are_inputs_and_next_tokens(dataset: TokenDataset) -> None:
    for batch in read(dataset, 30):
        rows = TOKENS[batch["sample_ids"].numpy()].astype(np.int64)
        assert (batch["tokens"].numpy() == rows[:, :-1]).all()
        assert (batch["labels"].numpy() == rows[:, 1:]).all()
        assert batch["tokens"].shape == (4, LENGTH)
        assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_past_the_first_epoch_equals_the_uninterrupted_run(dataset: TokenDataset, workers: int) -> None:
    whole = read(dataset, 60)  # 240 samples of 4: into the third epoch
    for consumed in (8, 96, 104, 200):
        resumed = read(dataset, 10, consumed, workers)
        for i, batch in enumerate(resumed):
            for key, value in whole[consumed // 4 + i].items():
                assert torch.equal(batch[key], value), (consumed, i, key)


def test_control_other_positions_and_seeds_differ(dataset: TokenDataset) -> None:
    ids = [torch.cat([b["sample_ids"] for b in read(dataset, 4, consumed)]).tolist() for consumed in (0, 16)]
    assert ids[0] != ids[1]
    assert sequence(dataset, seed=4).sample_ids(np.arange(16)).tolist() != ids[0]


def test_a_closed_loader_ends(dataset: TokenDataset, open_loaders: list[TokenLoader]) -> None:
    loader = build_loader(
        dataset,
        sequence(dataset),
        consumed_samples=0,
        global_batch_size=4,
        micro_batch_size=4,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=1,
    )
    open_loaders.append(loader)
    next(loader)
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)
    assert not torch.multiprocessing.active_children()


def test_sizes_are_checked_before_any_worker_starts(dataset: TokenDataset) -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch_size 6"):
        build_loader(
            dataset,
            sequence(dataset),
            consumed_samples=0,
            global_batch_size=6,
            micro_batch_size=4,
            data_parallel_rank=0,
            data_parallel_size=1,
        )
