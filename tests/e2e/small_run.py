"""The small corpus and the small model of the command tests and of the fault campaign."""

import subprocess
from pathlib import Path
from typing import Any

from tests.e2e.commands import REPOSITORY, must_succeed
from tests.forked import forked

MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 64,
    "vocab_size": 384,
    "max_position_embeddings": 32,
    "depth_attention": {"stride": 2, "recent_window": 1},
}


def prepare_small_corpus(folder: Path) -> None:
    """This package's own source in sequences of 32 tokens."""
    must_succeed(
        forked(
            *(0, "megatron_depthattn.cli", "prepare", "--input", REPOSITORY / "megatron_depthattn"),
            *("--tokenizer", "train-bpe:384", "--sequence-length", "32", "--validation-fraction", "0.2"),
            *("--output", folder),
        )
    )


def train(*arguments: str | Path, ranks: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """The training command, as a process without a launcher or as so many ranks; ``options`` of `forked`."""
    return forked(ranks, "megatron_depthattn.train", *arguments, **options)
