"""Turn text into a tokenised corpus: MDS shards of train and val, the tokenizer, a manifest with counts."""

import argparse
import os
import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_depthattn.data.documents import BUILTIN_STDLIB
from megatron_depthattn.data.prepare import Prepared, PrepareSettings, Progress, prepare_corpus
from megatron_depthattn.data.tokenizer import TRAIN_BPE

PLAIN_LINE_SECONDS = 10.0


class ProgressReport:
    """A bar on a terminal, a line every few seconds elsewhere; both on stderr."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        text = TextColumn("{task.description}")
        tokens = TextColumn("{task.fields[tokens]:,} tokens")
        self._bar = (
            Bar(text, BarColumn(), tokens, TimeRemainingColumn(), console=console) if console.is_terminal else None
        )
        self._task = self._bar.add_task("reading", total=None, tokens=0) if self._bar else None
        self._next_line = 0.0
        self._phase = ""

    def __enter__(self) -> "ProgressReport":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                description=progress.phase,
                completed=progress.done_bytes,
                total=progress.total_bytes,
                tokens=progress.tokens,
            )
        elif progress.phase != self._phase or time.monotonic() >= self._next_line:
            self._phase, self._next_line = progress.phase, time.monotonic() + PLAIN_LINE_SECONDS
            done, total = progress.done_bytes / 1e6, progress.total_bytes / 1e6
            print(f"{progress.phase}: {done:.1f} of {total:.1f} MB, {progress.tokens:,} tokens", file=sys.stderr)


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
    skipped = manifest["skipped"]
    lines.append(
        f"  skipped    {skipped['binary_files_skipped']:,} binary files, {skipped['empty_documents']:,} empty documents"
    )
    if not prepared.already_prepared:
        tokens = sum(count["tokens"] for count in manifest["splits"].values())
        lines.append(f"  took       {prepared.seconds:.1f} s, {tokens / prepared.seconds:,.0f} tokens/s")
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None) -> PrepareSettings:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=f"text files (a document each), .jsonl files (a document per line, field 'text'), folders "
        f"(every text file below them), or {BUILTIN_STDLIB} (the source of this Python's standard library)",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR_OR_FILE",
        help=f"a Hugging Face tokenizer folder, a tokenizer.json, or {TRAIN_BPE}VOCAB to train a byte-level "
        "BPE on the train split",
    )
    parser.add_argument("--sequence-length", type=int, required=True, metavar="N", help="tokens a model sees at a time")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; data.path takes it")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="share of the documents for the val split, chosen by hash (default 0.01; 0: no val split)",
    )
    parser.add_argument("--max-bytes", type=int, metavar="N", help="read at most this many bytes of text")
    parser.add_argument("--overwrite", action="store_true", help="prepare again even if DIR holds a corpus")
    given = vars(parser.parse_args(arguments))
    return PrepareSettings(inputs=tuple(given.pop("input")), **given)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 when the corpus is there, 1 with one line on stderr when it cannot be, 130 on Ctrl-C."""
    settings = parse_arguments(arguments)
    try:
        with ProgressReport() as report:
            prepared = prepare_corpus(settings, report)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(summary(settings.output, prepared))
    return 0


if __name__ == "__main__":
    # Threads, said outright so that tokenizers never asks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    sys.exit(main())
