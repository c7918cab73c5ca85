"""How fast the run's own loader reads MDS shards, over how fast training consumes tokens."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.timing import spread, taking_turns
from megatron_depthattn.paths import user_path

if TYPE_CHECKING:
    from megatron_depthattn.data.corpus import Corpus

TOKENS_WRITTEN_AT_A_TIME = 1 << 20


def add_data(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("data", help="the loader's tokens a second over those that training consumes")
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="N", help="default 2048")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="sequences of a step (default 64)")
    parser.add_argument("--micro-batch", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--samples", type=int, default=32768, metavar="N", help="in the corpus (default 32768)")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default 0, 1 and 2")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="read in a run (default 100)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each, taking turns (default 5)")
    parser.add_argument("--consumption", type=float, metavar="X", help="tokens a second that training consumes")
    parser.add_argument(
        "--step-json", type=user_path, metavar="FILE", help="take it from what `step --json FILE` wrote"
    )
    parser.add_argument("--directory", type=user_path, help="where to write the corpus; default: a temporary folder")
    parser.set_defaults(measure=measure_data)


def measure_data(given: argparse.Namespace) -> Result:
    """Tokens a second of the loader alone, nothing else running, in the order that a shuffled run reads them."""
    consumed = _consumption(given)
    speeds: dict[int, list[float]] = {workers: [] for workers in given.workers}
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        corpus = _write_corpus(Path(name), given)
        for run in range(given.runs):
            for workers in taking_turns(given.workers, run):
                speeds[workers].append(_tokens_per_second(corpus, workers, run, given))
            print(f"run {run + 1} of {given.runs}", file=sys.stderr, flush=True)
    result = Result(
        title=f"The loader on {given.samples:,} samples of {given.sequence_length} tokens in zstd MDS shards, "
        f"{given.batch} a step, {given.runs} runs of {given.steps} steps",
        columns=["loader processes", "million tokens/s: median (quartiles)", *(f"over {name}" for name in consumed)],
        notes=[f"{name}: {speed:,.0f} tokens/s consumed" for name, speed in consumed.items()],
    )
    for workers, of in speeds.items():
        median = spread(of).median
        over = [f"{median / speed:.1f}" for speed in consumed.values()]
        result.rows.append([str(workers or "0 (in the training process)"), spread(of).text(1e6, 2), *over])
        result.figures[f"{workers} workers"] = {"tokens_per_second": of}
    result.figures["consumed"] = consumed
    return result


def _consumption(given: argparse.Namespace) -> dict[str, float]:
    """Tokens a second by whom they are consumed; empty if nobody says."""
    consumed = {"training": given.consumption} if given.consumption else {}
    if given.step_json:
        figures = json.loads(given.step_json.read_text())["figures"]
        consumed |= {name: of["tokens_per_second"] for name, of in figures.items() if "tokens_per_second" in of}
    return consumed


def _write_corpus(folder: Path, given: argparse.Namespace) -> Corpus:
    """Random tokens: the loader does not look at them."""
    import numpy as np

    from megatron_depthattn.data.corpus import Corpus
    from megatron_depthattn.data.shard_writer import SplitWriter

    random = np.random.default_rng(0)
    writer = SplitWriter(folder / "train", given.sequence_length, "uint16", [], np.zeros(1, np.uint16))
    left = given.samples * given.sequence_length
    while left > 0:
        # Of a skewed distribution, as tokens are: uniform ones would not compress at all.
        tokens = random.zipf(1.2, min(left, TOKENS_WRITTEN_AT_A_TIME)) % 50304
        writer.append(tokens.astype(np.uint16))
        writer.flush()
        left -= len(tokens)
    writer.finish()
    return Corpus([str(folder)], [1.0], "train", sequence_length=given.sequence_length)


def _tokens_per_second(corpus: Corpus, workers: int, run: int, given: argparse.Namespace) -> float:
    """After a first step, which starts the processes and opens the shards."""
    from megatron_depthattn.data.loader import TokenLoader

    loader = TokenLoader(
        corpus,
        corpus.sequence(seed=run, shuffle=True),
        consumed_samples=0,
        global_batch_size=given.batch,
        micro_batch_size=given.micro_batch,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=workers,
    )
    try:
        next(loader)
        started = time.perf_counter()
        for _ in range(given.steps):
            next(loader)
        return given.steps * given.batch * given.sequence_length / (time.perf_counter() - started)
    finally:
        loader.close()
