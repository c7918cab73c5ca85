"""The record of samples is the same under every layout, interrupted or not, in real worlds over real shards.

Five runs over more than three epochs, each interrupted twice in the middle of an epoch and resumed under another
layout, for one stream, and for three with all that data can have: proportions in three stages, behind samples that are
passed over, while the batch size rises, of padded samples with a document mask, out of a cache with room for a part of
them, ahead of need. An interrupted run is three steps ahead of what it resumes from, as one is that was killed between
checkpoints. Compared, sample for sample, with the documented order written out.
"""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from streaming import MDSWriter

from megatron_depthattn.data.shard_index import columns_of
from tests.documented_order import mixed_order, stream_order
from tests.e2e.commands import must_succeed
from tests.forked import forked

LENGTH, GLOBAL_BATCH, MICRO_BATCH, SEED = 8, 16, 2, 21
STOPS, NUM_STEPS, LOST_STEPS = (23, 51), 80, 3  # neither stop is at the end of an epoch, or of the ramp
SAMPLES = {"large": 211, "small": 97, "tiny": 23}
LAYOUTS = {
    "dp1": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "dp4": (4, []),
    "dp2 tp2": (4, ["parallel.tensor=2"]),
    "tp2 pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "pp4": (4, ["parallel.pipeline=4"]),  # two stages that read nothing
}
RUNS = {  # name of the run (its first layout), and the layouts after each interruption
    "dp1": ("dp1", "dp2", "dp4"),
    "dp2": ("dp2", "dp4", "tp2 pp2"),
    "dp4": ("dp4", "dp2 tp2", "tp2 pp2"),
    "tp2": ("tp2", "pp2", "pp4"),
    "pp2": ("pp2", "tp2", "dp2 tp2"),
    "forgetful": ("dp1", "dp2", "tp2"),  # control: resumes from sample 0
}
WORLDS = (1, 2, 4)  # in this order: each does what the runs need next
RAMP = ["train.global_batch_size=32", "train.batch_ramp=[8,8,900]"]
PROPORTIONS = (0.75, 0.25, 0)
STAGES = {25: (0.5, 0.2, 0.3), 58: (0.7, 0.3, 0)}  # the first begins in steps that are lost and taken again
SKIPPED = {"one": 0, "three": 150}
BATCHES = {"one": [GLOBAL_BATCH] * NUM_STEPS, "three": [8] * 38 + [16] * 19 + [24] * 13 + [32] * 10}
"""Samples of each step: 38 steps of 8 are the first over 300, 19 of 16 then the first over 600, and so on."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Three prepared corpora, path to samples of each shard; in every token of a sample stands the sample's id."""
    folder, offset, sizes = tmp_path_factory.mktemp("corpora"), 0, {}
    for name, count in SAMPLES.items():
        columns, out = columns_of(np.dtype(np.uint16), LENGTH + 1), folder / name / "train"
        with MDSWriter(columns=columns, out=str(out), compression="zstd", hashes=["xxh64"], size_limit=600) as writer:
            for sample in range(offset, offset + count):
                padding = np.uint32(sample % 4)
                starts = np.isin(np.arange(LENGTH + 1), [0, 1 + sample % 5, LENGTH + 1 - padding])
                tokens = np.full(LENGTH + 1, sample, np.uint16)
                writer.write({"padding": padding, "starts": np.packbits(starts), "tokens": tokens})
        manifest = {"tokenizer_sha256": hashlib.sha256(b"same").hexdigest(), "vocab_size": 384}
        manifest["settings"] = {"pack": "best-fit"}
        (folder / name / "manifest.json").write_text(json.dumps(manifest))
        index = json.loads((out / "index.json").read_text())
        sizes[str(folder / name)] = [shard["samples"] for shard in index["shards"]]
        offset += count
    return sizes


@pytest.fixture(scope="module")
def runs(corpora: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs, all of them done: <number of streams>/<name of the run>/samples/."""
    folder = tmp_path_factory.mktemp("runs")
    streams = [{"path": path, "proportion": share} for path, share in zip(corpora, PROPORTIONS, strict=True)]
    stages = [{"from_step": step, "proportions": shares} for step, shares in STAGES.items()]
    data = {
        "one": [f"data.path={next(iter(corpora))}", "data.num_workers=0"],
        "three": [
            f"data.streams={json.dumps(streams)}",
            f"data.stages={json.dumps(stages)}",
            f"data.skip_samples={SKIPPED['three']}",
            *("data.document_mask=true", f"data.cache={folder / 'cache'}", "data.cache_limit=10kb"),
            *("data.predownload=8", *RAMP),
        ],
    }
    settings = {
        "run": {"seed": SEED},
        "data": {"sequence_length": LENGTH, "log_samples": True},
        "train": {"global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH},
    }
    config_file = folder / "config.yaml"
    config_file.write_text(yaml.safe_dump(settings))
    todo = {(kind, name): list(enumerate(layouts)) for kind in data for name, layouts in RUNS.items()}
    for number, world_size in enumerate(WORLDS):
        segments = []
        while ready := [key for key, rest in todo.items() if rest and LAYOUTS[rest[0][1]][0] == world_size]:
            for kind, name in sorted(ready, key=lambda key: todo[key][0][1]):  # groups are made anew for each layout
                part, layout = todo[kind, name].pop(0)
                first_step, last_step = (0, *STOPS)[part], (*STOPS, NUM_STEPS)[part]
                ahead = LOST_STEPS if last_step != NUM_STEPS else 0
                segments.append(
                    {
                        "overrides": [f"run.dir={folder / kind / name}", *data[kind], *LAYOUTS[layout][1]],
                        "first_step": first_step,
                        "batch_sizes": BATCHES[kind][first_step : last_step + ahead],
                        "consumed_samples": 0 if name == "forgetful" else sum(BATCHES[kind][:first_step]),
                    }
                )
        listed = folder / f"{number}.json"
        listed.write_text(json.dumps(segments))
        must_succeed(forked(world_size, "tests.e2e.data_order_worker", config_file, listed))
    assert not any(todo.values())
    return folder


def expected(corpora: dict[str, list[int]], kind: str, seed: int = SEED) -> list[int]:
    """Ids of all samples of a run, and of those that it has passed over, in the order of their positions."""
    sizes, first = list(corpora.values()), SKIPPED["three"]
    own, *later = ([round(1000 * share) for share in shares] for shares in (PROPORTIONS, *STAGES.values()))
    begins = [first + sum(BATCHES["three"][: step - 1]) for step in STAGES]
    later = list(zip(begins, later, strict=True))
    order = stream_order(sizes[0], seed) if kind == "one" else mixed_order(sizes, own, seed, later)
    return list(itertools.islice(order, SKIPPED[kind] + sum(BATCHES[kind])))


def recorded(run: Path) -> dict[int, dict[int, list[list[list[int]]]]]:
    """Step to data-parallel rank to what each rank of the replica wrote: a list of microbatches."""
    steps: dict[int, dict[int, list]] = {}
    for file in sorted((run / "samples").glob("rank_*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        numbers = [line["step"] for line in lines]
        assert numbers == sorted(set(numbers)), f"{file} has a step twice"
        for line in lines:
            steps.setdefault(line["step"], {}).setdefault(line["data_parallel_rank"], []).append(line["sample_ids"])
    return steps


def positions_in_order(replicas: dict[int, list]) -> list[int]:
    """The ids of a step by position: micro-batch 0 of replica 0, of replica 1, ..., micro-batch 1 of replica 0, ..."""
    return [i for row in zip(*(replicas[rank][0] for rank in sorted(replicas)), strict=True) for m in row for i in m]


def all_ids(run: Path, kind: str) -> list[int]:
    steps = recorded(run)
    assert sorted(steps) == list(range(1, NUM_STEPS + 1))
    of_steps = [positions_in_order(steps[step]) for step in sorted(steps)]
    if run.name != "forgetful":
        assert list(map(len, of_steps)) == BATCHES[kind]
    return [*itertools.chain.from_iterable(of_steps)]


@pytest.mark.parametrize("kind", ["one", "three"])
@pytest.mark.parametrize("name", [name for name in RUNS if name != "forgetful"])
def test_interrupted_and_resumed_elsewhere_every_run_reads_the_documented_samples(runs, corpora, kind, name):
    assert all_ids(runs / kind / name, kind) == expected(corpora, kind)[SKIPPED[kind] :]


@pytest.mark.parametrize("kind", ["one", "three"])
@pytest.mark.parametrize("name", list(RUNS))
def test_ranks_of_one_replica_read_the_same_microbatches(runs, kind, name):
    steps = recorded(runs / kind / name)
    bounds = (0, *STOPS, NUM_STEPS)
    for (low, high), layout in zip(itertools.pairwise(bounds), RUNS[name], strict=True):
        world_size, overrides = LAYOUTS[layout]
        readers = 2 ** len(overrides)
        replica = 4 if layout == "pp4" else readers
        for step in range(low + 1, high + 1):
            assert sorted(steps[step]) == list(range(world_size // replica))
            for copies in steps[step].values():
                assert len(copies) == (replica if kind == "three" else readers)  # masks are for every pipeline stage
                assert all(copy == copies[0] for copy in copies)
                assert np.array(copies[0]).shape[1] == MICRO_BATCH


@pytest.mark.parametrize("kind", ["one", "three"])
def test_the_runs_go_past_three_epochs_of_every_stream(runs, corpora, kind):
    ids = expected(corpora, kind)[: SKIPPED[kind]] + all_ids(runs / kind / "dp1", kind)
    counts = np.bincount(ids, minlength=sum(SAMPLES.values()))
    for number, stream in enumerate(np.split(counts, np.cumsum(list(SAMPLES.values()))[:-1])):
        if kind == "three" or number == 0:
            assert stream.min() >= 3 and np.ptp(stream) == 1  # every epoch whole, the last one begun
        else:
            assert not stream.any()


@pytest.mark.parametrize("kind", ["one", "three"])
def test_control_another_seed_and_a_forgotten_position_are_noticed(runs, corpora, kind):
    assert expected(corpora, kind, seed=SEED + 1) != expected(corpora, kind)
    forgotten, first = all_ids(runs / kind / "forgetful", kind), sum(BATCHES[kind][: STOPS[0]])
    right = expected(corpora, kind)[SKIPPED[kind] :]
    assert forgotten[:first] == right[:first] and forgotten != right
