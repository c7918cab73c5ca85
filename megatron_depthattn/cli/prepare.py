"""Turn text into a tokenised corpus: MDS shards of train and val, the tokenizer, a manifest with counts."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_depthattn.cli import corpora
from megatron_depthattn.cli.common import new_parser, run
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable

if TYPE_CHECKING:
    from megatron_depthattn.data.prepare import Prepared, PrepareProgress


class ProgressReport:
    """A line on stderr every ten seconds, with throughput and time left."""

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
        if now < self._next_line:
            return
        self._next_line = now + 10
        figures = [f"{progress.done_bytes / 1e6:,.1f} of {progress.total_bytes / 1e6:,.1f} MB"]
        figures += [f"{progress.tokens:,} tokens"] if progress.tokens else []
        seconds, new_bytes = now - self._phase_start, progress.done_bytes - self._first.done_bytes
        if new_bytes > 0 and seconds > 0:
            left = timedelta(seconds=round((progress.total_bytes - progress.done_bytes) * seconds / new_bytes))
            figures.append(f"{(progress.tokens - self._first.tokens) / seconds:,.0f} tokens/s, {left} left")
        print(f"{progress.phase}: {', '.join(figures)}", file=sys.stderr, flush=True)


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
        lines += _packed(count, manifest)
    formats = manifest["sources"]["formats"].items()
    read = ", ".join(f"{of['files']:,} {name} ({of['bytes'] / 1e6:.1f} MB)" for name, of in formats)
    counts = {name.removesuffix("_skipped").replace("_", " "): n for name, n in manifest["skipped"].items()}
    skipped = ", ".join(f"{n:,} {name}" for name, n in counts.items() if n or name.startswith(("binary", "empty")))
    lines += [f"  files      {read}", f"  skipped    {skipped}"]
    if not prepared.already_prepared:
        lines.append(f"  took       {prepared.seconds:.1f} s, {prepared.new_tokens / prepared.seconds:,.0f} tokens/s")
    asked, train = manifest["settings"].get("max_tokens"), manifest["splits"]["train"]
    is_best_fit = manifest["settings"].get("pack") == "best-fit"
    train = train["predicted_within_documents"] if is_best_fit else train["tokens"] - 1
    if asked and train < asked:
        lines.append(f"  train has {train:,} tokens to predict, --max-tokens asks for {asked:,}")
    return "\n".join(lines)


def _packed(count: Mapping[str, int], manifest: Mapping[str, Any]) -> list[str]:
    """What became of the documents of a split; nothing for a manifest of format 3."""
    if "cut_documents" not in count:
        return []
    share = count["padding_tokens"] / max(1, count["samples"] * (manifest["sequence_length"] + 1))
    line = f"{manifest['settings']['pack']}: {share:.2%} padding, {count['cut_documents']:,} documents cut "
    line += f"({count['cut_documents'] / max(1, count['documents']):.1%})"
    if manifest["settings"].get("truncate"):
        line += f", {count['truncated_documents']:,} truncated ({count['truncated_tokens']:,} tokens)"
    if manifest["settings"].get("min_tokens"):
        line += f", {count['documents_below_min_tokens']:,} left out as too short"
    return [f"  {'':<10} {line}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when the corpus is there, 1 with one line on stderr when it cannot be, 130 when interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in corpora.ACTIONS:
        return corpora.main(given)
    return run(_prepare, parse_arguments(given))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The fields of `PrepareSettings`."""
    actions = "\n".join(f"  {action:8} {help}" for action, (_, help) in corpora.ACTIONS.items())
    parser = new_parser("prepare", f"{__doc__}\n\nOf prepared corpora, `depthattn prepare ACTION --help`:\n{actions}")
    add = parser.add_argument
    inputs = (
        "files or folders: text (a document each), .jsonl or .json (one per record), each also as .gz or .zst; "
        ".parquet, .arrow, .feather (one per row); hf:NAME[:CONFIG], a data set of the Hugging Face Hub or a "
        "folder with its layout, streamed (one per row); or builtin:python-stdlib, the source of the standard library"
    )
    tokenizer = "a Hugging Face tokenizer folder, a tokenizer.json, or train-bpe:VOCAB to train a byte-level BPE"
    overwrite = "prepare again even if DIR holds a corpus, or unfinished work with other settings"
    add("--input", dest="inputs", nargs="+", type=os.path.expanduser, required=True, metavar="PATH", help=inputs)
    add("--tokenizer", required=True, type=os.path.expanduser, metavar="DIR_OR_FILE", help=tokenizer)
    add("--sequence-length", type=int, required=True, metavar="N", help="tokens a model sees at a time")
    add("--output", type=user_path, required=True, metavar="DIR", help="folder to write; data.path takes it")
    packs = (
        "how documents become samples: one after the other (concat, the default), or whole ones and padding where they "
        "leave room (best-fit)"
    )
    truncate = "keep only the first T tokens of a longer document (default T: as many as a sample has, N + 1)"
    add("--pack", choices=("concat", "best-fit"), default="concat", help=packs)
    add("--truncate", type=int, nargs="?", const=0, metavar="T", help=truncate)
    add("--min-tokens", type=int, metavar="N", help="leave out documents of fewer tokens, EOS counted")
    add("--validation-fraction", type=float, default=0.01, metavar="F", help="of documents, for val (default 0.01)")
    add("--split", metavar="NAME", help="split of the hf: inputs (default train)")
    add("--revision", metavar="REV", help="commit, branch or tag of inputs on the Hub (default: the newest commit)")
    add("--text-field", default="text", metavar="NAME", help="field or column that holds the text (default text)")
    add("--on-corrupt", choices=("error", "skip"), default="error", help="a damaged file or record (default: error)")
    add("--workers", type=int, metavar="N", help="encoding processes (default: the cores available)")
    add("--max-bytes", type=int, metavar="N", help="read at most this many bytes of text")
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="stop once train has N tokens to predict, N / sequence length samples",
    )
    add("--overwrite", action="store_true", help=overwrite)
    given = parser.parse_args(arguments)
    if given.truncate == 0:
        given.truncate = given.sequence_length + 1
    return given


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
