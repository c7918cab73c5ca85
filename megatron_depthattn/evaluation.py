"""Perplexity and bits per byte of a causal language model on one split of a prepared corpus.

Every sample is scored as in training: its tokens 0 .. N-1 predict its tokens 1 .. N, documents follow one another in
one sample and nothing carries over to the next. With a document mask, as with ``data.document_mask`` in training, a
document does not see those before it and its first token is not predicted. Padding is never predicted.

The log-softmax is taken in fp32 whatever the model computes in, and summed in fp64: with a million tokens an fp32 sum
would lose the digits in which models differ.
"""

import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from megatron_depthattn.data.stream import TokenDataset
from megatron_depthattn.data.token_bytes import token_byte_counts
from megatron_depthattn.data.tokenizer import file_sha256
from megatron_depthattn.hf.tokenizer import load_fast_tokenizer

IGNORED = -100


class Split(NamedTuple):
    """One split of a corpus, open for reading."""

    dataset: TokenDataset
    name: str
    manifest: dict[str, Any] | None
    """The corpus's own; None where the shards came without one."""
    tokenizer_folder: Path
    """Where the corpus's tokenizer is, if it has one."""


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
    name = split or "val"
    if (folder / "index.json").is_file():
        folder, name = folder.parent, folder.name
        if split not in (None, name):
            raise ValueError(f"--data {data} is itself a split and --split is {split}: give {data.parent}, or no split")
    elif not (folder / name / "index.json").is_file():
        there = ", ".join(sorted(file.parent.name for file in folder.glob("*/index.json")))
        have = f"has the splits {there}" if there else "is no corpus of depthattn prepare"
        raise ValueError(f"--data {data} has no split {name!r}: it {have}")
    with nullcontext() if os.access(folder / name, os.W_OK) else tempfile.TemporaryDirectory() as cache:
        dataset = TokenDataset(folder, name, cache=cache)
        manifest = dataset.manifest or {}
        needed = {"vocab_size", "eos_token_id", "tokenizer_sha256", "splits"}
        is_own = needed <= manifest.keys() and manifest["splits"].get(name, {}).get("tokens")  # or it lies there only
        yield Split(dataset, name, manifest if is_own else None, folder / "tokenizer")


def check_fit(split: Split, config: PretrainedConfig, model_folder: Path) -> None:
    """Raise for a model that cannot read the split, or reads other words in its numbers.

    Tokenizers are compared by the text of each token id: that is all that matters once the text is tokens, and it
    survives a library that writes the same tokenizer.json in another way.
    """
    positions, length = getattr(config, "max_position_embeddings", None), split.dataset.sequence_length
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
    folders = [folder for folder in (split.tokenizer_folder, model_folder) if (folder / "tokenizer.json").is_file()]
    return load_fast_tokenizer(folders[0]) if folders else None


def auto_batch_size(model: PreTrainedModel, length: int) -> int:
    """Samples of ``length`` tokens, 1 to 64, whose logits fill a quarter of the memory that is free on the device."""
    is_cuda = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if is_cuda else psutil.virtual_memory().available
    logits = length * model.config.vocab_size * 8  # bytes: in fp32, with their log-softmax
    return int(max(1, min(64, free // 4 // logits)))


class Rows(NamedTuple):
    """Samples, as a model is scored on them."""

    tokens: Tensor
    """[b, N + 1]"""
    counted: Tensor
    """bool [b, N]: which predictions count."""
    positions: Tensor | None
    """[b, N], beginning anew with every document; None: those of the row."""


def read_rows(dataset: TokenDataset, samples: Iterable[int], document_mask: bool) -> Rows:
    """Read them; borders and padding only where they count."""
    if not (document_mask or dataset.pads):
        tokens = torch.stack([dataset[i] for i in samples])
        return Rows(tokens, torch.ones_like(tokens[:, 1:], dtype=torch.bool), None)
    read = [dataset.sample(i) for i in samples]
    tokens, starts = (torch.stack(each) for each in ([s.tokens for s in read], [s.starts for s in read]))
    places = torch.arange(tokens.shape[1])
    counted = (places < len(places) - torch.tensor([[s.padding] for s in read]))[:, 1:]
    if not document_mask:
        return Rows(tokens, counted, None)
    positions = places - torch.where(starts, places, 0).cummax(dim=1).values
    return Rows(tokens, counted & ~starts[:, 1:], positions[:, :-1])


def evaluate(
    model: PreTrainedModel,
    split: Split,
    tokenizer: PreTrainedTokenizerBase | None,
    batch: int,
    max_samples: int | None,
    document_mask: bool = False,
) -> dict[str, Any]:
    """Score the split's samples in the order in which they are stored, with a progress bar on a terminal.

    Args:
        model: in evaluation mode, on the device to use.
        tokenizer: says how many bytes a token is; None: the manifest's average is taken.
        batch: samples at a time.
        max_samples: stop after so many.
        document_mask: documents of a sample do not see each other.

    Returns:
        The figures by name; loss is in nats, per predicted token.

    Raises:
        ValueError: a token is unknown to the model or the tokenizer, the loss is not finite, nothing is predicted, or
            borders are needed and the corpus does not say where documents end.
    """
    from rich.console import Console
    from rich.progress import track

    dataset, manifest, console = split.dataset, split.manifest, Console(stderr=True)
    samples = min(max_samples or len(dataset), len(dataset))
    byte_counts = token_byte_counts(tokenizer) if tokenizer is not None else None
    known = model.config.vocab_size if byte_counts is None else min(model.config.vocab_size, len(byte_counts))
    if byte_counts is not None and manifest is not None:
        byte_counts[manifest["eos_token_id"] : manifest["eos_token_id"] + 1] = 0
    total, tokens, num_bytes = 0.0, 0, 0
    starts = range(0, samples, batch)
    for start in track(starts, "samples", console=console, transient=True, disable=not console.is_terminal):
        rows = read_rows(dataset, range(start, min(start + batch, samples)), document_mask)
        for token in map(int, rows.tokens.aminmax()):
            if not 0 <= token < known:
                raise ValueError(
                    f"the data has token {token}, and model and tokenizer know {known}: prepare the data with the "
                    "model's tokenizer"
                )
        total += _summed_loss(model, rows)
        tokens += int(rows.counted.sum())
        if not math.isfinite(total):
            raise ValueError(
                f"the loss is {total} within samples {start} to {start + len(rows.tokens) - 1}: the model's weights or "
                "--dtype are at fault"
            )
        num_bytes += int(byte_counts[rows.tokens[:, 1:][rows.counted]].sum()) if byte_counts is not None else 0

    if not tokens:
        raise ValueError(f"nothing is predicted in {samples} samples: documents of one token each, or padding alone")
    loss, counted, source = total / tokens, num_bytes, "exact: the bytes of each predicted token"
    if byte_counts is None and manifest is not None:
        counts = manifest["splits"][split.name]
        left_out = counts.get("truncated_tokens", 0) + counts.get("tokens_below_min_tokens", 0)
        average = counts.get("bytes", 0) / (counts["tokens"] + left_out)
        counted = tokens * average
        source = f"estimate: the split's average of {average:.4f} bytes a token (tokenizer is not byte-level)"
    elif byte_counts is None:
        source = "unknown: no byte-level tokenizer beside data or model, and no manifest.json"
    return {
        "samples": samples,
        "tokens": tokens,
        "document_mask": document_mask,
        "bytes": counted or None,
        "bytes_source": source,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "bits_per_byte": total / math.log(2) / counted if counted else None,
    }


@torch.inference_mode()
def _summed_loss(model: PreTrainedModel, rows: Rows) -> float:
    """Nats over the predictions that count."""
    tokens = rows.tokens.to(model.device)
    positions = {} if rows.positions is None else {"position_ids": rows.positions.to(model.device)}
    logits = model(input_ids=tokens[:, :-1], use_cache=False, **positions).logits
    labels = tokens[:, 1:].where(rows.counted.to(model.device), IGNORED)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for row, wanted in zip(logits, labels, strict=True):  # fp32 copies of all logits at once may not fit
        losses = functional.cross_entropy(row.float(), wanted, reduction="none", ignore_index=IGNORED)
        total += losses.double().sum()
    return float(total)
