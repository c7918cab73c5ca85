"""How fast the run's own loader reads MDS shards, over how fast training consumes tokens."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.timing import spread, taking_turns

if TYPE_CHECKING:
    from megatron_depthattn.data.corpus import Corpus

TOKENS_WRITTEN_AT_A_TIME = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="N", help="default 2048")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="sequences of a step (default 64)")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--samples", type=int, default=32768, metavar="N", help="in the corpus (default 32768)")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default 0, 1 and 2")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="read in a run (default 100)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each, taking turns (default 5)")
    parser.add_argument("--consumption", type=float, metavar="X", help="tokens a second that training consumes")


def measure(given: argparse.Namespace) -> Result:
    """Tokens a second of the loader alone, nothing else running, in the order that a shuffled run reads them."""
    speeds: dict[int, list[float]] = {workers: [] for workers in given.workers}
    with tempfile.TemporaryDirectory() as folder:
        corpus = _write_corpus(Path(folder), given)
        for turn in range(given.runs):
            for workers in taking_turns(given.workers, turn):
                speeds[workers].append(_tokens_per_second(corpus, workers, turn, given))
            print(f"run {turn + 1} of {given.runs}", file=sys.stderr, flush=True)
    result = Result(
        title=f"The loader on {given.samples:,} samples of {given.sequence_length} tokens in zstd MDS shards, "
        f"{given.batch} a step, {given.runs} runs of {given.steps} steps",
        columns=["loader processes", "million tokens/s: median (quartiles)", "over training's"],
    )
    for workers, found in speeds.items():
        over = f"{spread(found).median / given.consumption:.1f}" if given.consumption else ""
        result.rows.append([str(workers or "0 (in the training process)"), spread(found).text(1e6, 2), over])
        result.figures[f"{workers} workers"] = {"tokens_per_second": found, "consumed": given.consumption}
    return result


def _write_corpus(folder: Path, given: argparse.Namespace) -> Corpus:
    """Random tokens: the loader does not look at them."""
    import numpy as np

    from megatron_depthattn.data.corpus import Corpus
    from megatron_depthattn.data.pack import Packing, SplitWriter

    random = np.random.default_rng(0)
    writer = SplitWriter(folder / "train", Packing(given.sequence_length), np.zeros(1, np.uint16))
    total = given.samples * given.sequence_length + 1
    for first in range(0, total, TOKENS_WRITTEN_AT_A_TIME):
        # Of a skewed distribution, as tokens are: uniform ones would not compress at all.
        tokens = random.zipf(1.2, min(TOKENS_WRITTEN_AT_A_TIME, total - first)) % 50304
        writer.append(tokens.astype(np.uint16), np.array([len(tokens)]))
        writer.flush()
    writer.finish()
    return Corpus([str(folder)], [1.0], "train", sequence_length=given.sequence_length)


def _tokens_per_second(corpus: Corpus, workers: int, seed: int, given: argparse.Namespace) -> float:
    """After a first step, which starts the processes and opens the shards."""
    from megatron_depthattn.data.loader import TokenLoader

    options: dict[str, Any] = {"global_batch_size": given.batch, "micro_batch_size": given.micro_batch}
    options |= {"data_parallel_rank": 0, "data_parallel_size": 1, "consumed_samples": 0, "num_workers": workers}
    loader = TokenLoader(corpus, corpus.sequence(seed=seed, shuffle=True), **options)
    try:
        next(loader)
        started = time.perf_counter()
        for _ in range(given.steps):
            next(loader)
        return given.steps * given.batch * given.sequence_length / (time.perf_counter() - started)
    finally:
        loader.close()
