"""Perplexity and bits per byte of a causal language model on one split of a prepared corpus.

Every sample is scored as in training: its tokens 0 .. N-1 predict its tokens 1 .. N, documents follow one another in
one sample and nothing carries over to the next. The log-softmax is taken in fp32 whatever the model computes in, and
summed in fp64: with a million tokens an fp32 sum would lose the digits in which models differ.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from megatron_depthattn.data.stream import TokenDataset
from megatron_depthattn.data.token_bytes import token_byte_counts
from megatron_depthattn.data.tokenizer import file_sha256
from megatron_depthattn.hf.tokenizer import load_fast_tokenizer

DEFAULT_SPLIT = "val"
EXACT = "exact: the bytes of each predicted token"


@dataclass(kw_only=True, frozen=True)
class Split:
    """One split of a corpus, open for reading."""

    dataset: TokenDataset
    name: str
    manifest: dict[str, Any] | None
    """The corpus's own; None where the shards came without one."""
    tokenizer_folder: Path
    """Where the corpus's tokenizer is, if it has one."""


@dataclass(kw_only=True, frozen=True)
class Evaluation:
    """What a model makes of a split. Loss is in nats, per predicted token."""

    samples: int
    tokens: int
    bytes: float | None
    bytes_source: str
    loss: float
    perplexity: float
    bits_per_byte: float | None


@contextmanager
def open_split(data: Path, split: str | None = None) -> Iterator[Split]:
    """Open ``data/split``, or ``data`` itself where that is a folder of shards.

    A folder that cannot be written is left alone: its shards are expanded in a temporary one.

    Args:
        data: a folder written by `depthattn prepare`, or one of its splits.
        split: "train" or "val"; None: "val", or the one that ``data`` is.

    Raises:
        ValueError: there is no such split, or its shards cannot be read.
    """
    folder = data.absolute()
    if not folder.is_dir():
        raise ValueError(f"--data {data} does not exist: give a folder written by depthattn prepare")
    if (folder / "index.json").is_file():
        folder, name = folder.parent, folder.name
        if split not in (None, name):
            raise ValueError(f"--data {data} is itself a split and --split is {split}: give {data.parent}, or no split")
    else:
        name = split or DEFAULT_SPLIT
        there = sorted(file.parent.name for file in folder.glob("*/index.json"))
        if name not in there:
            have = f"has the splits {', '.join(there)}" if there else "is no corpus of depthattn prepare"
            raise ValueError(f"--data {data} has no split {name!r}: it {have}")
    writable = os.access(folder / name, os.W_OK)
    with nullcontext() if writable else tempfile.TemporaryDirectory() as cache:
        dataset = TokenDataset(folder, name, cache=cache)
        manifest = dataset.manifest
        needed = {"vocab_size", "eos_token_id", "tokenizer_sha256", "splits"}
        if manifest is not None and not (needed <= manifest.keys() and manifest["splits"].get(name, {}).get("tokens")):
            manifest = None  # of something else, which lies beside the shards
        yield Split(dataset=dataset, name=name, manifest=manifest, tokenizer_folder=folder / "tokenizer")


def check_fit(split: Split, config: PretrainedConfig, model_folder: Path) -> None:
    """Raise for a model that cannot read the split, or reads other words in its numbers.

    Tokenizers are compared by the text of each token id: that is all that matters once the text is tokens, and it
    survives a library that writes the same tokenizer.json in another way.
    """
    positions = getattr(config, "max_position_embeddings", None)
    length = split.dataset.sequence_length
    if positions is not None and length > positions:
        raise ValueError(
            f"samples of {length} tokens are longer than the model's {positions} positions (max_position_embeddings): "
            f"prepare the data again with --sequence-length {positions} or less"
        )
    if split.manifest is None:
        return
    if split.manifest["vocab_size"] > config.vocab_size:
        raise ValueError(
            f"the data has a vocabulary of {split.manifest['vocab_size']} and the model one of {config.vocab_size}: "
            "prepare the data with the model's tokenizer"
        )
    file = model_folder / "tokenizer.json"
    if not file.is_file() or file_sha256(file) == split.manifest.get("tokenizer_sha256"):
        return
    own = load_fast_tokenizer(split.tokenizer_folder).get_vocab() if split.tokenizer_folder.is_dir() else None
    if own is None or not own.items() <= load_fast_tokenizer(model_folder).get_vocab().items():
        raise ValueError(
            f"the data was prepared with another tokenizer than {file} (its sha256 is not the manifest's "
            "tokenizer_sha256): prepare the data with the model's tokenizer"
        )


def find_tokenizer(split: Split, model_folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the split was made with: the corpus's, or else the model's; None: neither has one."""
    for folder in (split.tokenizer_folder, model_folder):
        if (folder / "tokenizer.json").is_file():
            return load_fast_tokenizer(folder)
    return None


def evaluate(
    model: PreTrainedModel,
    split: Split,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    batch_size: int = 8,
    max_samples: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score the split's samples in the order in which they are stored.

    Args:
        model: in evaluation mode, on the device to use.
        tokenizer: says how many bytes a token is; None: the manifest's average is taken.
        max_samples: stop after so many.
        on_progress: called with (samples done, samples in all) after every batch.

    Raises:
        ValueError: a token is unknown to the model or the tokenizer, or the loss is not finite.
    """
    dataset = split.dataset
    samples = len(dataset) if max_samples is None else min(max_samples, len(dataset))
    byte_counts = token_byte_counts(tokenizer) if tokenizer is not None else None
    if byte_counts is not None and split.manifest is not None:
        end = split.manifest["eos_token_id"]
        byte_counts[end : end + 1] = 0
    total, num_bytes = 0.0, 0
    for start in range(0, samples, batch_size):
        rows = torch.stack([dataset[i] for i in range(start, min(start + batch_size, samples))])
        _check_tokens(rows, model.config.vocab_size, byte_counts)
        total += _summed_loss(model, rows.to(model.device))
        if not math.isfinite(total):
            raise ValueError(
                f"the loss is {total} within samples {start} to {start + len(rows) - 1}: the model's weights or "
                "--dtype are at fault"
            )
        num_bytes += int(byte_counts[rows[:, 1:]].sum()) if byte_counts is not None else 0
        on_progress(start + len(rows), samples)

    tokens = samples * dataset.sequence_length
    counted, source = (num_bytes, EXACT) if byte_counts is not None else _average_bytes(split, tokens)
    loss = total / tokens
    return Evaluation(
        samples=samples,
        tokens=tokens,
        bytes=counted,
        bytes_source=source,
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=total / math.log(2) / counted if counted else None,
    )


@torch.inference_mode()
def _summed_loss(model: PreTrainedModel, rows: Tensor) -> float:
    """Nats over all predictions in ``rows`` [b, N + 1]."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    losses = [  # a row at a time: fp32 copies of all logits would not fit where the logits just do
        functional.cross_entropy(row_logits.float(), labels, reduction="none").double().sum()
        for row_logits, labels in zip(logits, rows[:, 1:], strict=True)
    ]
    return float(torch.stack(losses).sum())


def _check_tokens(rows: Tensor, vocab_size: int, byte_counts: Tensor | None) -> None:
    smallest, largest = (int(token) for token in rows.aminmax())
    if smallest < 0 or largest >= vocab_size:
        unknown = smallest if smallest < 0 else largest
        raise ValueError(
            f"the data has token {unknown} and the model a vocabulary of {vocab_size}: prepare the data with the "
            "model's tokenizer"
        )
    if byte_counts is not None and largest >= len(byte_counts):
        raise ValueError(
            f"the data has token {largest} and the tokenizer {len(byte_counts)} tokens: the data was prepared with "
            "another tokenizer"
        )


def _average_bytes(split: Split, tokens: int) -> tuple[float | None, str]:
    """Bytes that ``tokens`` tokens stand for on the split's average, and how that was found."""
    if split.manifest is None:
        return None, "unknown: no byte-level tokenizer beside data or model, and no manifest.json"
    counts = split.manifest["splits"][split.name]
    average = counts.get("bytes", 0) / counts["tokens"]
    return (
        tokens * average,
        f"estimate: the split's average of {average:.4f} bytes a token (tokenizer is not byte-level)",
    )


def save_json(file: Path, evaluation: Evaluation, about: dict[str, Any]) -> None:
    """Write ``about`` and the evaluation's fields as one JSON object; an infinite perplexity becomes null."""
    figures = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in vars(evaluation).items()
    }
    file.write_text(json.dumps(about | figures, indent=2) + "\n")
