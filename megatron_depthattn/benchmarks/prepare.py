"""The whole corpus preparation against the bare tokenizer library, over the same documents, on the same cores."""

import argparse
import gzip
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.timing import taking_turns

BATCH_BYTES = 8 << 20  # handed to the bare library at a time: its records take some 40 times the text


def add_prepare(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser("prepare", help="corpus preparation against the bare tokenizer library")
    parser.add_argument("--megabytes", type=int, default=120, metavar="N", help="size of the corpus (default 120)")
    parser.add_argument("--vocab", type=int, default=16384, metavar="N", help="of the BPE tokenizer (default 16384)")
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="N", help="default 2048")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each, taking turns (default 5)")
    parser.add_argument("--format", choices=sorted(WRITERS), default="jsonl", help="of the corpus (default jsonl)")
    parser.set_defaults(measure=measure_prepare)


def python_sources(num_bytes: int) -> list[str]:
    """The sources below this environment's site-packages and standard library, repeated up to `num_bytes`.

    A repetition differs in every line, or the tokenizer's cache of words would make it cheaper than new text.
    """
    folders = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib")]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    documents: list[str] = []
    left = num_bytes
    for repetition in range(1000):
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="replace")
            if repetition:
                text = "\n".join(f"{line} {zlib.crc32(line.encode(), repetition)}" for line in text.split("\n"))
            if text.strip():
                documents.append(text)
                left -= len(text.encode())
            if left <= 0:
                return documents
    raise ValueError(f"this environment's Python sources do not fill {num_bytes / 1e6:,.0f} MB: set fewer --megabytes")


def _json_lines(documents: list[str]) -> Iterator[bytes]:
    return ((json.dumps({"text": text}) + "\n").encode() for text in documents)


def _write_text(documents: list[str], folder: Path) -> None:
    for number, text in enumerate(documents):
        (folder / f"{number:06}.txt").write_text(text, encoding="utf-8")


def _write_zstd(documents: list[str], folder: Path) -> None:
    import zstandard

    (folder / "corpus.jsonl.zst").write_bytes(zstandard.compress(b"".join(_json_lines(documents))))


def _write_parquet(documents: list[str], folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), folder / "corpus.parquet", compression="zstd")


WRITERS: dict[str, Callable[[list[str], Path], object]] = {
    "text": _write_text,
    "jsonl": lambda documents, folder: (folder / "corpus.jsonl").write_bytes(b"".join(_json_lines(documents))),
    "jsonl.gz": lambda documents, folder: (folder / "corpus.jsonl.gz").write_bytes(
        gzip.compress(b"".join(_json_lines(documents)), 6)
    ),
    "jsonl.zst": _write_zstd,
    "parquet": _write_parquet,
}


def measure_prepare(given: argparse.Namespace) -> Result:
    """Throughputs in MB (10^6 bytes) of documents a second; the runs of all take turns.

    Processor time is measured as well: other work on the machine changes it much less.
    """
    # here, because the other verbs run without these packages
    from tokenizers import Tokenizer

    from megatron_depthattn.data.prepare import PrepareSettings, available_cores, prepare_corpus
    from megatron_depthattn.data.tokenizer import train_bpe

    documents = python_sources(given.megabytes * 1_000_000)
    num_bytes = sum(len(text.encode()) for text in documents)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        WRITERS[given.format](documents, folder / "corpus")
        train_bpe((text.encode() for text in documents), given.vocab).save_pretrained(folder / "tokenizer")
        bare = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))

        def prepare() -> None:
            settings = PrepareSettings(
                inputs=(str(folder / "corpus"),),
                tokenizer=str(folder / "tokenizer"),
                sequence_length=given.sequence_length,
                validation_fraction=0.01,
                output=folder / "output",
                overwrite=True,
            )
            prepare_corpus(settings)

        measured: dict[str, Callable[[], None]] = {
            "tokenizers, encode_batch": lambda: _encode_bare(bare.encode_batch, documents),
            "tokenizers, encode_batch_fast": lambda: _encode_bare(bare.encode_batch_fast, documents),
            "tools/prepare_data.py": prepare,
        }
        seconds: dict[str, list[float]] = {label: [] for label in measured}
        cpu_seconds: dict[str, list[float]] = {label: [] for label in measured}
        for run in range(given.runs):
            for label in taking_turns([*measured], run):
                start, cpu_start = time.perf_counter(), _cpu_seconds()
                measured[label]()
                seconds[label].append(time.perf_counter() - start)
                cpu_seconds[label].append(_cpu_seconds() - cpu_start)
                print(f"run {run + 1} of {given.runs}: {label} {seconds[label][-1]:.1f} s", file=sys.stderr, flush=True)
    result = Result(
        title=f"{num_bytes / 1e6:,.0f} MB in {len(documents):,} documents ({given.format}), BPE of {given.vocab:,}, "
        f"{available_cores()} cores, {given.runs} runs each",
        columns=["", "MB/s, median", "least to most", "preparation against it", "CPU s/GB, median", "against it"],
    )
    speeds = {label: [num_bytes / 1e6 / s for s in of] for label, of in seconds.items()}
    costs = {label: [s / num_bytes * 1e9 for s in of] for label, of in cpu_seconds.items()}
    own_speed, own_cost = (statistics.median(of["tools/prepare_data.py"]) for of in (speeds, costs))
    for label in measured:
        speed, cost = statistics.median(speeds[label]), statistics.median(costs[label])
        spread = f"{min(speeds[label]):.2f} to {max(speeds[label]):.2f}"
        ratios = own_speed / speed, cost / own_cost
        result.rows.append([label, f"{speed:.2f}", spread, f"{ratios[0]:.2f}", f"{cost:.0f}", f"{ratios[1]:.2f}"])
        result.figures[label] = {
            "megabytes_per_second": speeds[label],
            "cpu_seconds_per_gigabyte": costs[label],
            "speed_ratio": ratios[0],
            "cpu_ratio": ratios[1],
        }
    result.figures |= {"bytes": num_bytes, "documents": len(documents), "cores": available_cores()}
    return result


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _encode_bare(encode: Callable[..., list[Any]], documents: list[str]) -> None:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            encode(batch, add_special_tokens=False)
            batch, size = [], 0
    encode(batch, add_special_tokens=False)
