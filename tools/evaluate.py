"""Perplexity and bits per byte of an exported model on prepared data."""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_depthattn.evaluation import (
    DEFAULT_SPLIT,
    Evaluation,
    check_fit,
    evaluate,
    find_tokenizer,
    open_split,
    save_json,
)
from megatron_depthattn.hf.loading import DTYPES, load_causal_lm, pick_device
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable


def run(given: argparse.Namespace) -> None:
    """Open, check, score, print."""
    check(given)
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
        Console().print(table(result, seconds, len(split.dataset)))
        print(f"bytes: {result.bytes_source}")
    if given.json is not None:
        save_json(given.json, result, about)


def table(result: Evaluation, seconds: float, samples_in_split: int) -> Table:
    """The figures, a row each."""
    rows = Table(show_header=False, box=None)
    rows.add_column()
    rows.add_column(justify="right")
    rows.add_column()
    of = "" if result.samples == samples_in_split else f"of {samples_in_split:,}"
    rows.add_row("samples", f"{result.samples:,}", of)
    rows.add_row("tokens", f"{result.tokens:,}", f"predicted, {result.tokens / seconds:,.0f} a second")
    rows.add_row("bytes", "unknown" if result.bytes is None else f"{result.bytes:,.0f}")
    rows.add_row("loss", f"{result.loss:.6f}", "nats a token")
    rows.add_row("perplexity", f"{result.perplexity:,.4f}", "a token")
    rows.add_row("bits per byte", "unknown" if result.bits_per_byte is None else f"{result.bits_per_byte:.6f}")
    return rows


def check(given: argparse.Namespace) -> None:
    """Refuse options out of range, before anything is computed."""
    if given.batch_size < 1:
        raise ValueError(f"--batch-size {given.batch_size}: set at least 1")
    if given.max_samples is not None and given.max_samples < 1:
        raise ValueError(f"--max-samples {given.max_samples}: set at least 1, or leave it out")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        raise ValueError(f"--json {given.json}: its folder does not exist; make it first")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=user_path, required=True, metavar="HF_DIR", help="a Hugging Face model folder")
    parser.add_argument(
        "--data",
        type=user_path,
        required=True,
        metavar="MDS_DIR",
        help="a folder written by tools/prepare_data.py, or one of its splits",
    )
    parser.add_argument("--split", metavar="NAME", help=f"train or val (default {DEFAULT_SPLIT})")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples at a time (default 8)")
    parser.add_argument("--max-samples", type=int, metavar="N", help="only the first N samples")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: the type in config.json")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="also write the figures here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 when the figures are out, 1 with one line on stderr when they cannot be, 130 on Ctrl-C."""
    given = parse_arguments(arguments)
    try:
        run(given)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: torch's, such as out of memory
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
