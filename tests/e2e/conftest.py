"""A small config over the small corpus, shared by the command tests."""

from pathlib import Path

import pytest
import yaml

from tests.e2e.small_run import MODEL


@pytest.fixture(scope="session")
def config_file(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps of a small Depth-Attention model; run.dir is left to the test."""
    settings = {
        "model": MODEL,
        "data": {"path": str(corpus), "sequence_length": 32, "num_workers": 0},
        "train": {"steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "eval_interval": 6, "log_interval": 4},
        "optimizer": {"lr": 5.0e-3},
        "checkpoint": {"interval": 6},
    }
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
