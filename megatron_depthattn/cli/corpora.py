"""Prepared corpora: describe one, check all of it, join several, divide one."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_depthattn.cli.common import check, new_parser, run
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable

PROGRESS_SECONDS = 10


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, 1 with lines on stderr for an error or a damaged corpus, 130 when interrupted."""
    parser = new_parser("prepare", __doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, (_, help) in ACTIONS.items():
        own = actions.add_parser(action, help=help, description=help)
        many: dict[str, Any] = {"nargs": "+"} if action == "merge" else {}
        own.add_argument("corpus", metavar="DIR", type=os.path.expanduser, help="folder or URL of a corpus", **many)
        add = own.add_argument
        if action == "check":
            add("--workers", type=int, metavar="N", help="threads (default: the cores available, at most 8)")
        elif action == "inspect":
            add("--split", metavar="S", help="only this one")
            add("--sample", type=int, metavar="I", help="show this sample (default: the first)")
            add("--shards", type=int, default=64, metavar="N", help="count documents in N shards a split; 0: in all")
            add("--json", action="store_true", help="print it as JSON")
        else:
            add("--output", type=user_path, required=True, metavar="DIR", help="folder to write")
        if action == "split":
            how = own.add_mutually_exclusive_group(required=True)
            how.add_argument("--parts", type=int, metavar="K", help="K parts of the same size")
            how.add_argument(
                "--fraction", type=float, metavar="F", help="two parts: the first F of the samples, the others"
            )
            how.add_argument(
                "--samples", type=int, metavar="N", help="two parts: the first N samples of train, the rest"
            )
    given = parser.parse_args(arguments)
    return run(ACTIONS[given.action][0], given)


def progress_line(unit: str) -> Callable[[int, int], None]:
    """A callback that prints a line on stderr every ten seconds."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            print(f"{done:,} of {total:,} {unit}", file=sys.stderr, flush=True)

    return report


def _check(given: argparse.Namespace) -> int:
    from megatron_depthattn.data.check import check_corpus

    workers = given.workers if given.workers is not None else min(8, len(os.sched_getaffinity(0)))
    check((workers < 1, f"--workers {workers}: set at least 1, or leave it out"))
    checked = check_corpus(given.corpus, workers=workers, on_progress=progress_line("bytes"))
    for fault in checked.faults:
        print(f"fault: {printable(' '.join(fault.split()))}", file=sys.stderr)
    for note in checked.notes:
        print(f"note: {printable(note)}")
    found = f"{len(checked.faults):,} faults" if checked.faults else "no fault"
    print(
        f"{printable(given.corpus)}: {found}; {checked.files:,} files, {checked.bytes:,} bytes of shards, "
        f"{checked.samples:,} samples, {checked.documents:,} documents read"
    )
    return 1 if checked.faults else 0


def _inspect(given: argparse.Namespace) -> None:
    from megatron_depthattn.data.inspect import inspect_corpus

    wanted = {"split": given.split, "sample": given.sample, "shards": given.shards}
    found = inspect_corpus(given.corpus, **wanted, on_progress=progress_line("shards"))
    print(json.dumps(found, indent=2) if given.json else printable("\n".join(_lines(found))))


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [found["corpus"]]
    same = {None: "", True: ", its tokenizer.json has it", False: ", its tokenizer.json DIFFERS"}
    lines.append(
        f"  format {found['format_version']}, {found['pack']}, {found['token_dtype']}, N {found['sequence_length']}"
    )
    lines.append(f"  vocabulary {found['vocab_size']}, EOS {found['eos_token_id']}")
    digest = f"{found['tokenizer_sha256']}{same[found['tokenizer_is_that_of_the_manifest']]}"
    lines.append(f"  tokenizer sha256 {digest}")
    for name, split in found["splits"].items():
        lines.append(
            f"{name}: {split['samples']:,} samples in {split['shards']:,} shards, {split['bytes_stored']:,} bytes "
            f"({split['bytes_raw']:,} expanded), index sha256 {split['index_sha256']}"
        )
        counts = {key: value for key, value in split.items() if type(value) is int and key not in _SAID}
        lines += [f"  {key.replace('_', ' ')} {value:,}" for key, value in counts.items()]
        lengths = split["documents_read"]
        if lengths:
            shares = [
                f"{100 * value:.2f} % {key[6:].replace('_', ' ')}" for key, value in lengths.items() if "share" in key
            ]
            sizes = [f"{key} {lengths[key]:,.0f}" for key in _SIZES if key in lengths]
            lines.append(f"  of {lengths['count']:,} documents in {split['shards_read']:,} shards: {', '.join(shares)}")
            lines.append(f"  tokens of a document: {', '.join(sizes)}")
    for key in ("settings", "skipped", "first_damaged_record", "sources", "outcomes"):
        value = found[key]
        if isinstance(value, dict):
            value = {name: each for name, each in value.items() if each not in (None, 0, [], {})}
        if value:
            lines.append(f"{key.replace('_', ' ')}: {json.dumps(value, ensure_ascii=False)}")
    sample = found["sample"]
    lines.append(f"sample {sample['number']} of {sample['split']}, in {sample['shard']}:")
    for each in sample["documents"]:
        what = "padding" if each["is_padding"] else "document"
        edges = ("" if each["begins_here"] else ", begins earlier") + ("" if each["ends_here"] else ", does not end")
        lines.append(f"--- {what}, tokens {each['begin']} to {each['begin'] + len(each['tokens']) - 1}{edges}")
        if not each["is_padding"]:
            lines.append(each["text"] if each["text"] is not None else " ".join(map(str, each["tokens"])))
    return lines


_SAID = ("samples", "shards", "bytes_stored", "bytes_raw", "shards_read")
_SIZES = ("min", "median", "mean", "p90", "p99", "max")


def _merge(given: argparse.Namespace) -> None:
    from megatron_depthattn.data.merge import merge_corpora

    print("\n".join(map(printable, merge_corpora(given.corpus, given.output))))


def _split(given: argparse.Namespace) -> None:
    from megatron_depthattn.data.merge import split_corpus

    how = {"parts": given.parts, "fraction": given.fraction, "samples": given.samples}
    print("\n".join(map(printable, split_corpus(given.corpus, given.output, **how))))


ACTIONS: dict[str, tuple[Callable[[argparse.Namespace], int | None], str]] = {
    "inspect": (_inspect, "what a corpus holds: counts, lengths of documents, a sample, where it is from"),
    "check": (_check, "read all of a corpus: hashes, sizes, vocabulary, borders of documents, counts, files"),
    "merge": (_merge, "make one corpus of several, without tokenising again"),
    "split": (_split, "divide a corpus into DIR/part-0, DIR/part-1, ..., without tokenising again"),
}
