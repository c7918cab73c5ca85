"""A damaged shard in a real run: one error that names the file, from the rank that met it, and every rank stops."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from streaming import MDSWriter

from megatron_depthattn.cli import prepare
from tests.e2e.small_run import MODEL, train

LENGTH, DAMAGED_SAMPLE = 32, 22


@pytest.fixture
def config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run of 8 samples a step, two on each of two ranks at a time, over shards of two samples; one is damaged."""
    columns = {"tokens": f"ndarray:uint16:{LENGTH + 1}"}
    train = tmp_path / "corpus" / "train"
    rng = np.random.default_rng(0)
    with MDSWriter(columns=columns, out=str(train), compression="zstd", hashes=["xxh64"], size_limit=350) as writer:
        for _ in range(64):
            writer.write({"tokens": rng.integers(0, 384, LENGTH + 1).astype(np.uint16)})
    shards = json.loads((train / "index.json").read_text())["shards"]
    assert {shard["samples"] for shard in shards} == {2}
    file = train / shards[DAMAGED_SAMPLE // 2]["zip_data"]["basename"]
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data)
    settings = {
        "model": MODEL,
        "data": {"path": str(tmp_path / "corpus"), "sequence_length": LENGTH, "shuffle": False},
        "train": {"steps": 8, "global_batch_size": 8, "micro_batch_size": 2, "log_interval": 1},
    }
    # a corpus from elsewhere: no manifest, and neighbours share no token
    assert prepare.main(["check", str(tmp_path / "corpus")]) == 1
    printed = capsys.readouterr()
    found = f"fault: {file} differs from its xxh64 hash in index.json: copy or prepare the corpus again"
    assert printed.err.splitlines()[-1] == found and "1 faults; 32 files" in printed.out
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_rank_that_met_it_names_the_shard_and_all_stop(config_file: Path, tmp_path: Path) -> None:
    result = train(config_file, f"run.dir={tmp_path / 'run'}", ranks=2)
    assert result.returncode == 1
    # Step 2 holds samples 16 to 23, of which 22 and 23 are rank 1's second micro-batch.
    (error,) = (line for line in result.stderr.splitlines() if "shard.00011" in line)
    assert error.startswith(f"error (rank 1): {tmp_path}/corpus/train/shard.00011.mds.zstd differs from its xxh64")
    assert "ValueError" not in result.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
