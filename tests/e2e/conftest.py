"""A small real corpus (this package's own source) and a small config, shared by the command tests."""

from pathlib import Path

import pytest
import yaml

from tests.e2e.commands import REPOSITORY, must_succeed, python


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "mds"
    must_succeed(
        python(
            *("tools/prepare_data.py", "--input", REPOSITORY / "megatron_depthattn", "--tokenizer", "train-bpe:384"),
            *("--sequence-length", "32", "--validation-fraction", "0.2", "--output", folder),
        )
    )
    return folder


@pytest.fixture(scope="session")
def config_file(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps of a small Depth-Attention model; run.dir is left to the test."""
    settings = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 8,
            "ffn_hidden_size": 64,
            "vocab_size": 384,
            "max_position_embeddings": 32,
            "depth_attention": {"stride": 2, "recent_window": 1},
        },
        "data": {"path": str(corpus), "sequence_length": 32, "num_workers": 0},
        "train": {"steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "eval_interval": 6, "log_interval": 4},
        "optimizer": {"lr": 5.0e-3},
        "checkpoint": {"interval": 6},
    }
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
