"""Turn text into a tokenised corpus: MDS shards of train and val, the tokenizer, a manifest with counts."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_depthattn.cli.common import new_parser, run
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable

if TYPE_CHECKING:
    from megatron_depthattn.data.prepare import Prepared, PrepareProgress

LINE_SECONDS = 10.0


class ProgressReport:
    """A line on stderr every few seconds, with throughput and time left."""

    def __init__(self) -> None:
        self._phase_start = self._next_line = 0.0
        self._first: PrepareProgress | None = None
        """The phase's first report: rates and time left count from it, not from what an earlier process did."""

    def __call__(self, progress: PrepareProgress) -> None:
        now = time.monotonic()
        if progress.message:
            message = printable(" ".join(progress.message.split()))  # a file's name may have line ends
            print(message, file=sys.stderr, flush=True)
        if self._first is None or progress.phase != self._first.phase:
            self._phase_start, self._next_line, self._first = now, now, progress
        if now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            figures = self._figures(progress, self._first, now - self._phase_start)
            print(f"{progress.phase}: {figures}", file=sys.stderr, flush=True)

    @staticmethod
    def _figures(progress: PrepareProgress, first: PrepareProgress, seconds: float) -> str:
        figures = [f"{progress.done_bytes / 1e6:,.1f} of {progress.total_bytes / 1e6:,.1f} MB"]
        if progress.tokens:
            figures.append(f"{progress.tokens:,} tokens")
        new_bytes = progress.done_bytes - first.done_bytes
        if new_bytes > 0 and seconds > 0:
            left = (progress.total_bytes - progress.done_bytes) * seconds / new_bytes
            figures.append(f"{(progress.tokens - first.tokens) / seconds:,.0f} tokens/s")
            figures.append(f"{duration(left)} left")
        return ", ".join(figures)


def duration(seconds: float) -> str:
    """h:mm:ss"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def summary(output: Path, prepared: Prepared) -> str:
    """The counts of the manifest, as lines."""
    manifest = prepared.manifest
    lines = [f"already prepared: {output}" if prepared.already_prepared else f"prepared {output}"]
    lines.append(f"  tokenizer  {manifest['vocab_size']:,} tokens, EOS {manifest['eos_token_id']}")
    for split, count in manifest["splits"].items():
        lines.append(
            f"  {split:<10} {count['documents']:,} documents, {count['bytes'] / 1e6:.1f} MB, "
            f"{count['tokens']:,} tokens, {count['samples']:,} samples of {manifest['sequence_length']} "
            f"({count['dropped_tail_tokens']:,} tokens dropped, "
            f"{count['documents_with_replaced_utf8']:,} documents with invalid UTF-8 replaced)"
        )
    formats = manifest["sources"]["formats"].items()
    read = ", ".join(f"{of['files']:,} {name} ({of['bytes'] / 1e6:.1f} MB)" for name, of in formats)
    lines.append(f"  files      {read}")
    skipped = manifest["skipped"]
    lines.append(
        f"  skipped    {skipped['binary_files_skipped']:,} binary files, {skipped['empty_documents']:,} empty documents"
    )
    shown = {"binary_files_skipped", "empty_documents"}
    lines += [f"  {'':<10} {n:,} {name.replace('_', ' ')}" for name, n in skipped.items() if n and name not in shown]
    if not prepared.already_prepared:
        seconds, tokens = prepared.seconds, prepared.new_tokens
        lines.append(f"  took       {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when the corpus is there, 1 with one line on stderr when it cannot be, 130 when interrupted."""
    return run(_prepare, parse_arguments(arguments))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The fields of `PrepareSettings`."""
    parser = new_parser("prepare", __doc__)
    add = parser.add_argument
    inputs = (
        "files or folders (every file below them): text (a document each), .jsonl or .json (a document per record), "
        "each also as .gz or .zst; .parquet, .arrow, .feather (a document per row); or builtin:python-stdlib (the "
        "source of this Python's standard library)"
    )
    tokenizer = "a Hugging Face tokenizer folder, a tokenizer.json, or train-bpe:VOCAB to train a byte-level BPE"
    fraction = "share of the documents for the val split, chosen by hash (default 0.01; 0: no val split)"
    corrupt = "a damaged file or record is an error (default), or is counted and what precedes it in the file is kept"
    overwrite = "prepare again even if DIR holds a corpus, or unfinished work with other settings"
    add("--input", dest="inputs", nargs="+", type=os.path.expanduser, required=True, metavar="PATH", help=inputs)
    add("--tokenizer", required=True, type=os.path.expanduser, metavar="DIR_OR_FILE", help=tokenizer)
    add("--sequence-length", type=int, required=True, metavar="N", help="tokens a model sees at a time")
    add("--output", type=user_path, required=True, metavar="DIR", help="folder to write; data.path takes it")
    add("--validation-fraction", type=float, default=0.01, metavar="F", help=fraction)
    add("--text-field", default="text", metavar="NAME", help="field or column that holds the text (default text)")
    add("--on-corrupt", choices=("error", "skip"), default="error", help=corrupt)
    add("--workers", type=int, metavar="N", help="encoding processes (default: the cores available)")
    add("--max-bytes", type=int, metavar="N", help="read at most this many bytes of text")
    add("--overwrite", action="store_true", help=overwrite)
    return parser.parse_args(arguments)


def _prepare(given: argparse.Namespace) -> None:
    from megatron_depthattn.data.encode_pool import WorkerDiedError
    from megatron_depthattn.data.prepare import PrepareSettings, prepare_corpus

    settings = PrepareSettings(**vars(given) | {"inputs": tuple(given.inputs)})
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop saves, as Ctrl-C does
    try:
        prepared = prepare_corpus(settings, ProgressReport())
    except (ValueError, OSError, WorkerDiedError) as error:
        raise ValueError(f"{error}{_kept(settings.output)}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(settings.output) or "; nothing was written") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    print(summary(settings.output, prepared))


def _kept(output: Path) -> str:
    """What to say after an error: whether work is kept."""
    from megatron_depthattn.data.unfinished import unfinished_folder

    folder = unfinished_folder(output)
    return f" (the work so far is kept in {folder}; the same command continues it)" if folder.exists() else ""
