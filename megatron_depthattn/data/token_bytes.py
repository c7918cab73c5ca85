"""How many bytes of text each token stands for: what turns nats per token into bits per byte.

Bits per byte compare models with different tokenizers, so the bytes must be those of exactly the tokens that were
predicted. With a byte-level tokenizer (GPT-2, GPT-NeoX, Llama 3, Qwen, `train-bpe:`) each token is a fixed string of
bytes, whatever stands beside it, and these strings make up the text. With others (a space that a token has in some
places only, text that is dropped or folded) that is not so, and no table can be made.
"""

import json
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

_KEEPING = {"ByteLevel", "Split", "Digits", "Punctuation", "Sequence"}  # pre-tokenizers that lose no text by default


def token_byte_counts(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """Bytes of each token id: int64 [largest id + 1]; EOS and other special tokens are no text and count 0.

    An NFC normaliser (GPT-NeoX, Qwen) is let through: the bytes are then those of the normalised text, which is
    what the model predicts.

    Returns:
        The counts, or None where a token alone does not decide its bytes.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    added = backend.get_added_tokens_decoder()
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for token, i in backend.get_vocab(with_added_tokens=True).items() if i not in added}
    if not _is_lossless(json.loads(backend.to_str())) or not alphabet <= vocab.keys():
        return None
    counts = torch.zeros(max([*vocab.values(), *added]) + 1, dtype=torch.int64)
    for token, i in vocab.items():
        if not alphabet.issuperset(token):
            return None
        counts[i] = len(token)  # a character stands for a byte
    for i, token in added.items():
        if token.lstrip or token.rstrip:  # it takes the spaces around it along
            return None
        counts[i] = 0 if token.special else len(token.content.encode())
    if tokenizer.eos_token_id is not None:
        counts[tokenizer.eos_token_id] = 0
    return counts


def _is_lossless(description: dict[str, Any]) -> bool:
    """Whether the bytes of the tokens are the bytes of the text (of its NFC form, where it is normalised)."""
    decoder, normalizer = description["decoder"], description["normalizer"]
    steps = _steps(description["pre_tokenizer"])
    return (
        description["model"]["type"] == "BPE"
        and decoder is not None
        and decoder["type"] == "ByteLevel"
        and (normalizer is None or normalizer["type"] == "NFC" or normalizer == {"type": "Sequence", "normalizers": []})
        and any(step["type"] == "ByteLevel" for step in steps)
        and not any(step.get("add_prefix_space") for step in steps)
        and all(step["type"] in _KEEPING and step.get("behavior") != "Removed" for step in steps)
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return [pre_tokenizer, *(s for inner in pre_tokenizer.get("pretokenizers", []) for s in _steps(inner))]
