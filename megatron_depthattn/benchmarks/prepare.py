"""How fast ``depthattn prepare`` makes samples of documents, over how fast the tokenizer alone encodes them."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.timing import spread, taking_turns
from megatron_depthattn.parallel.launch_env import set_variables

if TYPE_CHECKING:
    from megatron_depthattn.data.prepare import PrepareSettings

BATCH = 256
"""Documents that the library is given at a time: it encodes them on all cores."""
WAYS = ("tokenizer", "concat", "best-fit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="N", help="default 2048")
    parser.add_argument("--vocab-size", type=int, default=8192, metavar="V", help="of the tokenizer (default 8192)")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="of the source (default: all, some 30 MB)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each, taking turns (default 5)")


def measure(given: argparse.Namespace) -> Result:
    """Tokens a second over the standard library's source, whose documents are its files; from start to end, with the
    start of the encoding processes."""
    from megatron_depthattn.data.documents import BUILTIN_STDLIB
    from megatron_depthattn.data.prepare import PrepareSettings, prepare_corpus

    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    shares: dict[str, list[str]] = {"tokenizer": ["", ""]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings: dict[str, Any] = {"inputs": (BUILTIN_STDLIB,), "validation_fraction": 0.0}
        settings |= {"sequence_length": given.sequence_length, "max_bytes": given.max_bytes}
        first = PrepareSettings(**settings, tokenizer=f"train-bpe:{given.vocab_size}", output=folder / "first")
        prepare_corpus(first)
        tokenizer = str(folder / "first" / "tokenizer")
        for turn in range(given.runs):
            for way in taking_turns(WAYS, turn):
                if way == "tokenizer":
                    speeds[way].append(_library_speed(first, tokenizer))
                    continue
                output = folder / f"{way}-{turn}"
                prepared = prepare_corpus(PrepareSettings(**settings, tokenizer=tokenizer, pack=way, output=output))
                speeds[way].append(prepared.new_tokens / prepared.seconds)
                counts = prepared.manifest["splits"]["train"]
                padding = counts["padding_tokens"] / counts["samples"] / (given.sequence_length + 1)
                shares[way] = [f"{padding:.2%}", f"{counts['cut_documents'] / counts['documents']:.1%}"]
            print(f"run {turn + 1} of {given.runs}", file=sys.stderr, flush=True)
    result = Result(
        title=f"Preparation of the standard library's source in samples of {given.sequence_length} tokens, "
        f"{given.runs} runs of each",
        columns=["", "million tokens/s: median (quartiles)", "over the tokenizer's", "padding", "documents cut"],
    )
    for way, found in speeds.items():
        over = spread([mine / alone for mine, alone in zip(found, speeds["tokenizer"], strict=True)])
        result.rows.append([way, spread(found).text(1e6, 2), over.text(), *shares[way]])
        result.figures[way] = found
    return result


def _library_speed(settings: PrepareSettings, tokenizer: str) -> float:
    """Of tokenizers' own ``encode_batch``, on all cores, of the same documents in memory."""
    from tokenizers import Tokenizer

    from megatron_depthattn.data.documents import corpus_files

    set_variables(TOKENIZERS_PARALLELISM="true")
    library = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    texts, left = [], settings.max_bytes or sys.maxsize
    for file in corpus_files(settings.inputs, {}):
        texts.append(file.path.read_bytes()[: max(left, 0)].decode(errors="replace"))
        left -= file.size
    started = time.perf_counter()
    tokens = sum(
        len(one.ids) + 1 for i in range(0, len(texts), BATCH) for one in library.encode_batch_fast(texts[i : i + BATCH])
    )
    return tokens / (time.perf_counter() - started)
