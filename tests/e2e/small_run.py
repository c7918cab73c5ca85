"""The small corpus and the small model of the command tests and of the fault campaign."""

import json
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


def pad_corpus(corpus: Path, folder: Path) -> None:
    """Leave a copy of a prepared corpus with documents of 1 to 20 tokens, and padding at the end of most samples."""
    import numpy as np
    from streaming import MDSWriter

    from megatron_depthattn.data.stream import TokenDataset

    rng, columns = (
        np.random.default_rng(5),
        {"padding": "uint32", "starts": "ndarray:uint8:5", "tokens": "ndarray:uint16:33"},
    )
    for split in ("train", "val"):
        with MDSWriter(columns=columns, out=str(folder / split), hashes=["xxh64"], size_limit=4000) as out:
            for tokens in map(np.array, TokenDataset(corpus, split)):
                padding, places = rng.choice([0, 3, 20, 30]), np.arange(33)
                starts = (rng.random(33) < 0.2) * (places < 33 - padding) + (places == 33 - padding)
                kept = np.where(places < 33 - padding, tokens, 0).astype(np.uint16)
                out.write({"padding": np.uint32(padding), "starts": np.packbits(starts > 0), "tokens": kept})
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["settings"]["pack"] = "best-fit"
    (folder / "manifest.json").write_text(json.dumps(manifest))


def train(*arguments: str | Path, ranks: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """The training command, as a process without a launcher or as so many ranks; ``options`` of `forked`."""
    return forked(ranks, "megatron_depthattn.train", *arguments, **options)
