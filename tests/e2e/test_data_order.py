"""The i-th global batch holds the same samples under every layout, in real worlds over real shards."""

import json
from pathlib import Path

import pytest

from tests.e2e.commands import must_succeed, torchrun

WORLDS = {1: ["parallel.tensor=1"], 2: ["parallel.pipeline=1", "parallel.tensor=2", "parallel.pipeline=2"]}


@pytest.fixture(scope="module")
def seen(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Layout to, for every rank, its place and its microbatches' sample ids."""
    folder, result = tmp_path_factory.mktemp("order"), {}
    for world_size, layouts in WORLDS.items():
        output = folder / f"{world_size}.json"
        must_succeed(torchrun(world_size, "-m", "tests.e2e.data_order_worker", config_file, output, *layouts))
        result |= {f"{world_size}: {layout}": ranks for layout, ranks in json.loads(output.read_text()).items()}
    return result


def global_batches(ranks: list) -> list[list[int]]:
    """Sorted sample ids of every global batch, each data-parallel replica counted once."""
    replicas = {place[0]: batches for place, batches in ranks}
    return [
        sorted(sample for batches in replicas.values() for microbatch in batches[i] for sample in microbatch)
        for i in range(len(next(iter(replicas.values()))))
    ]


def test_every_layout_sees_the_same_global_batches(seen):
    (single, *others) = [global_batches(ranks) for ranks in seen.values()]
    assert len(single) == 30
    assert all(len(batch) == 8 for batch in single)
    for other in others:
        assert other == single


def test_ranks_of_one_replica_read_the_same_microbatches(seen):
    for ranks in seen.values():
        for (replica, _), batches in ranks:
            assert batches == next(other for (r, _), other in ranks if r == replica)


def test_control_replicas_read_different_samples(seen):
    (_, first), (_, second) = seen["2: parallel.pipeline=1"]
    assert first != second
    assert single_batches_differ(global_batches(seen["1: parallel.tensor=1"]))


def single_batches_differ(batches: list[list[int]]) -> bool:
    return len({tuple(batch) for batch in batches}) == len(batches)
