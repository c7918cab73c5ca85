"""Perplexity and bits per byte of an exported model on prepared data.

Reads the whole split unless --max-samples says otherwise. A run's own held-out loss is of train.eval_batches global
batches, the first train.eval_batches x train.global_batch_size samples of the split.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_depthattn.cli.common import check, new_parser, print_table, run
from megatron_depthattn.paths import user_path

if TYPE_CHECKING:
    from megatron_depthattn.evaluation import Evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 with one line on stderr when it cannot be done, 130 on Ctrl-C."""
    parser = new_parser("evaluate", __doc__)
    data = "a folder written by depthattn prepare, or one of its splits"
    parser.add_argument("--model", type=user_path, required=True, metavar="HF_DIR", help="a Hugging Face model folder")
    parser.add_argument("--data", type=user_path, required=True, metavar="MDS_DIR", help=data)
    parser.add_argument("--split", metavar="NAME", help="train or val (default val)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples at a time (default 8)")
    parser.add_argument("--max-samples", type=int, metavar="N", help="only the first N samples")
    add_device(parser)
    parser.add_argument("--json", type=user_path, metavar="FILE", help="also write the figures here")
    return run(_evaluate, parser.parse_args(arguments))


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where and in what type an exported model computes."""
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    dtypes = ("auto", "fp32", "bf16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="auto: the type in config.json")


def _evaluate(given: argparse.Namespace) -> None:
    few = given.max_samples is not None and given.max_samples < 1
    check(
        (given.batch_size < 1, f"--batch-size {given.batch_size}: set at least 1"),
        (
            few,
            f"--max-samples {given.max_samples}: set at least 1, or leave it out",
        ),
        (
            given.json is not None and not given.json.absolute().parent.is_dir(),
            f"--json {given.json}: its folder does not exist; make it first",
        ),
    )
    from rich.console import Console
    from rich.progress import Progress

    from megatron_depthattn.evaluation import check_fit, evaluate, find_tokenizer, open_split, save_json
    from megatron_depthattn.hf.loading import DTYPES, load_causal_lm, pick_device

    device = pick_device(given.device)
    console = Console(stderr=True)
    with open_split(given.data, given.split) as split:
        model = load_causal_lm(given.model, DTYPES[given.dtype])
        check_fit(split, model.config, given.model)
        tokenizer = find_tokenizer(split, given.model)
        model.to(device)
        start = time.perf_counter()
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("samples")
            result = evaluate(
                model,
                split,
                tokenizer,
                batch_size=given.batch_size,
                max_samples=given.max_samples,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        seconds = time.perf_counter() - start
        dtype = str(model.dtype).removeprefix("torch.")
        about = {
            "model": str(given.model),
            "data": str(given.data),
            "split": split.name,
            "sequence_length": split.dataset.sequence_length,
            "dtype": dtype,
            "device": str(device),
            "batch_size": given.batch_size,
            "seconds": seconds,
        }
        print(f"{given.model} on {given.data}, split {split.name}, in {dtype} on {device}")
        _show(result, seconds, len(split.dataset), split.dataset.sequence_length)
    if given.json is not None:
        save_json(given.json, result, about)


def _show(result: Evaluation, seconds: float, samples_in_split: int, length: int) -> None:
    of = f"of {samples_in_split:,} in the split, {length} tokens each"
    num_bytes = "unknown" if result.bytes is None else f"{result.bytes:,.0f}"
    per_byte = "unknown" if result.bits_per_byte is None else f"{result.bits_per_byte:.6f}"
    rows = [
        ("samples", f"{result.samples:,}", of),
        ("tokens", f"{result.tokens:,}", f"predicted, {result.tokens / seconds:,.0f} a second"),
        ("bytes", num_bytes, ""),
        ("loss", f"{result.loss:.6f}", "nats a token"),
        ("perplexity", f"{result.perplexity:,.4f}", "a token"),
        ("bits per byte", per_byte, ""),
    ]
    print_table(("", "", ""), rows, show_header=False, box=None)
    print("a run's own held-out loss is of its first train.eval_batches x train.global_batch_size samples alone")
    print(f"bytes: {result.bytes_source}")
