"""Perplexity and bits per byte of an exported model on prepared data.

Reads the whole split unless --max-samples says otherwise. A run's own held-out loss is of train.eval_batches global
batches, the first train.eval_batches x train.global_batch_size samples of the split.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

from megatron_depthattn.cli.common import check, new_parser, print_table, run
from megatron_depthattn.paths import user_path


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
    lost = given.json is not None and not given.json.absolute().parent.is_dir()
    check(
        (given.batch_size < 1, f"--batch-size {given.batch_size}: set at least 1"),
        (few, f"--max-samples {given.max_samples}: set at least 1, or leave it out"),
        (lost, f"--json {given.json}: its folder does not exist; make it first"),
    )
    from megatron_depthattn.evaluation import check_fit, evaluate, find_tokenizer, open_split
    from megatron_depthattn.hf.loading import DTYPES, load_causal_lm, pick_device

    device = pick_device(given.device)
    with open_split(given.data, given.split) as split:
        model = load_causal_lm(given.model, DTYPES[given.dtype])
        check_fit(split, model.config, given.model)
        tokenizer = find_tokenizer(split, given.model)
        model.to(device)
        start = time.perf_counter()
        result = evaluate(model, split, tokenizer, given.batch_size, given.max_samples)
        seconds, length = time.perf_counter() - start, split.dataset.sequence_length
        dtype = str(model.dtype).removeprefix("torch.")
        print(f"{given.model} on {given.data}, split {split.name}, in {dtype} on {device}")
        _show(result, seconds, f"of {len(split.dataset):,} in the split, {length} tokens each")
    if given.json is not None:
        about = {"model": str(given.model), "data": str(given.data), "split": split.name, "sequence_length": length}
        about |= {"dtype": dtype, "device": str(device), "batch_size": given.batch_size, "seconds": seconds}
        given.json.write_text(json.dumps(about | result, indent=2) + "\n")


def _show(result: dict[str, Any], seconds: float, of: str) -> None:
    def shown(name: str, form: str) -> str:
        return "unknown" if result[name] is None else format(result[name], form)

    rows = [
        ("samples", shown("samples", ","), of),
        ("tokens", shown("tokens", ","), f"predicted, {result['tokens'] / seconds:,.0f} a second"),
        ("bytes", shown("bytes", ",.0f"), ""),
        ("loss", shown("loss", ".6f"), "nats a token"),
        ("perplexity", shown("perplexity", ",.4f"), "a token"),
        ("bits per byte", shown("bits_per_byte", ".6f"), ""),
    ]
    print_table(("", "", ""), rows, show_header=False, box=None)
    print("a run's own held-out loss is of its first train.eval_batches x train.global_batch_size samples alone")
    print(f"bytes: {result['bytes_source']}")
